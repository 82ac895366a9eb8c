"""Counting what happens in the loop: means over a chunk of steps, and totals over the run."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from taskray.loop.interfaces import PeerPredictions
from taskray.loop.metric_key import (
    DATA_WAIT_FRACTION,
    REPLACED_BY_SUPERVISED,
    SKIPPED_CONSISTENCY_STEPS,
    STEPS_PER_SECOND,
    HitRate,
    MetricKey,
    Staleness,
)


@dataclass
class Edge:
    """One edge consumer <- producer: how often it was looked up, used, and how old it was."""

    lookups: int = 0
    hits: int = 0
    steps_sum: float = 0.0
    steps_max: int = 0
    seconds_sum: float = 0.0
    bound: int | None = None
    """The largest staleness, in the producer's steps, that the mediator's window lets through."""
    misses: dict[str, int] = field(default_factory=dict)
    """Reason -> look-ups without a usable prediction."""

    def hit(self, staleness_steps: int, age_seconds: float) -> None:
        self.lookups += 1
        self.hits += 1
        self.steps_sum += staleness_steps
        self.steps_max = max(self.steps_max, staleness_steps)
        self.seconds_sum += age_seconds

    def miss(self, reason: str) -> None:
        self.lookups += 1
        self.misses[reason] = self.misses.get(reason, 0) + 1

    def add(self, other: Edge) -> None:
        """Count what another edge counted, too."""
        self.lookups += other.lookups
        self.hits += other.hits
        self.steps_sum += other.steps_sum
        self.steps_max = max(self.steps_max, other.steps_max)
        self.seconds_sum += other.seconds_sum
        self.bound = other.bound if self.bound is None else self.bound
        self.misses = dict(Counter(self.misses) + Counter(other.misses))

    def summary(self) -> dict[str, float]:
        """``steps_mean``, ``steps_max``, ``seconds_mean`` over the hits, and ``hit_rate``."""
        hits = max(1, self.hits)
        return {
            "steps_mean": self.steps_sum / hits,
            "steps_max": float(self.steps_max),
            "seconds_mean": self.seconds_sum / hits,
            "hit_rate": self.hits / max(1, self.lookups),
        }


@dataclass
class Totals:
    """Counts since the run began; they are part of the checkpoint.

    ``supervised_steps`` and ``consistency_steps`` are the turns of the job's alternation. Of the
    consistency steps, those that gave no gradient were spent on labels
    (``replaced_by_supervised``) or, in a task without labels, ``skipped``: no peer had a
    prediction, or the task only teaches.
    """

    supervised_steps: int = 0
    consistency_steps: int = 0
    skipped_consistency_steps: int = 0
    replaced_by_supervised: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    misses: dict[str, int] = field(default_factory=dict)
    edges: dict[str, Edge] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        edges = {peer: {**vars(e), "misses": dict(e.misses)} for peer, e in self.edges.items()}
        return {**vars(self), "misses": dict(self.misses), "edges": edges}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Totals:
        edges = {peer: Edge(**values) for peer, values in state["edges"].items()}
        return cls(**{**state, "edges": edges})


class Meter:
    """Means over the chunk of steps since the last report, and the run's totals. Tensors are added
    up where they are and read once, at the end of the chunk."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a chunk: what happens between two chunks is not training time."""
        self.wait_seconds = 0.0
        self._sums: dict[MetricKey, Tensor | float] = defaultdict(float)
        self._counts: dict[MetricKey, int] = defaultdict(int)
        self._edges: dict[str, Edge] = defaultdict(Edge)
        self._since, self._step = time.perf_counter(), step

    def add(self, key: MetricKey, value: Tensor | float) -> None:
        """One value of a quantity whose mean is reported."""
        self._sums[key] = self._sums[key] + value
        self._counts[key] += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting."""
        since = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - since

    def count(self, found: PeerPredictions) -> None:
        """Count what a look-up found, edge by edge."""
        for edges in (self._edges, self.totals.edges):
            for prediction in {p.task: p for p in found.by_quantity.values()}.values():
                edge = edges.setdefault(prediction.task, Edge())
                edge.hit(prediction.staleness_steps, prediction.age_seconds)
            for peer, reason in found.misses.items():
                edges.setdefault(peer, Edge()).miss(reason)
            for peer in found.bounds.keys() & edges.keys():
                edges[peer].bound = found.bounds[peer]
        for reason in found.misses.values():
            self.miss(reason)

    def miss(self, reason: str) -> None:
        """Count a prediction that could not be used."""
        self.totals.misses[reason] = self.totals.misses.get(reason, 0) + 1

    def step(self, consistent: bool, learnt: bool, labelled: bool) -> None:
        """Count a step: whether it was a turn of the mediator, whether peers gave it a gradient,
        and whether the task has labels, on which it spends a turn that did not."""
        totals = self.totals
        if not consistent:
            totals.supervised_steps += 1
            return
        totals.consistency_steps += 1
        totals.replaced_by_supervised += labelled and not learnt
        totals.skipped_consistency_steps += not labelled and not learnt

    def end(self, step: int) -> dict[str, float]:
        """The means of the chunk that ends with ``step`` steps made; adds up the totals."""
        seconds = time.perf_counter() - self._since
        values = {str(key): float(total) / self._counts[key] for key, total in self._sums.items()}
        for peer, edge in self._edges.items():
            summary = edge.summary()
            values[str(HitRate(peer))] = summary.pop("hit_rate")
            if edge.hits:
                values |= {str(Staleness(peer, key)): value for key, value in summary.items()}
        self.totals.train_seconds += seconds
        self.totals.wait_seconds += self.wait_seconds
        values[STEPS_PER_SECOND] = (step - self._step) / seconds if seconds else 0.0
        values[DATA_WAIT_FRACTION] = self.wait_seconds / seconds if seconds else 0.0
        values[SKIPPED_CONSISTENCY_STEPS] = float(self.totals.skipped_consistency_steps)
        values[REPLACED_BY_SUPERVISED] = float(self.totals.replaced_by_supervised)
        return values
