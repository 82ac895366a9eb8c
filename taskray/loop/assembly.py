"""From a job to the objects of one task. Every task of a job is put together here, wherever it
runs; what does not fit is an InputError that names the key.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from taskray.job import plugins
from taskray.job.config import Job, Plugin, RelationConfig
from taskray.loop.consistency import WeightedRelation
from taskray.loop.inner import InnerRelation
from taskray.loop.learned import Learned
from taskray.relations.relation import Relation
from taskray.tasks.task import Task
from taskray.weighting.weighting import Weighting


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


def build_tasks(job: Job) -> dict[str, Task]:
    """Every task of the job."""
    return {name: build_task(job, name) for name in job.tasks}


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


def build_relation(config: RelationConfig, where: str) -> Relation:
    """The relation that a job describes under ``where``, a key such as ``consistency.<name>``."""
    relation: Relation = _build("relation", config.relation, f"{where}.relation")
    return relation


def simple_tasks(tasks: Mapping[str, Task], quantities: Sequence[str]) -> dict[str, Task]:
    """The simple tasks that predict one of these quantities; a head is named ``task.head``."""
    heads = {
        f"{name}.{head}" if len(task.heads) > 1 else name: part
        for name, task in tasks.items()
        for head, part in task.heads.items()
    }
    return {name: part for name, part in heads.items() if any(map(part.predicts, quantities))}


def inner_key(task: str, relation: str) -> str:
    """Where a job describes a relation inside a task."""
    return f"tasks.{task}.relations.{relation}"


def build_relations(job: Job, task_name: str, task: Task) -> list[WeightedRelation]:
    """The active relations that involve a quantity of this task."""
    relations = []
    for name, config in job.active_relations.items():
        with _seeded(job, task_name, name):
            relation = build_relation(config, f"consistency.{name}")
        own = {q for q in relation.quantities if task.predicts(q)}
        if own:
            scale = job.tasks[task_name].consistency_weight if own - {*relation.constant} else 0.0
            relations.append(WeightedRelation(name, relation, config, scale))
    return relations


def build_inner_relations(job: Job, task_name: str, task: Task) -> list[InnerRelation]:
    """The relations of weight above 0 inside this task."""
    relations = []
    for name, config in job.tasks[task_name].relations.items():
        if config.weight == 0:
            continue
        with _seeded(job, task_name, name):
            relation = build_relation(config, inner_key(task_name, name))
        relations.append(InnerRelation(name, relation, config))
    return relations


def relations_of(job: Job, task_name: str, task: Task) -> list[WeightedRelation]:
    """All active relations that involve a quantity of this task: those between tasks and those
    inside it."""
    inner = build_inner_relations(job, task_name, task)
    return [*build_relations(job, task_name, task), *inner]


@contextmanager
def _seeded(job: Job, task: str, part: str) -> Iterator[None]:
    """Random numbers of the block depend on the task's seed and the part's name alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed_of(job, task) + zlib.crc32(part.encode())) % 2**31)
        yield


def build_weighting(job: Job, name: str, task: Task) -> Weighting:
    """The weighting that a job describes under ``tasks.<name>.weighting``, of the heads that learn
    from labels."""
    config = job.tasks[name]
    named = config.dedicated if isinstance(config.dedicated, dict) else task.heads
    heads = [h for h, t in task.heads.items() if h in named and {*t.labels} <= {*task.labels}]
    where = f"tasks.{name}.weighting"
    weighting: Weighting = _build("weighting", config.weighting, where, heads=heads)
    return weighting


def build_learned(
    job: Job, name: str, task: Task, relations: Sequence[WeightedRelation]
) -> Learned:
    """Everything that a task learns, as one module, with its initial weights. Relations that give
    the task no gradient are left out: their parameters are learned by a peer. The others are built
    for their tasks here."""
    by_name = {r.name: r.relation for r in relations if r.scale > 0}
    for relation_name, relation in by_name.items():
        tasks = {name: task}
        if not all(map(task.predicts, relation.quantities)):
            tasks |= {n: t for n, t in build_tasks(job).items() if n != name}
        with _seeded(job, name, relation_name):
            relation.build_for(simple_tasks(tasks, relation.quantities))
    return Learned(build_model(job, name, task), by_name, build_weighting(job, name, task))
