"""A step of each task on a few rows, in this process: what would fail in a run's first step, how
long a step takes, and how much memory it needs.

The steps are those of the training loop itself. Only its data (one batch, again and again) and its
peers (their predictions on that batch, with the weights they begin with) are made up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from taskray.data.storage.source import DatasetInfo
from taskray.data.streams.batch import Batch
from taskray.data.streams.rows import CorruptRows
from taskray.errors import InputError, TrainingError, naming_errors
from taskray.job.config import Job
from taskray.loop.assembly import (
    build_inner_relations,
    build_learned,
    build_relations,
    seed_of,
)
from taskray.loop.interfaces import PeerPredictions, Prediction
from taskray.loop.network import frames_of
from taskray.loop.trainer import Trainer
from taskray.loop.wiring import Wiring, wire
from taskray.runtime.member import choose_device, load_initial
from taskray.tasks.task import Task

ROWS = 2
"""Rows of the first step, which finds errors."""
LONGEST = 1.0
"""Seconds that a step on a full batch may take here; a longer one is computed from two rows."""


@dataclass
class Measured:
    """The steps of one task."""

    seconds: dict[str, float] = field(default_factory=dict)
    """``labels`` and ``consistency`` -> seconds of one step on a batch of the job's size."""
    computed: bool = False
    """Whether the seconds are those of two rows, times the rows of a batch over two."""
    kept_bytes: int = 0
    """What one such step keeps for its backward pass."""


@dataclass
class Trial:
    """What the steps of all tasks gave."""

    measured: dict[str, Measured]
    problems: list[InputError]


class OneBatch:
    """An endless stream of one batch; ``loop.interfaces.WindowStream``."""

    def __init__(self, dataset: str, batch: Batch) -> None:
        self._rows, self.corrupt = batch, CorruptRows(DatasetInfo(dataset, "", ROWS, {}))
        self.resize(ROWS)

    def resize(self, rows: int) -> None:
        """Let the batch have so many rows: those that there are, repeated."""
        there = torch.arange(rows) % len(next(iter(self._rows.tensors.values())))
        tensors = {c: values[there] for c, values in self._rows.tensors.items()}
        self.batch = replace(self._rows, tensors=tensors, id=0)

    def next(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def follow(self, window: int) -> None: ...

    def position(self) -> None: ...

    def close(self) -> None: ...


class Predicted:
    """Peers whose predictions on the batch are there; ``loop.interfaces.Peers``."""

    def __init__(self) -> None:
        self.found: dict[str, Prediction] = {}

    def ask(self, batch: Batch, step: int, use: int) -> None: ...

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None: ...

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        there = torch.arange(len(next(iter(batch.tensors.values())))) % ROWS
        return PeerPredictions(
            {q: replace(p, tensors={q: p.tensors[q].cpu()[there]}) for q, p in self.found.items()}
        )

    def stepped(self, step: int) -> None: ...


def try_steps(
    job: Job, tasks: Mapping[str, Task], rows: Mapping[str, Batch], threads: Mapping[str, int]
) -> Trial:
    """Let every task make a step on labels and a consistency step, where the job has them.

    Args:
        job: of the run.
        tasks: its tasks.
        rows: two rows of each dataset that the run trains on.
        threads: of each task.
    """
    job = _both_kinds(job)
    wiring = wire(job, tasks)
    trial = Trial({name: Measured() for name in tasks}, [])
    trainers = {name: _trainer(job, name, tasks[name], wiring, rows) for name in tasks}
    predictions: dict[str, dict[str, Tensor]] = {}
    for name, trainer in trainers.items():
        if trainer.published and wiring.mediator is not None:
            with _collecting(trial, name, trainer), _threads(threads.get(name)):
                frames = frames_of(trainer.task, trainer.published)
                batch = OneBatch(wiring.mediator, rows[wiring.mediator]).batch
                predictions[name] = trainer.network.infer(batch, frames)
    for name, trainer in trainers.items():
        assert isinstance(trainer.peers, Predicted)
        for quantity in wiring.roles[name].wants:
            for peer, found in predictions.items():
                if peer != name and quantity in found:
                    trainer.peers.found[quantity] = Prediction(peer, found, 0, 0, 0.0)
    for name, trainer in trainers.items():
        if name in predictions or not trainer.published:  # else it failed above
            with _threads(threads.get(name)):
                _measure(job, name, trainer, trial)
    return trial


def _both_kinds(job: Job) -> Job:
    """The job with a step on labels, then a consistency step, and every relation begun."""
    begun = {"start_step": 0, "warmup_steps": 0}
    tasks = {}
    for n, t in job.tasks.items():
        inner = {r: config.model_copy(update=begun) for r, config in t.relations.items()}
        tasks[n] = t.model_copy(update={"compile": False, "relations": inner})
    relations = {n: r.model_copy(update=begun) for n, r in job.consistency.items()}
    changed: dict[str, Any] = {"tasks": tasks, "consistency": relations}
    if job.mediator is not None and job.mediator.consistency_steps:
        one_each = {"supervised_steps": 1, "consistency_steps": 1}
        changed["mediator"] = job.mediator.model_copy(update=one_each)
    return job.model_copy(update=changed)


def _trainer(job: Job, name: str, task: Task, wiring: Wiring, rows: Mapping[str, Batch]) -> Trainer:
    role, relations = wiring.roles[name], build_relations(job, name, task)
    inner = build_inner_relations(job, name, task)
    learned = build_learned(job, name, task, [*relations, *inner])
    load_initial(job, name, learned)

    def stream(dataset: str, columns: Any) -> OneBatch:
        tensors = rows[dataset].tensors
        return OneBatch(dataset, Batch({c: tensors[c] for c in columns}))

    mediator = wiring.mediator if role.tied and not role.frozen else None
    trainer = Trainer(
        name,
        job,
        task,
        learned,
        seed=seed_of(job, name),
        relations=relations,
        inner_relations=inner,
        published=role.publishes,
        dedicated=[stream(dataset, columns) for dataset, columns in role.labels.items()],
        mediator=stream(mediator, wiring.mediator_columns(name)) if mediator else None,
        peers=Predicted(),
        device=choose_device(job.tasks[name].gpus),
    )
    trainer.total_steps = 1 << 30  # the last step of a short job is not the end here
    return trainer


def _measure(job: Job, name: str, trainer: Trainer, trial: Trial) -> None:
    """A step of each kind on two rows, then one on a full batch, timed."""
    measured = trial.measured[name]
    sizes = {"labels": job.tasks[name].batch_size} if trainer.supervised.streams else {}
    if job.mediator is not None and trainer.turn(1) is not None:
        sizes["consistency"] = job.mediator.batch_size
    for kind, size in sizes.items():
        streams = trainer.supervised.streams if kind == "labels" else [trainer.mediator]
        kept = _Kept(trainer)
        with _collecting(trial, name, trainer, kind):
            with kept.counting():
                seconds = _step(trainer, kind) * size / ROWS
            measured.kept_bytes = max(measured.kept_bytes, kept.bytes * size // ROWS)
            if seconds <= LONGEST:
                for stream in streams:
                    assert isinstance(stream, OneBatch)
                    stream.resize(size)
                seconds = _step(trainer, kind)
            else:
                measured.computed = True
            measured.seconds[kind] = seconds


def _step(trainer: Trainer, kind: str) -> float:
    """The seconds of one step of this kind."""
    trainer.steps_made = 0 if kind == "labels" else 1
    trainer.start_clock()  # what an earlier step has counted before it failed is left out
    since = time.perf_counter()
    trainer.train(1)  # its report waits for the device
    return time.perf_counter() - since


class _Kept:
    """Counts the bytes that a step keeps for its backward pass, besides the weights."""

    def __init__(self, trainer: Trainer) -> None:
        weights = [*trainer.learned.parameters(), *trainer.learned.buffers()]
        self._known = {w.untyped_storage().data_ptr() for w in weights}
        self.bytes = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda kept: kept):
            yield

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def _collecting(trial: Trial, name: str, trainer: Trainer, kind: str = "") -> Iterator[None]:
    """An error of the block becomes a problem that names the task and the kind of its step."""
    what = {"": "its prediction", "labels": "a step on its labels"}.get(kind, "a consistency step")
    try:
        with naming_errors(name, lambda: trainer.steps_made):
            yield
    except TrainingError as error:
        trial.problems.append(InputError(f"tasks.{name}", f"{what} fails: {error.reason}"))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads, as in the run."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
