"""One run of a job, from its datasets to its report. :func:`train` checks the job and calls
:func:`run`, which does the steps in order:

job ──▶ datasets (converted once, opened) ──▶ collective ──▶ result ──▶ run folder, report
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from taskray.data.storage.label_split import write_split
from taskray.errors import InputError, TaskrayError
from taskray.files import lock_folder
from taskray.job.config import Job, dump_yaml
from taskray.loop.evaluation import measured_nothing, panels
from taskray.record.folder import ERRORS, LABELS, METRICS, PANELS, RESULT, RunFolder
from taskray.record.result import TaskState
from taskray.report.html import write_report
from taskray.report.live import Live
from taskray.run.backend import make_collective, ray_session
from taskray.run.checks import check, check_checkpoints, check_gpus, check_location, check_origins
from taskray.run.datasets import Opener, prepare_datasets
from taskray.run.energy import add_energies
from taskray.run.labels import check_batch_sizes, check_values
from taskray.run.paths import with_paths_for_workers
from taskray.run.recorder import Listener, Recorder, hardware
from taskray.run.resuming import check_same_job
from taskray.runtime.checkpoints import CheckpointStore

Resume = Literal["auto", "never"]


def train(
    job: Job,
    folder: Path,
    *,
    resume: Resume = "auto",
    inline: bool = False,
    console: Console | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Run a job in a run folder and return the content of its ``result.json``.

    ``resume="auto"`` continues from the folder's checkpoints, if there are any; ``"never"``
    deletes them and starts from step 0. ``inline`` runs the same loop in this process, without
    Ray. ``listener`` is called with every report.

    Raises InputError for a wrong job, for a folder with a run of another job, and for a folder
    that another process uses: before any actor starts, except for errors that only an actor with
    its data can find. Raises KeyboardInterrupt after Ctrl-C, once the checkpoints are written.
    """
    console = console or Console()
    models = check(job)
    check_location(job)
    folder = folder.resolve()  # the processes of a running cluster start in another folder
    checkpoints = job.checkpoint.path or str(folder / "checkpoints")
    if "://" not in checkpoints:
        checkpoints = CheckpointStore(checkpoints).root
    if inline:
        check_gpus(job)
    if resume == "never":
        check_origins(job, checkpoints, models)
    else:
        check_checkpoints(job, checkpoints, models)
        check_same_job(job, folder, checkpoints)
    with ray_session(job.runtime.address, inline), lock_folder(folder, "a run folder"):
        if resume == "never":
            start_over(folder, checkpoints, job)
        if job.checkpoint.path:
            CheckpointStore(checkpoints).write_job(dump_yaml(job))
        return run(job, folder, checkpoints, inline, console, listener)


def run(
    job: Job,
    folder: Path,
    checkpoints: str,
    inline: bool,
    console: Console,
    listener: Listener | None,
) -> dict[str, Any]:
    """Train, evaluate, and write the run folder; see :func:`train`."""
    states: dict[str, TaskState] = {}
    with preferring_errors_of(states):
        with RunFolder(folder) as files:
            files.write_config(job)
            if not inline:
                job = with_paths_for_workers(job)
            # a run that is killed from here on must not look finished
            (folder / RESULT).unlink(missing_ok=True)
            live = Live({n: job.steps_of(n) for n in job.tasks}, job.name, console)
            recorder = Recorder(files, live, listener)
            with closing(make_collective(job, checkpoints, recorder, inline)) as collective:
                states.update(collective.states)
                paths = prepare_datasets(job, use_ray=not inline, console=console)
                with closing(Opener(job, paths, use_ray=not inline)) as opener:
                    store = CheckpointStore(checkpoints)
                    result = _train_and_evaluate(collective, opener, recorder, paths, store)
        write_report(folder)
    errors = [s.error for s in states.values() if s.error is not None]
    if errors and isinstance(errors[0], InputError):  # a wrong job, found by an actor: exit code 2
        raise errors[0]
    return result


def _train_and_evaluate(
    collective: Any,
    opener: Opener,
    recorder: Recorder,
    paths: Mapping[str, Path],
    store: CheckpointStore,
) -> dict[str, Any]:
    """Returns the result, and writes it in any case: after an error it is of the steps so far.
    ``paths``: of the stored datasets; ``store``: of the checkpoints."""
    data, evaluations = opener.for_training(), opener.for_evaluation()
    check_batch_sizes(opener.job, {name: d.info.num_rows for name, d in data.items()})
    for name, dataset in data.items():
        if dataset.info.split is not None:
            write_split(recorder.files.path / LABELS / f"{name}.json", dataset.info.split)
    for warning in check_values(opener.job, opener.tasks, paths):
        recorder.event(warning)
    if opener.job.evaluation.every:
        collective.add_evaluations(evaluations.result())
    try:
        with recorder.live:
            collective.train(data)
        collective.add_evaluations(evaluations.result())
        collective.evaluate()
        found = {name: state.evaluations for name, state in collective.states.items()}
        add_energies(opener.job, store, evaluations.result(), found)
        for name, state in collective.states.items():
            for warning in measured_nothing(name, state.evaluations):
                recorder.event(warning, name, state.step)
    except BaseException:
        with suppress(Exception):  # the disk may be full: the first error is the one to report
            _write_result(collective, recorder)
        raise
    return _write_result(collective, recorder)


def _write_result(collective: Any, recorder: Recorder) -> dict[str, Any]:
    states: Mapping[str, TaskState] = collective.states
    result: dict[str, Any] = collective.result(recorder.elapsed)
    result |= {"events": recorder.events, "hardware": hardware()}
    recorder.files.write_panels(panels({t: s.evaluations for t, s in states.items()}))
    recorder.files.write_errors({n: s.traceback for n, s in states.items()})
    recorder.files.write_result(result)
    return result


@contextmanager
def preferring_errors_of(states: Mapping[str, TaskState]) -> Iterator[None]:
    """If a task has failed, an error of the block leaves it as the task's: the disk that was full
    for the task's checkpoint is full for the result, too."""
    try:
        yield
    except TaskrayError as error:
        raise next((s.error for s in states.values() if s.error), error) from error


def start_over(folder: Path, checkpoints: str, job: Job) -> None:
    """Delete the checkpoints and results of an earlier run, and no other file in the folder."""
    for task in job.tasks:
        CheckpointStore(checkpoints).clear(task)
    for name in (METRICS, RESULT, PANELS, ERRORS, "report.html"):
        (folder / name).unlink(missing_ok=True)
    for written in ("tensorboard", LABELS):
        shutil.rmtree(folder / written, ignore_errors=True)
