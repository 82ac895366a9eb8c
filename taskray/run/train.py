"""One run of a job, from its datasets to its report. The whole story is :func:`run`, which
:func:`train` begins once all has been checked:

job ──▶ datasets (converted once, opened) ──▶ collective ──▶ result ──▶ run folder, report
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from torch import nn

from taskray.data.readers.reader import Reader
from taskray.data.storage.convert import build_reader
from taskray.data.storage.parquet import columns_of
from taskray.data.storage.source import Handle, open_source
from taskray.data.storage.store import prepare
from taskray.errors import InputError
from taskray.files import lock_folder
from taskray.job.config import AugmentConfig, Job, dump_yaml, parse_job
from taskray.loop.assembly import build_model, build_relations, build_tasks, columns_of_datasets
from taskray.loop.evaluation import panels
from taskray.loop.optimization import build_optimizer
from taskray.record.folder import ERRORS, METRICS, PANELS, RESULT, RunFolder
from taskray.report.html import write_report
from taskray.report.live import Live
from taskray.report.progress import dataset_progress
from taskray.run.resuming import check_same_job
from taskray.runtime.checkpoints import (
    CheckpointStore,
    find_checkpoint,
    load_into,
    open_filesystem,
)
from taskray.runtime.inline import InlineCollective
from taskray.runtime.member import load_initial
from taskray.schema import quantity_of
from taskray.tasks.task import Task

Resume = Literal["auto", "never"]


class Listener(Protocol):
    """Somebody else who wants each task's reports as they come: a Tune trial, a benchmark."""

    def __call__(self, task: str, step: int, values: Mapping[str, float]) -> None: ...


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

    ``resume="auto"`` goes on from the folder's checkpoints where there are some; ``"never"``
    starts over. ``inline`` runs the same loop in this process, without Ray. Raises InputError
    for what the job has wrong, or where the folder holds a run of another job or another process
    is at work in it: before anything is placed, or at the end where only an actor with its data
    could tell. An interrupt (Ctrl-C) leaves after the checkpoints are written.
    """
    console = console or Console()
    models = check(job)
    check_location(job)
    folder = folder.resolve()  # processes of a cluster that is already there are at home elsewhere
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
    with ray_session(job, inline), lock_folder(folder, "a run folder"):
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
    """Train, measure, write and report; see :func:`train`."""
    with RunFolder(folder) as files:
        files.write_config(job)
        if not inline:
            job = with_paths_for_workers(job)
        (folder / RESULT).unlink(missing_ok=True)  # what is cut off from here on has no result
        live = Live({n: job.steps_of(n) for n in job.tasks}, job.name, console)
        recorder = Recorder(files, live, listener)
        with closing(make_collective(job, checkpoints, recorder, inline)) as collective:
            paths = prepare_datasets(job, use_ray=not inline, console=console)
            with closing(Opener(job, paths, use_ray=not inline)) as opener:
                data, evaluations = opener.for_training(), opener.for_evaluation()
                if job.evaluation.every:
                    collective.add_evaluations(evaluations.result())
                try:
                    with live:
                        collective.train(data)
                    collective.add_evaluations(evaluations.result())
                    collective.evaluate()
                finally:
                    result: dict[str, Any] = collective.result(recorder.elapsed)
                    result |= {"events": recorder.events, "hardware": hardware()}
                    seen = {t: s.evaluations for t, s in collective.states.items()}
                    files.write_panels(panels(seen))
                    files.write_errors({n: s.traceback for n, s in collective.states.items()})
                    files.write_result(result)
    write_report(folder)
    errors = [s.error for s in collective.states.values() if s.error is not None]
    if errors and isinstance(errors[0], InputError):  # found by an actor: a wrong job all the same
        raise errors[0]
    return result


def check(job: Job) -> dict[str, nn.Module]:
    """Everything about a job that can be checked without its data: the names, the arguments, the
    relations. Returns each task's network; raises InputError with one line."""
    tasks = build_tasks(job)
    models = {}
    for name, task in tasks.items():
        learns = any(relation.scale > 0 for relation in build_relations(job, name, task))
        if not (learns or job.labels_of(name) or name in job.frozen):
            raise InputError(f"tasks.{name}: neither labels nor a relation: nothing to train on")
        if not any(quantity_of(c) == "image" for c in task.inputs) and (
            job.tasks[name].augment != AugmentConfig()
        ):
            raise InputError(f"tasks.{name}.augment: only images are augmented; it has none")
        models[name] = build_model(job, name, task)
    for dataset, config in job.data.items():
        learning = [n for n in tasks if job.labels_of(n) == dataset]
        measured = dataset in job.evaluation.data.values()
        reader = build_reader(config, dataset)
        check_labels(dataset, reader, [tasks[n] for n in (tasks if measured else learning)])
    return models


def check_location(job: Job) -> None:
    """``checkpoint.path`` must be on a filesystem that there is; InputError otherwise. It may ask
    an object store, so a study does not do it for each of its runs."""
    if job.checkpoint.path:
        try:
            open_filesystem(job.checkpoint.path)
        except InputError as error:
            raise InputError(f"checkpoint.path: {error}") from None


def check_labels(dataset: str, reader: Reader, tasks: Iterable[Task]) -> None:
    """What tasks would learn from or be measured on must be labels; InputError names the key."""
    for task in tasks:
        try:
            task.check_labels(reader)
        except InputError as error:
            raise InputError(f"data.{dataset}.reader.{error}") from None


def check_origins(job: Job, location: str, models: Mapping[str, nn.Module]) -> None:
    """A run that starts over begins from weights that are there, and are not the ones that it
    removes; InputError otherwise."""
    removed = Path(CheckpointStore(location).root).resolve()
    for name, model in models.items():
        load_initial(job, name, model)
        origin = job.tasks[name].checkpoint
        if origin is None:
            continue
        place = Path(find_checkpoint(origin, name).location).resolve()
        if place.parent.parent == removed and place.parent.name in job.tasks:
            raise InputError(
                f"tasks.{name}.checkpoint: {origin} is of the run that --resume never removes: "
                "another --out"
            )


def check_checkpoints(job: Job, location: str, models: Mapping[str, nn.Module]) -> None:
    """Checkpoints that a run would begin or go on from must be of its networks and optimizers;
    InputError otherwise."""
    store = CheckpointStore(location)
    for name, model in models.items():
        checkpoint = store.latest(name)
        if checkpoint is None:
            load_initial(job, name, model)
            continue
        load_into(model, checkpoint)
        config = job.tasks[name].optimizer
        own = build_optimizer(model.parameters(), config).state_dict()["param_groups"]
        saved = checkpoint.state["optimizer"]["param_groups"]
        if own[0].keys() != saved[0].keys():
            raise InputError(
                f"{checkpoint.location}: from another optimizer than {config.name!r} "
                f"(tasks.{name}.optimizer.name)"
            )


def check_gpus(job: Job) -> None:
    """A run in this process uses this machine's GPUs: InputError where it asks for more."""
    there = torch.cuda.device_count()
    for name, task in job.tasks.items():
        if task.gpus > there:
            raise InputError(f"tasks.{name}.gpus: {task.gpus:g} GPUs asked for, torch has {there}")


def ray_session(job: Job, inline: bool) -> Any:
    """Ray for the run; nothing where the run is inline."""
    if inline:
        return nullcontext()
    from taskray.runtime.session import session

    return session(job.runtime.address)


def with_paths_for_workers(job: Job) -> Job:
    """The job with paths that mean in Ray's workers what they mean here: they start in our folder
    only where we started Ray, or where the folder travelled with the job (``taskray submit``)."""
    import ray

    travelled = "working_dir" in ray.get_runtime_context().runtime_env
    return job if job.runtime.address is None or travelled else absolute_paths(job)


def absolute_paths(job: Job) -> Job:
    """The job with every initial checkpoint, and every argument of a reader, task, model or
    relation that names what is there, seen from the present folder, as an absolute path.

    Whatever else stands there (a URI) is left alone. A bare word is a path only as ``path``:
    elsewhere it is a name, whatever folder is called the same.
    """

    def absolute(path: str) -> str:
        place = os.path.expanduser(path)
        return str(Path(place).absolute()) if os.path.exists(place) else path

    values = job.model_dump(mode="json")
    for task in values["tasks"].values():
        place, mark, other = (task["checkpoint"] or "").partition("#")
        task["checkpoint"] = f"{absolute(place)}{mark}{other}" if place else None
    plugins = [data["reader"] for data in values["data"].values()]
    plugins += [task[kind] for task in values["tasks"].values() for kind in ("task", "model")]
    plugins += [relation["relation"] for relation in values["consistency"].values()]
    for plugin in plugins:
        for key, value in plugin.items():
            is_path = isinstance(value, str) and (
                key == "path" or os.sep in value or bool(Path(value).suffix)
            )
            if key != "name" and is_path:
                plugin[key] = absolute(value)
    return parse_job(values, job.name)


def make_collective(job: Job, checkpoints: str, recorder: Recorder, inline: bool) -> Any:
    """The tasks of the job as Ray actors, or all of them in this process."""
    if inline:
        return InlineCollective(job, checkpoints, recorder)
    from taskray.runtime.collective import Collective

    return Collective(job, checkpoints, recorder)


def start_over(folder: Path, checkpoints: str, job: Job) -> None:
    """Remove what an earlier run of the job left (only what taskray writes)."""
    for task in job.tasks:
        CheckpointStore(checkpoints).clear(task)
    for name in (METRICS, RESULT, PANELS, ERRORS, "report.html"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def hardware() -> str:
    """What the run ran on, for whoever reads the result."""
    gpus = torch.cuda.device_count()
    card = f", {gpus} x {torch.cuda.get_device_name(0)}" if gpus else ""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}){card}, torch {torch.__version__}"


def prepare_datasets(job: Job, use_ray: bool, console: Console) -> dict[str, Path]:
    """Every dataset of the job as Parquet, converted now where it was not yet."""
    used = {job.labels_of(name) for name in job.tasks} | set(job.evaluation.data.values())
    if job.mediator and job.active_relations:
        used.add(job.mediator.data)
    paths = {}
    for name, config in job.data.items():
        if name in used:
            with dataset_progress(console, name) as progress:
                paths[name] = prepare(config, name=name, use_ray=use_ray, progress=progress)
    return paths


class Opener:
    """Opens the datasets of a job: those to train on first, those of the evaluations while the
    training runs, each with the columns that somebody needs."""

    def __init__(self, job: Job, paths: Mapping[str, Path], use_ray: bool) -> None:
        self.job, self.paths, self.use_ray = job, paths, use_ray
        self.tasks = build_tasks(job)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="open")

    def for_training(self) -> dict[str, Handle]:
        """The dedicated datasets and the mediator, by name."""
        needed = columns_of_datasets(self.job, self.tasks)
        return {name: self._open(name, columns) for name, columns in needed.items()}

    def for_evaluation(self) -> Future[dict[str, Handle]]:
        """The datasets of the evaluations, by title, opened in the background."""
        return self._pool.submit(self._open_evaluations)

    def _open_evaluations(self) -> dict[str, Handle]:
        wanted = {c for task in self.tasks.values() for c in (*task.inputs, *task.labels)}
        handles: dict[str, Handle] = {}
        for title, name in self.job.evaluation.data.items():
            there = [c for c in columns_of(self.paths[name]) if c in wanted]
            handles[title] = self._open(name, there)
        return handles

    def _open(self, name: str, columns: Sequence[str]) -> Handle:
        return open_source(self.job.data[name], self.paths[name], columns, self.use_ray, name=name)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Recorder:
    """Looks on while the collective trains: writes files, draws the table, tells a listener."""

    def __init__(self, files: RunFolder, live: Live, listener: Listener | None = None) -> None:
        self.files, self.live, self.listener = files, live, listener
        self.began = time.monotonic()
        self.events: list[dict[str, Any]] = []

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resumption included."""
        return self.files.elapsed + time.monotonic() - self.began

    def report(self, report: dict[str, Any], restarts: int) -> None:
        task, step, values = report["task"], report["step"], report["values"]
        self.files.log(task, step, self.elapsed, values)
        self.live.update(task, step, values, restarts)
        if self.listener is not None:
            self.listener(task, step, values)

    def event(self, text: str, task: str | None = None, step: int | None = None) -> None:
        self.files.event(text, self.elapsed, task, step)
        self.live.event(text)
        self.events.append({"event": text, "task": task, "step": step})
