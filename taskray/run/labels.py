"""What is checked of the data of a run before its first step: labels from which a task can learn,
metres that are metres, batches that fit.

The labels are read from the stored rows, in order, up to the first valid one: for a good dataset
that is the first row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from taskray.data.readers.reader import Sample
from taskray.data.storage.codec import ERROR
from taskray.data.storage.parquet import columns_of
from taskray.data.storage.source import open_source
from taskray.data.streams.batch import Batch
from taskray.data.streams.rows import rows_of, to_batch
from taskray.errors import InputError
from taskray.job.config import DataConfig, Job
from taskray.loop.evaluation import measured_columns
from taskray.loop.wiring import wire
from taskray.run.requirements import used_columns
from taskray.schema import quantity_of
from taskray.tasks.task import LabelValues, Task

ROWS_EACH = 16
"""Rows that are looked at together."""
FARTHEST_MEDIAN = 100.0
"""Metres. A larger median distance is more likely in another unit."""


def check_batch_sizes(job: Job, rows: Mapping[str, int]) -> None:
    """Raise InputError for a batch that is larger than its dataset; ``rows`` by dataset."""
    sizes = [
        (f"tasks.{name}.batch_size", config.batch_size, dataset)
        for name, config in job.tasks.items()
        for dataset in job.labels_of(name)
    ]
    if job.mediator is not None:
        sizes.append(("mediator.batch_size", job.mediator.batch_size, job.mediator.data))
    for key, size, dataset in sizes:
        if dataset in rows and size > rows[dataset]:
            raise InputError(
                key, f"got {size}, expected at most the {rows[dataset]} rows of data.{dataset}"
            )


def check_values(
    job: Job, tasks: Mapping[str, Task], paths: Mapping[str, Path], samples: Collection[str] = ()
) -> list[str]:
    """Look at the labels of every stored dataset (name -> folder); returns warnings.

    Raises InputError where a task trains on a dataset that has no valid value of one of its
    labels. ``samples`` are the datasets of which the folder has a few rows only: there it is a
    warning, as it is for a dataset on which a task is measured.
    """
    wiring, used = wire(job, tasks), used_columns(job, tasks)
    warnings: list[str] = []
    for name, folder in paths.items():
        there = columns_of(folder)
        trained = {
            t: [c for c in role.labels[name] if c in tasks[t].labels]
            for t, role in wiring.roles.items()
            if name in role.labels
        }
        measured = {
            t: [c for c in measured_columns(task, there) if c in task.labels]
            for t, task in tasks.items()
            if name in job.evaluation.data.values()
        }
        read = [c for c in used.get(name, ()) if c in there]
        distances = [c for c in read if quantity_of(c) in ("depth", "points")]
        wanted = {c for columns in (*trained.values(), *measured.values()) for c in columns}
        wanted |= {distances[0]} if distances else set()
        if not wanted:
            continue
        looks = [Look(t, tasks[t], columns, True) for t, columns in trained.items()]
        looks += [
            Look(t, tasks[t], columns, False)
            for t, columns in measured.items()
            if columns != trained.get(t)
        ]
        for number, batch in enumerate(batches_of(job.data[name], folder, name, sorted(wanted))):
            if number == 0 and distances:
                warnings += _unit_problem(name, distances[0], batch.tensors[distances[0]])
            for look in looks:
                look.at(batch)
            if not any(look.pending for look in looks):
                break
        for look in looks:
            for text in look.problems():
                if look.trains and name not in samples:
                    raise InputError(f"data.{name}", text)
                of = "in its first rows, " if name in samples else ""
                warnings.append(f"data.{name}: {of}{text}")
    return warnings


@dataclass
class Seen:
    """Of one label: whether a valid value was seen, and the range of the values seen so far."""

    expected: str
    valid: bool = False
    low: float = math.inf
    high: float = -math.inf

    def add(self, found: LabelValues) -> None:
        self.valid = self.valid or bool(found.valid.any())
        values = found.values[torch.isfinite(found.values)]
        if not self.valid and values.numel():
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))


@dataclass
class Look:
    """A look at the labels that one task learns from (``trains``) or is measured on."""

    name: str
    task: Task
    columns: Sequence[str]
    trains: bool
    seen: dict[str, Seen] = field(default_factory=dict)

    @property
    def pending(self) -> bool:
        """Whether a label had no valid value yet."""
        return any(not seen.valid for seen in self.seen.values())

    def at(self, batch: Batch) -> None:
        """Look at the labels of some rows."""
        if not self.columns:
            return
        for found in self.task.label_values({c: batch.tensors[c] for c in self.columns}):
            self.seen.setdefault(found.label, Seen(found.expected)).add(found)

    def problems(self) -> Iterator[str]:
        """A text for each label without a valid value."""
        for label, seen in self.seen.items():
            if not seen.valid:
                found = f"{seen.low:.3g} to {seen.high:.3g}" if seen.low <= seen.high else "none"
                yield (
                    f"no label {label!r} is valid for {self._user_of(label)}: "
                    f"expected {seen.expected}, found {found}"
                )

    def _user_of(self, label: str) -> str:
        """The task, and which of several heads it is."""
        heads = [head for head, part in self.task.heads.items() if label in part.labels]
        several = len(self.task.heads) > 1
        return f"head {heads[0]!r} of task {self.name!r}" if several else f"task {self.name!r}"


def _unit_problem(name: str, column: str, values: Tensor) -> Iterator[str]:
    distance = values[..., :3].norm(dim=-1) if quantity_of(column) == "points" else values
    distance = distance[torch.isfinite(distance) & (distance > 0)]
    median = float(distance.median()) if distance.numel() else 0.0
    if median > FARTHEST_MEDIAN:
        yield (
            f"data.{name}: the median of {column!r} is {median:.4g}, expected metres "
            f"(at most {FARTHEST_MEDIAN:g}); is it in millimetres?"
        )


def batches_of(
    config: DataConfig, folder: Path, name: str, columns: Sequence[str]
) -> Iterator[Batch]:
    """The readable rows of a stored dataset in order, ``ROWS_EACH`` at a time. The others are
    counted and reported by the training."""
    streamed = config.model_copy(update={"materialize": "never"})
    source = open_source(streamed, folder, columns, use_ray=False, name=name).open()
    rows: list[Sample] = []
    try:
        for row in rows_of(source, more=False):
            if not str(row[ERROR]):
                rows.append(row)
            if len(rows) == ROWS_EACH:
                yield to_batch(rows, columns)
                rows = []
        if rows:
            yield to_batch(rows, columns)
    finally:
        source.close()
