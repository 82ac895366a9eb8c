"""What is checked of a job before any part of it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from taskray.data.readers.reader import Reader
from taskray.data.storage.convert import build_reader
from taskray.errors import InputError
from taskray.job.config import AugmentConfig, Job
from taskray.loop.assembly import (
    build_inner_relations,
    build_learned,
    build_relations,
    build_tasks,
)
from taskray.loop.consistency import WeightedRelation
from taskray.loop.learned import Learned
from taskray.loop.optimization import Updates, parameter_groups
from taskray.loop.wiring import Role, Wiring, wire
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
    """Check what needs no data: names, arguments, relations, labels. Returns what each task learns;
    raises InputError for the first problem."""
    tasks = build_tasks(job)
    wiring = wire(job, tasks)
    models = {}
    for name, task in tasks.items():
        role = wiring.roles[name]
        if not (role.learns_from_peers or role.labels or role.frozen):
            raise InputError(f"tasks.{name}", "has no labels and no relation, expected one of them")
        if not any(quantity_of(c) == "image" for c in task.inputs) and (
            job.tasks[name].augment != AugmentConfig()
        ):
            raise InputError(
                f"tasks.{name}.augment", "only images are augmented, the task reads none"
            )
        inner = build_inner_relations(job, name, task)
        relations = [*build_relations(job, name, task), *inner]
        _check_heads(job, name, task, role, relations)
        models[name] = build_learned(job, name, task, relations)
        try:
            parameter_groups(models[name].together(), job.tasks[name].optimizer.lr_factors)
        except InputError as error:
            raise InputError(f"tasks.{name}.optimizer.{error.key}", error.text) from None
    for dataset, config in job.data.items():
        evaluated = dataset in job.evaluation.data.values()
        users = [n for n in tasks if evaluated or dataset in job.labels_of(n)]
        reader = build_reader(config, dataset)
        _check_columns(wiring, dataset, reader)
        check_labels(dataset, reader, [tasks[n] for n in users])
    return models


def _check_heads(
    job: Job, name: str, task: Task, role: Role, relations: Sequence[WeightedRelation]
) -> None:
    """Raise InputError for a head that would keep random weights: no dataset of the task labels it
    and no relation gives it a gradient."""
    config = job.tasks[name]
    if config.frozen or config.checkpoint or len(task.heads) == 1:
        return
    taught = {
        q
        for r in relations
        if r.scale > 0
        for q in {*r.relation.quantities} - {*r.relation.constant}
    }
    for head, part in task.heads.items():
        labelled = any({*part.labels} <= {*columns} for columns in role.labels.values())
        if not labelled and not any(map(part.predicts, taught)):
            raise InputError(
                f"tasks.{name}",
                f"head {head!r} has no labels and no relation, expected one of them",
            )


def _check_columns(wiring: Wiring, dataset: str, reader: Reader) -> None:
    """Raise InputError unless a dataset has every column that training needs. An evaluation skips
    the heads whose labels are missing."""
    for column, users in sorted(wiring.users_of_columns().get(dataset, {}).items()):
        if column not in reader.columns:
            raise InputError(
                f"data.{dataset}",
                f"has no column {column!r}, needed by {' and '.join(map(repr, users))}; "
                f"it has {', '.join(reader.columns)}",
            )


def check_location(job: Job) -> None:
    """Raise InputError where ``checkpoint.path`` is on a filesystem that cannot be opened.

    Apart from :func:`check`, because it may send requests to an object store: a study calls
    :func:`check` for every run.
    """
    if job.checkpoint.path:
        try:
            open_filesystem(job.checkpoint.path)
        except InputError as error:
            raise InputError("checkpoint.path", str(error)) from None


def check_labels(dataset: str, reader: Reader, tasks: Iterable[Task]) -> None:
    """Raise InputError where a task cannot use what the reader gives as its labels."""
    for task in tasks:
        try:
            task.check_labels(reader)
        except InputError as error:
            raise InputError(f"data.{dataset}.reader.{error.key}", error.text) from None


def check_origins(job: Job, location: str, models: Mapping[str, Learned]) -> None:
    """Check the initial weights of a run that starts from step 0: raises InputError where they
    cannot be loaded, or are among the checkpoints that this run would delete first."""
    deleted = Path(CheckpointStore(location).root).resolve()
    for name, model in models.items():
        load_initial(job, name, model)
        origin = job.tasks[name].checkpoint
        if origin is None:
            continue
        place = Path(find_checkpoint(origin, name).location).resolve()
        if place.parent.parent == deleted and place.parent.name in job.tasks:
            raise InputError(
                f"tasks.{name}.checkpoint",
                f"{origin} is in the run folder that --resume never empties; give another --out",
            )


def check_checkpoints(job: Job, location: str, models: Mapping[str, Learned]) -> None:
    """Raise InputError where a checkpoint that the run would continue or begin from is of another
    network or another optimizer."""
    store = CheckpointStore(location)
    for name, model in models.items():
        checkpoint = store.latest(name)
        if checkpoint is None:
            load_initial(job, name, model)
            continue
        load_into(model, checkpoint)
        config = job.tasks[name].optimizer
        own = Updates(model.together(), config).optimizer.state_dict()["param_groups"]
        saved = checkpoint.state["optimizer"]["param_groups"]
        if own[0].keys() != saved[0].keys():
            raise InputError(
                str(checkpoint.location),
                f"is of another optimizer than {config.name!r} (tasks.{name}.optimizer.name)",
            )
        if [len(group["params"]) for group in own] != [len(group["params"]) for group in saved]:
            raise InputError(
                str(checkpoint.location),
                f"has other groups of parameters (tasks.{name}.optimizer.lr_factors)",
            )


def check_gpus(job: Job) -> None:
    """Raise InputError where a task of an inline run asks for more GPUs than this machine has."""
    available = torch.cuda.device_count()
    for name, task in job.tasks.items():
        if task.gpus > available:
            raise InputError(
                f"tasks.{name}.gpus", f"{task.gpus:g} GPUs asked for, torch has {available}"
            )
