"""What can be checked of a job before any of it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from taskray.data.readers.reader import Reader
from taskray.data.storage.convert import build_reader
from taskray.errors import InputError
from taskray.job.config import AugmentConfig, Job
from taskray.loop.assembly import build_learned, build_relations, build_tasks
from taskray.loop.learned import Learned
from taskray.loop.optimization import build_optimizer
from taskray.loop.wiring import wire
from taskray.runtime.checkpoints import (
    CheckpointStore,
    find_checkpoint,
    load_into,
    open_filesystem,
)
from taskray.runtime.member import load_initial
from taskray.schema import quantity_of
from taskray.tasks.task import Task


def check(job: Job) -> dict[str, Learned]:
    """Everything about a job that can be checked without its data: the names, the arguments, the
    relations. Returns what each task learns; raises InputError with one line."""
    tasks = build_tasks(job)
    wiring = wire(job, tasks)
    models = {}
    for name, task in tasks.items():
        role = wiring.roles[name]
        if not (role.learns_from_peers or role.labels or role.frozen):
            raise InputError(f"tasks.{name}: neither labels nor a relation: nothing to train on")
        if not any(quantity_of(c) == "image" for c in task.inputs) and (
            job.tasks[name].augment != AugmentConfig()
        ):
            raise InputError(f"tasks.{name}.augment: only images are augmented; it has none")
        models[name] = build_learned(job, name, task, build_relations(job, name, task))
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


def check_origins(job: Job, location: str, models: Mapping[str, Learned]) -> None:
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


def check_checkpoints(job: Job, location: str, models: Mapping[str, Learned]) -> None:
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
