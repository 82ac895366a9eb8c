"""Counting what happens in the loop: means over a chunk, and totals over the run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Edge:
    """One edge consumer <- producer: how often it was asked for, used, and how old it was."""

    lookups: int = 0
    hits: int = 0
    steps_sum: float = 0.0
    steps_max: int = 0
    seconds_sum: float = 0.0

    def hit(self, staleness_steps: int, age_seconds: float) -> None:
        self.lookups += 1
        self.hits += 1
        self.steps_sum += staleness_steps
        self.steps_max = max(self.steps_max, staleness_steps)
        self.seconds_sum += age_seconds

    def add(self, other: Edge) -> None:
        self.lookups += other.lookups
        self.hits += other.hits
        self.steps_sum += other.steps_sum
        self.steps_max = max(self.steps_max, other.steps_max)
        self.seconds_sum += other.seconds_sum

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
    """Counts since the run began; they are part of the checkpoint."""

    supervised_steps: int = 0
    consistency_steps: int = 0
    skipped_consistency_steps: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    misses: dict[str, int] = field(default_factory=dict)
    edges: dict[str, Edge] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        plain = dict(vars(self))
        plain["misses"] = dict(self.misses)
        plain["edges"] = {peer: dict(vars(edge)) for peer, edge in self.edges.items()}
        return plain

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Totals:
        edges = {peer: Edge(**values) for peer, values in state["edges"].items()}
        return cls(**{**state, "edges": edges})


class ChunkMeter:
    """Means over one chunk. Tensors are added up where they are and read once, at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.edges: dict[str, Edge] = defaultdict(Edge)
        self.wait_seconds = 0.0

    def add(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums[name] + value
        self.counts[name] += 1

    def means(self) -> dict[str, float]:
        values = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        for peer, edge in self.edges.items():
            for key, value in edge.summary().items():
                name = f"hit_rate/{peer}" if key == "hit_rate" else f"staleness/{peer}/{key}"
                if key == "hit_rate" or edge.hits:
                    values[name] = value
        return values
