"""From a job to the objects of one task. Every task of a job is put together here, wherever it
runs; what does not fit is an InputError that names the key.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from taskray.job import plugins
from taskray.job.config import Job, Plugin, RelationConfig
from taskray.loop.consistency import WeightedRelation
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


def build_relation(name: str, config: RelationConfig) -> Relation:
    """The relation that a job describes under ``consistency.<name>``."""
    relation: Relation = _build("relation", config.relation, f"consistency.{name}.relation")
    return relation


def build_relations(job: Job, task_name: str, task: Task) -> list[WeightedRelation]:
    """The active relations that involve a quantity of this task."""
    relations = []
    for name, config in job.active_relations.items():
        relation = build_relation(name, config)
        own = {q for q in relation.quantities if task.predicts(q)}
        if own:
            scale = job.tasks[task_name].consistency_weight if own - {*relation.constant} else 0.0
            relations.append(WeightedRelation(name, relation, config, scale))
    return relations


def build_weighting(job: Job, name: str) -> Weighting:
    """The weighting that a job describes under ``tasks.<name>.weighting``."""
    weighting: Weighting = _build("weighting", job.tasks[name].weighting, f"tasks.{name}.weighting")
    return weighting


def build_learned(
    job: Job, name: str, task: Task, relations: Sequence[WeightedRelation]
) -> Learned:
    """Everything that a task learns, as one module, with its initial weights."""
    by_name = {r.name: r.relation for r in relations}
    return Learned(build_model(job, name, task), by_name, build_weighting(job, name))
