"""What tasks and the prediction cache say to each other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.loop.interfaces import Prediction
from taskray.loop.staleness import Version

Arrays = Mapping[str, np.ndarray]

NOT_ANNOUNCED = "the task has not announced itself"
"""The answer of a cache that was restarted: the publisher announces itself and publishes again."""


@dataclass(frozen=True)
class Publication:
    """A task's prediction on one mediator batch, on its way to the cache."""

    task: str
    batch: int
    step: int
    """Of the task, when it predicted."""
    produced_at: float
    """By ``time.time``."""
    arrays: Arrays
    """By quantity; on an actor call they travel by value."""
    window: int = 0
    """Mediator window of the batch (``Batch.window``)."""

    @classmethod
    def of(
        cls, task: str, batch: Batch, step: int, prediction: Mapping[str, Tensor], dtype: str
    ) -> Publication:
        """A prediction made just now, as arrays of ``dtype`` (``float16`` or ``float32``)."""
        assert batch.id is not None
        to = {"float16": torch.float16, "float32": torch.float32}[dtype]
        arrays = {q: p.to("cpu", to).contiguous().numpy() for q, p in prediction.items()}
        return cls(task, batch.id, step, time.time(), arrays, batch.window)


@dataclass(frozen=True)
class Query:
    """What a task asks: its peers' predictions of these quantities on a mediator batch."""

    consumer: str
    batch: int
    quantities: tuple[str, ...]
    now: int = 0
    """The step it is at."""
    use: int = 0
    """The step at which it will use the answer."""
    window: int = 0
    """The mediator window it is in."""
    walk: int = 0
    """How often it has walked that window before."""
    visit: int = 0
    """The batch's number in the mediator's order (``Batch.visit``)."""
    since: int = -1
    """Predictions made in an earlier window do not count: so the window bounds staleness, however
    soon the dataset comes round again."""


@dataclass(frozen=True)
class Found:
    """One peer's answer to a look-up: a usable prediction, or why there is none."""

    quantities: tuple[str, ...]
    miss: str | None = None
    arrays: Any = None
    version: Version | None = None
    staleness_steps: int = 0
    server: Any = None
    may_come: bool = False
    """Whether the peer still predicts and has not gone past the consumer's window: where there is
    no prediction on this batch, there may be one soon."""
    has_begun: bool = True
    """Whether the peer has come to the mediator yet."""

    @property
    def made_at(self) -> float:
        return self.version.produced_at if self.version else 0.0

    def prediction(self, task: str, tensors: dict[str, Tensor]) -> Prediction:
        """As the loop wants it, once the arrays are here as tensors."""
        assert self.version is not None
        age = max(0.0, time.time() - self.version.produced_at)
        step = self.version.producer_step
        return Prediction(task, tensors, step, self.staleness_steps, age)


def newest(found: Mapping[str, Found], wanted: Iterable[str]) -> dict[str, str]:
    """For each wanted quantity the task whose prediction was made last."""
    chosen: dict[str, str] = {}
    for task, peer in found.items():
        for quantity in set(wanted) & set(peer.quantities):
            best = chosen.get(quantity)
            if best is None or peer.made_at > found[best].made_at:
                chosen[quantity] = task
    return chosen


@dataclass(frozen=True)
class Answer:
    """What a look-up gives: each peer's prediction, and the farthest window a peer has come to."""

    found: dict[str, Found]
    front: int
    refused: tuple[str, ...] = ()
    """Why predictions that came with the query were refused."""
    through: int | None = None
    """The last window that all its peers in training have walked once; None: no matter."""
