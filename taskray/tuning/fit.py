"""Ray Tune as used by studies and searches: resources, quiet output, progress, Ctrl-C."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

# Before Tune is imported: it sets the environment variables that Ray reads on import.
import taskray.runtime.session  # noqa: F401  isort: skip
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.stopper import Stopper

from taskray.job.config import Job
from taskray.loop.metric_key import TaskMetric
from taskray.report.console import print_plain
from taskray.runtime.placement import plan
from taskray.tuning.progress import Progress, Trial
from taskray.tuning.runs import Run
from taskray.tuning.trial import run_trial

Point = dict[str, Any]
"""The values of a trial: dotted path -> value, as Tune gives them."""
MakeRun = Callable[[Point], Run]

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folder contains the same
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see Interruption
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner at any verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a job's paths are relative to the command's folder
}


def footprint(job: Job, available: Mapping[str, float]) -> PlacementGroupFactory:
    """The placement group of one trial: a bundle for its process, then one for each task.

    Raises InputError if a task asks for more than is available. If the tasks reserve nothing (on a
    small machine, see ``placement.plan``), the group reserves a small amount of memory, because
    Ray refuses empty groups.
    """
    shares = plan(job, dict(available)).values()
    bundles = [{"CPU": s.cpus, "GPU": s.gpus} for s in shares if s.cpus or s.gpus]
    head: dict[str, float] = {} if bundles else {"memory": 1 << 20}
    return PlacementGroupFactory([head, *bundles])


def concurrency(job: Job, available: Mapping[str, float], asked: int | None) -> int:
    """How many trials run at the same time: ``asked``, or as many as leave one core to each task
    (and one CPU to reading data, if tasks reserve CPUs)."""
    if asked is not None:
        return asked
    shares = list(plan(job, dict(available)).values())
    cpus, gpus = sum(s.cpus for s in shares), sum(s.gpus for s in shares)
    limits = [available.get("CPU", 1.0) / len(shares)]
    if cpus:
        limits.append((available.get("CPU", 0.0) - 1) / cpus)
    if gpus:
        limits.append(available.get("GPU", 0.0) / gpus)
    return max(1, int(min(limits)))


def share_threads(run: Run, at_once: int) -> Run:
    """The run with the machine's cores divided among the tasks of all runs at the same time."""
    if at_once == 1:
        return run
    threads = max(1, (os.cpu_count() or 1) // (len(run.job.tasks) * at_once))
    tasks = {
        name: task if task.threads or task.cpus else task.model_copy(update={"threads": threads})
        for name, task in run.job.tasks.items()
    }
    return replace(run, job=run.job.model_copy(update={"tasks": tasks}))


def fit(
    make_run: MakeRun,
    space: Mapping[str, Any],
    *,
    folder: Path,
    total: int,
    at_once: int,
    console: Console,
    measure: TaskMetric | None = None,
    early: bool = True,
    **tune_config: Any,
) -> list[Trial]:
    """Run every point of a space through Ray Tune, ``at_once`` at a time; Ray must be running.

    ``folder``: of the study. ``total``: number of trials. ``measure``: the metric of a search,
    reported during training if ``early``, else only at the end. Returns the trials in the order
    in which they began. Raises KeyboardInterrupt after Ctrl-C, once the running trials have
    written their checkpoints.
    """
    available = ray.cluster_resources()
    folder.mkdir(parents=True, exist_ok=True)
    stop, storage = folder / ".stop", folder / ".tune"
    stop.unlink(missing_ok=True)

    def trainable(point: Point) -> None:
        run_trial(share_threads(make_run(point), at_once), stop, measure, early)

    sized = tune.with_resources(trainable, lambda p: footprint(make_run(p).job, available))
    key = str(measure) if measure else None
    progress = Progress(lambda p: make_run(p).title, total, console, key)
    interruption = Interruption(stop, progress, console)
    with quiet(), interruption, progress:
        try:
            tune.Tuner(
                sized,
                param_space=dict(space),
                tune_config=tune.TuneConfig(**tune_config),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(storage),
                    verbose=0,
                    stop=interruption,
                    callbacks=[progress],
                ),
            ).fit()
            if stop.exists():
                raise KeyboardInterrupt
        finally:
            stop.unlink(missing_ok=True)
            shutil.rmtree(storage, ignore_errors=True)
    return sorted(progress.trials, key=lambda trial: trial.number)


class Interruption(Stopper):  # type: ignore[misc]
    """Ctrl-C (or SIGTERM) while Tune runs: creates a file, at which the running trials write their
    checkpoints and end; then Tune stops. A second Ctrl-C exits at once.

    Tune's own handler would kill the trials before they write checkpoints.
    """

    def __init__(self, file: Path, progress: Progress, console: Console) -> None:
        self.file, self.progress, self.console = file, progress, console
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        if self.file.exists():
            raise KeyboardInterrupt
        self.file.touch()
        print_plain(
            self.console, "stopping after the checkpoints are written (Ctrl-C again: stop at once)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its set-up, and signal handlers cannot be pickled."""
        return {}

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.file.exists() and not self.progress.running


@contextmanager
def quiet() -> Iterator[None]:
    """Tune without its own output, and without settings that would change the run."""
    before = {name: os.environ.get(name) for name in QUIET}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "optuna")]
    levels = [logger.level for logger in loggers]
    os.environ.update(QUIET)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
