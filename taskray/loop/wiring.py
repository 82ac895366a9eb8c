"""The roster of a collective, as a value: what each task predicts, needs and reads.

Built once from a job, before anything is placed, and handed to the process of each task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taskray.errors import InputError
from taskray.job.config import Job, RelationConfig
from taskray.loop.assembly import (
    build_inner_relations,
    build_relation,
    build_relations,
    build_tasks,
    inner_key,
    simple_tasks,
)
from taskray.loop.consistency import WeightedRelation
from taskray.loop.network import frames_of, inputs_of, labelled_frames
from taskray.relations.opposed import Opposed
from taskray.relations.relation import Relation
from taskray.schema import frame_of
from taskray.tasks.task import Task


@dataclass(frozen=True)
class Role:
    """One task's part in the collective."""

    publishes: tuple[str, ...]
    """Quantities that it predicts on the mediator: what relations need of it, on any frame."""
    wants: Mapping[str, int]
    """Quantity that it needs of its peers -> the first step at which it does."""
    reads: tuple[str, ...]
    """Columns of the mediator that it needs itself; never a label."""
    labels: Mapping[str, tuple[str, ...]]
    """Each of its labelled datasets -> what it reads of that: inputs and labels."""
    steps: int
    """Training steps; 0 where it is frozen."""
    frozen: bool
    learns_from_peers: bool
    """Whether a relation gives it a gradient."""
    steps_per_visit: float
    """Its training steps for one visit of the mediator."""

    @property
    def tied(self) -> bool:
        """Whether a relation involves it."""
        return bool(self.publishes)

    @property
    def blocks_on_miss(self) -> bool:
        """Whether it waits for a peer's first prediction on a batch. A task without labels has
        nothing else to do, and a skipped step is much shorter than a real one: it would outrun
        its peers."""
        return not self.labels and not self.frozen


@dataclass(frozen=True)
class Wiring:
    """The roster: every task's role, by name."""

    roles: Mapping[str, Role]
    mediator: str | None = None
    """Name of the mediator dataset."""

    def asks(self, name: str) -> list[str]:
        """The peers that may be asked to predict for this task."""
        wants = set(self.roles[name].wants)
        return [n for n, role in self.roles.items() if n != name and wants & set(role.publishes)]

    def mediator_columns(self, name: str) -> list[str]:
        """What a task reads of the mediator: its own columns, and those of the peers that it asks
        to predict, which get them with the question."""
        read = {c for peer in (name, *self.asks(name)) for c in self.roles[peer].reads}
        return sorted(read)

    def columns_of_datasets(self) -> dict[str, tuple[str, ...]]:
        """For each dataset that the collective trains on, the columns to read from it."""
        return {dataset: tuple(sorted(users)) for dataset, users in self.users_of_columns().items()}

    def users_of_columns(self) -> dict[str, dict[str, list[str]]]:
        """For each dataset that the collective trains on, the columns to read from it, each with
        the tasks that need it."""
        found: dict[str, dict[str, list[str]]] = {}
        for name, role in self.roles.items():
            read = dict(role.labels)
            if self.mediator is not None and role.tied:
                read[self.mediator] = (*read.get(self.mediator, ()), *role.reads)
            for dataset, columns in read.items():
                for column in {*columns}:
                    found.setdefault(dataset, {}).setdefault(column, []).append(name)
        return found

    @property
    def blocks(self) -> bool:
        """Whether a task of it waits for its peers' first predictions."""
        return any(role.tied and role.blocks_on_miss for role in self.roles.values())


def wire(job: Job, tasks: Mapping[str, Task] | None = None) -> Wiring:
    """The wiring of a job. InputError where a relation does not find its quantities."""
    tasks = tasks or build_tasks(job)
    check_relations(job, tasks)
    roles = {name: _role(job, name, task) for name, task in tasks.items()}
    return Wiring(roles, job.mediator.data if job.mediator else None)


def check_relations(job: Job, tasks: Mapping[str, Task]) -> None:
    """InputError where a relation needs a quantity that no task predicts, or cannot compare what
    they predict."""
    for name, config in job.active_relations.items():
        relation = _checked(config, tasks, f"consistency.{name}", "which no task predicts")
        if relation.labels:
            raise InputError(
                f"consistency.{name}.relation",
                f"needs the label {relation.labels[0]!r}, and labels of the mediator are never "
                "read; expected it under tasks.<name>.relations",
            )
    for name, config in job.consistency.items():
        relation = build_relation(config, f"consistency.{name}")
        if config.weight > 0 and relation.sources:
            _check_domains(job, tasks, name, relation)
    for task_name, task in tasks.items():
        for name, inner in job.tasks[task_name].relations.items():
            where = inner_key(task_name, name)
            relation = _checked(inner, {task_name: task}, where, "which this task does not predict")
            if relation.sources or isinstance(relation, Opposed):
                raise InputError(where, "compares two domains, expected it under 'consistency'")
            if inner.blend_into is not None and inner.blend_into not in task.heads:
                raise InputError(
                    f"{where}.blend_into",
                    f"got {inner.blend_into!r}, expected one of {', '.join(task.heads)}",
                )


def _check_domains(job: Job, tasks: Mapping[str, Task], name: str, relation: Relation) -> None:
    """InputError where a relation that compares the labelled domain, the source, with that of the
    mediator, the target, lacks one of them."""
    why, mediator = f"for consistency.{name}", job.mediator
    if mediator is None:
        raise InputError(f"consistency.{name}", "got no mediator, expected one, the target domain")
    if mediator.consistency_steps == 0:
        raise InputError("mediator.consistency_steps", f"got 0, expected 1 or more {why}")
    if not mediator.with_labels:
        raise InputError(
            "mediator.with_labels", f"got false, expected true {why}, which compares two domains"
        )
    for quantity in relation.sources:
        if frame_of(quantity):
            raise InputError(
                f"consistency.{name}.relation", f"got {quantity!r}, expected one of the first frame"
            )
    for task_name, task in tasks.items():
        read = {c for columns in _labels(job, task_name, task).values() for c in columns}
        for quantity in relation.sources:
            for head in simple_tasks({task_name: task}, [quantity]).values():
                if not (job.tasks[task_name].frozen or read >= set(head.labels)):
                    raise InputError(
                        f"tasks.{task_name}.dedicated",
                        f"got no labels of {quantity!r}, expected some {why}: the source domain",
                    )


def _checked(
    config: RelationConfig, tasks: Mapping[str, Task], where: str, problem: str
) -> Relation:
    """The relation of a job; InputError where these tasks do not fit it."""
    relation = build_relation(config, where)
    for quantity in relation.quantities:
        if not any(task.predicts(quantity) for task in tasks.values()):
            predicted = sorted({q for task in tasks.values() for q in task.quantities})
            raise InputError(
                where, f"needs {quantity!r}, {problem} (predicted: {', '.join(predicted)})"
            )
    try:
        relation.check_tasks(simple_tasks(tasks, relation.quantities))
    except InputError as error:
        raise InputError(f"{where}.relation", str(error)) from None
    return relation


def _role(job: Job, name: str, task: Task) -> Role:
    relations = build_relations(job, name, task)
    config, labels = job.tasks[name], _labels(job, name, task)
    publishes = tuple(q for q in _related(relations) if task.predicts(q))
    inputs = set(inputs_of(task, frames_of(task, publishes))) if relations else set()
    needed = {c for weighted in relations for c in weighted.relation.inputs}
    wants = {
        quantity: min(r.config.start_step for r in relations if quantity in r.relation.quantities)
        for quantity in _related(relations)
        if not task.predicts(quantity)
    }
    learns = any(relation.scale > 0 for relation in relations)
    return Role(
        publishes,
        {} if config.frozen else wants,
        tuple(sorted(inputs | needed)),
        labels,
        job.steps_of(name),
        config.frozen,
        learns,
        job.mediator.steps_per_visit(bool(labels)) if job.mediator else 1.0,
    )


def _labels(job: Job, name: str, task: Task) -> dict[str, tuple[str, ...]]:
    """What a task reads of each labelled dataset: of one that is named for some heads, their
    labels alone, and what relations inside the task need. InputError for a head that the task does
    not have."""
    config, inner = job.tasks[name], build_inner_relations(job, name, task)
    inputs = inputs_of(task, labelled_frames(task, _related(inner)))
    inputs += tuple(c for one in inner for c in one.relation.inputs if c not in inputs)
    if not isinstance(config.dedicated, dict) or config.frozen:
        labels = (c for one in inner for c in one.relation.labels)
        read = tuple(dict.fromkeys([*inputs, *task.labels, *labels]))
        return dict.fromkeys(job.labels_of(name), read)
    columns: dict[str, list[str]] = {}
    for head, dataset in config.dedicated.items():
        if head not in task.heads:
            raise InputError(
                f"tasks.{name}.dedicated.{head}",
                f"no such head, expected one of {', '.join(task.heads)}",
            )
        columns.setdefault(dataset, [*inputs]).extend(task.heads[head].labels)
    for one in inner:
        for label in one.relation.labels:
            if not any(label in read for read in columns.values()):
                raise InputError(
                    inner_key(name, one.name),
                    f"needs the label {label!r}, which tasks.{name}.dedicated names no dataset of",
                )
    return {dataset: tuple(dict.fromkeys(read)) for dataset, read in columns.items()}


def _related(relations: Sequence[WeightedRelation]) -> list[str]:
    return sorted({q for weighted in relations for q in weighted.relation.quantities})
