"""From a job to the objects of one task. Every task of a job is put together here, wherever it
runs; what does not fit is an InputError that names the key.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from taskray.errors import InputError
from taskray.job import plugins
from taskray.job.config import Job, Plugin
from taskray.loop.interfaces import Peers, Stream
from taskray.loop.predicting import frames_of, inputs_of
from taskray.loop.staleness import check_waiting
from taskray.loop.trainer import Trainer, WeightedRelation
from taskray.tasks.task import Task


def _build(kind: str, plugin: Plugin, where: str, **given: Any) -> Any:
    return plugins.build(kind, plugin.name, plugin.arguments, where, **given)


def seed_of(job: Job, name: str) -> int:
    """A task's own seed, or one derived from the job's and the task's name."""
    own = job.tasks[name].seed
    return own if own is not None else (job.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**31


def build_task(job: Job, name: str) -> Task:
    """The task that a job describes under ``tasks.<name>.task``."""
    task: Task = _build("task", job.tasks[name].task, f"tasks.{name}.task")
    return task


def build_model(job: Job, name: str, task: Task) -> nn.Module:
    """A task's network with its initial weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(job, name))
        model: nn.Module = _build(
            "model",
            job.tasks[name].model,
            f"tasks.{name}.model",
            in_channels=task.in_channels,
            out_channels=task.out_channels,
            **task.network_arguments,
        )
    return model


def build_relations(job: Job, task_name: str, task: Task) -> list[WeightedRelation]:
    """The active relations that involve a quantity of this task."""
    relations = []
    for name, config in job.active_relations.items():
        relation = _build("relation", config.relation, f"consistency.{name}.relation")
        own = {q for q in relation.quantities if task.predicts(q)}
        if own:
            scale = job.tasks[task_name].consistency_weight if own - {*relation.constant} else 0.0
            relations.append(WeightedRelation(name, relation, config, scale))
    return relations


def published_quantities(task: Task, relations: list[WeightedRelation]) -> tuple[str, ...]:
    """What this task predicts on the mediator: what relations ask of it, on any frame."""
    return tuple(sorted(q for q in _related(relations) if task.predicts(q)))


def wanted_quantities(task: Task, relations: list[WeightedRelation]) -> dict[str, int]:
    """What this task needs of its peers: what its relations need and it does not predict. Each
    with the first step at which one of them needs it."""
    return {
        quantity: min(r.config.start_step for r in relations if quantity in r.relation.quantities)
        for quantity in sorted(_related(relations))
        if not task.predicts(quantity)
    }


def _related(relations: list[WeightedRelation]) -> set[str]:
    return {q for weighted in relations for q in weighted.relation.quantities}


def build_tasks(job: Job) -> dict[str, Task]:
    """Every task of the job. Checks that each relation finds its quantities among them."""
    tasks = {name: build_task(job, name) for name in job.tasks}
    begins: dict[str, int] = {}  # when the first relation of each task does
    waiting = []
    for name, config in job.active_relations.items():
        relation = _build("relation", config.relation, f"consistency.{name}.relation")
        for quantity in relation.quantities:
            if not any(task.predicts(quantity) for task in tasks.values()):
                predicted = {q for task in tasks.values() for q in task.quantities}
                raise InputError(
                    f"consistency.{name}: needs {quantity!r}, which no task predicts "
                    f"(predicted: {', '.join(sorted(predicted))})"
                )
        tied = {n: t for n, t in tasks.items() if any(map(t.predicts, relation.quantities))}
        try:
            relation.check_tasks(_simple(tied, relation.quantities))
        except InputError as error:
            raise InputError(f"consistency.{name}.relation: {error}") from None
        begins |= {n: min(config.start_step, begins.get(n, config.start_step)) for n in tied}
        waiting.append(tied)
    for tied in waiting:
        check_waiting(job, tied, begins)
    return tasks


def _simple(tasks: Mapping[str, Task], quantities: Collection[str]) -> dict[str, Task]:
    """The simple tasks that predict one of these quantities; a head is named ``task.head``."""
    heads = {
        f"{name}.{head}" if len(task.heads) > 1 else name: part
        for name, task in tasks.items()
        for head, part in task.heads.items()
    }
    return {name: part for name, part in heads.items() if any(map(part.predicts, quantities))}


def columns_of_datasets(job: Job, tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    """For each dataset that the job trains on, the columns that must be read from it."""
    columns: dict[str, set[str]] = {}
    for name, task in tasks.items():
        dedicated = job.labels_of(name)
        if dedicated is not None:
            columns.setdefault(dedicated, set()).update(task.inputs, task.labels)
    if job.mediator is not None and job.active_relations:
        shared = columns.setdefault(job.mediator.data, set())
        for name, task in tasks.items():
            shared.update(mediator_columns(task, build_relations(job, name, task)))
    return {name: tuple(sorted(names)) for name, names in columns.items()}


def mediator_columns(task: Task, relations: list[WeightedRelation]) -> tuple[str, ...]:
    """The columns of the mediator dataset that one task reads; never a label."""
    if not relations:
        return ()
    frames = frames_of(task, published_quantities(task, relations))
    needed = {c for weighted in relations for c in weighted.relation.inputs}
    return tuple(sorted({*inputs_of(task, frames), *needed}))


def asked_columns(job: Job, asked: Collection[str]) -> tuple[str, ...]:
    """The columns of the mediator dataset that these tasks need to predict; whoever asks them to
    takes the columns along."""
    columns: set[str] = set()
    for name in asked:
        task = build_task(job, name)
        columns.update(mediator_columns(task, build_relations(job, name, task)))
    return tuple(sorted(columns))


def build_trainer(
    job: Job,
    name: str,
    task: Task,
    *,
    dedicated: Stream | None,
    mediator: Stream | None,
    relations: list[WeightedRelation],
    peers: Peers | None,
    device: str = "cpu",
) -> Trainer:
    """The loop of one task around its network."""
    return Trainer(
        name,
        job,
        task,
        build_model(job, name, task),
        seed=seed_of(job, name),
        relations=relations,
        published=published_quantities(task, relations),
        dedicated=dedicated,
        mediator=mediator,
        peers=peers,
        device=device,
    )
