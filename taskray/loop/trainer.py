"""The training loop of one task: the heart of taskray.

    labels ────▶ SUPERVISED STEP   forward ─▶ task loss ─▶ backward ─▶ update
                   waits for: nothing (batches are assembled ahead)

    mediator ──▶ CONSISTENCY STEP  forward ─▶ publish ─────────────────────────▶ cache ─▶ peers
                   │               waits for: nothing (sent in the background)     │
                   ▼                                                               │
                 relations(live prediction, peers' stale predictions) ◀─ collect ──┘
                   │               waits for: an answer that was asked for a step ago; for a peer
                   ▼               only where the job or a task without labels waits
                 backward ─▶ update;   no peer found: a supervised step in its place
                 (`mediator.with_labels`: a supervised step's loss is part of every update)

Gradients never leave the task. The same loop runs inside a Ray actor and in one process: it
knows its data only as *streams* and the other tasks only as *peers*.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from taskray.data.streams.augment import augment
from taskray.data.streams.batch import Batch
from taskray.data.streams.rows import count_corrupt
from taskray.errors import TaskrayError, naming_errors
from taskray.job.config import Job
from taskray.loop.ahead import Ahead
from taskray.loop.alternation import Alternation
from taskray.loop.consistency import WeightedRelation, consistency_losses
from taskray.loop.inner import InnerRelation
from taskray.loop.interfaces import NoPeers, PeerPredictions, Peers, Stream, WindowStream
from taskray.loop.learned import Learned
from taskray.loop.meters import Meter
from taskray.loop.metric_key import (
    GRAD_NORM,
    LR,
    ConsistencyLoss,
    MetricKey,
    Plain,
    SupervisedLoss,
)
from taskray.loop.network import Network, frames_of
from taskray.loop.optimization import NotFinite, Optimization
from taskray.loop.report import ChunkReport
from taskray.loop.state import restore, state_of
from taskray.loop.supervised import Supervised
from taskray.loop.terms import sum_of
from taskray.relations.relation import at_source
from taskray.tasks.task import Task


class Trainer:
    """Trains one task; see :meth:`step` for the heart and :meth:`train` for its repetition."""

    def __init__(
        self,
        name: str,
        job: Job,
        task: Task,
        learned: Learned,
        *,
        seed: int,
        relations: Sequence[WeightedRelation] = (),
        inner_relations: Sequence[InnerRelation] = (),
        published: Sequence[str] = (),
        dedicated: Sequence[Stream] = (),
        mediator: WindowStream | None = None,
        peers: Peers | None = None,
        device: str = "cpu",
    ) -> None:
        self.name, self.job, self.task, self.config = name, job, task, job.tasks[name]
        self.total_steps = job.steps_of(name)
        self.learned = learned.to(device)
        self.network = Network(task, learned.network, self.config, device)
        self.optimization = Optimization(learned, self.config.optimizer, self.total_steps)
        self.relations, self.published = relations, tuple(published)
        self.mediator = mediator
        self.peers: Peers = peers or NoPeers()
        self.ahead = Ahead(mediator, self.peers) if mediator is not None else None
        self.random = torch.Generator().manual_seed(seed)
        self.with_labels = job.mediator is not None and job.mediator.with_labels
        self.alternation = Alternation(job, relations, labelled=bool(dedicated))
        self.steps_made = 0
        self.meter = Meter()
        self.supervised = Supervised(
            self.network, self.config, dedicated, self.random, self.meter, inner_relations
        )

    # ---- one step -------------------------------------------------------------------------

    def step(self) -> Iterator[None]:
        """Make one step, in two halves: the first ends when the task has published. In one
        process all tasks publish before any of them reads."""
        now, ahead = self.steps_made, self.turn(self.steps_made)
        if ahead is not None:
            with self.meter.waiting():
                batch = ahead.take(now)
            live = self._live_prediction(batch)
            self.peers.publish(batch, now, {q: live[q].detach() for q in self.published})

        yield

        learnt = False
        if ahead is not None:
            with self.meter.waiting():
                found = ahead.collect(batch, now)
            self.meter.count(found)
        if (coming := self.turn(now + 1)) is not None:
            with self.meter.waiting():  # after `collect`, which may have moved the window on
                coming.ask(now, now + 1)
        if ahead is not None:
            learnt = self._learn_from_peers(batch, live, found)
        else:
            self._learn_from_labels()

        labelled = bool(self.supervised.streams)
        self.meter.step(consistent=ahead is not None, learnt=learnt, labelled=labelled)
        self.steps_made += 1
        self.peers.stepped(self.steps_made)

    def train(self, num_steps: int) -> ChunkReport:
        """Make so many steps, or those up to the task's last one; returns :meth:`report`.

        Raises TrainingError with task, step and cause; nothing else leaves the loop.
        """
        end = min(self.total_steps, self.steps_made + num_steps)
        while self.steps_made < end:
            with self.naming_errors():
                for _ in self.step():
                    pass
        return self.report()

    def turn(self, step: int) -> Ahead | None:
        """The mediator, if the step is a consistency step; None: it is a supervised one, or the
        task has ended."""
        consistent = step < self.total_steps and self.alternation.is_consistency_step(step)
        return self.ahead if consistent else None

    # ---- the parts of a step --------------------------------------------------------------

    def _live_prediction(self, batch: Batch) -> dict[str, Tensor]:
        """On a mediator batch, photometrically augmented for this task alone."""
        frames = frames_of(self.task, self.published)
        if self.alternation.teacher_only:  # must not learn the mediator's statistics either
            return self.network.infer(batch, frames)
        own = augment(batch, self.config.augment, self.random, labelled=False)
        return self.network.predict(own, frames)

    def _learn_from_peers(
        self, batch: Batch, live: Mapping[str, Tensor], found: PeerPredictions
    ) -> bool:
        """Descend on the relations, and with ``mediator.with_labels`` on labels, too. Where there
        is nothing to be consistent with, descend on labels alone, if there are any, and return
        False."""
        labels = self.supervised.losses(self.steps_made) if self.with_labels else {}
        source = {at_source(q): p for q, p in self.supervised.predictions.items()}
        stale = {q: self.network.move(p.tensors[q]) for q, p in found.by_quantity.items()}
        known = {**stale, **live, **source}
        batch = self.network.to_device(batch)
        losses = consistency_losses(self.relations, known, batch, self.steps_made)
        if not losses.weighted:
            self._learn_from_labels(labels)
            return False
        both: dict[MetricKey, dict[str, Tensor]] = {ConsistencyLoss(): losses.weighted}
        if labels:
            both[SupervisedLoss()] = labels
        try:
            self._descend(both, checked=True, opposed=losses.opposed)
        except NotFinite:
            own = [*live.values(), *labels.values()]
            if not (found.by_quantity and all(bool(v.isfinite().all()) for v in own)):
                raise
            # Our own prediction is finite, so the loss that is not comes from a peer.
            self.meter.miss("unusable")
            self._learn_from_labels()
            return False
        for key, value in losses.values.items():
            self.meter.add(key, value)
        return True

    def _learn_from_labels(self, losses: Mapping[str, Tensor] | None = None) -> None:
        """Descend on the task's losses: those given, else those on the next batch. A task without
        labels does nothing."""
        if not self.supervised.streams:
            return
        losses = losses or self.supervised.losses(self.steps_made)
        if not losses:
            raise TaskrayError("no labels and no consistency: nothing to train on")
        self._descend({SupervisedLoss(): losses}, checked=self.network.device.type == "cpu")

    def _descend(
        self,
        losses: Mapping[MetricKey, Mapping[str, Tensor]],
        checked: bool,
        opposed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One update on named losses, by the key of their sum, and of opponents on theirs."""
        labels, added = losses.get(SupervisedLoss(), {}), losses.get(ConsistencyLoss(), {})
        total, norm = self.optimization.descend(labels, self.steps_made, checked, opposed, added)
        if labels:
            self.learned.weighting.stepped(lambda: self.supervised.again(self.steps_made))
        for key, named in losses.items():
            self.meter.add(key, total if len(losses) == 1 else sum_of(named))
        self.meter.add(Plain(GRAD_NORM), norm)

    # ---- reports and checkpoints ----------------------------------------------------------

    def report(self) -> ChunkReport:
        """What happened since the last report."""
        values = self.meter.end(self.steps_made)
        values[LR] = self.optimization.learning_rate(self.steps_made)
        with self.naming_errors():
            for name, value in values.items():
                if not math.isfinite(value):
                    raise TaskrayError(f"{name} is not finite")
        self.start_clock()
        totals = copy.deepcopy(self.meter.totals)
        corrupt = count_corrupt([stream.corrupt for stream in self._streams])
        warnings: tuple[str, ...] = ()
        if values.get(GRAD_NORM) == 0:  # read at the end of a chunk: a step must not wait for it
            warnings = (f"task {self.name!r} learns nothing: its gradient is 0 in every step",)
        return ChunkReport(self.name, self.steps_made, values, totals, corrupt, warnings)

    def start_clock(self) -> None:
        """Begin a chunk: what happens between two chunks is not training time."""
        self.meter.start(self.steps_made)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the weights are loaded apart."""
        restore(self, state)
        self.start_clock()

    def close(self) -> None:
        """End the threads of the streams."""
        for stream in self._streams:
            stream.close()

    @property
    def _streams(self) -> list[Stream]:
        return [*self.supervised.streams, *([self.mediator] if self.mediator else [])]

    def naming_errors(self) -> AbstractContextManager[None]:
        """Any error of the block leaves it as one that names the task and the step."""
        return naming_errors(self.name, lambda: self.steps_made)
