"""The interfaces that the training loop knows: *streams* of data, and *peers*.

The loop does not know whether Ray or one process is behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.data.streams.rows import CorruptRows


class Stream(Protocol):
    """An endless sequence of batches, prefetched, whose position can be saved."""

    def next(self) -> Batch:
        """The next batch; waits only if prefetching has fallen behind."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position: plain values. A stream loaded with it gives the same batches next."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    @property
    def corrupt(self) -> CorruptRows:
        """The rows that were skipped so far because they could not be read."""
        ...

    def close(self) -> None: ...


class WindowStream(Stream, Protocol):
    """The mediator's numbered batches."""

    def follow(self, window: int) -> None:
        """Go to a window of the mediator, if it is a later one, with the next batch."""
        ...

    def position(self) -> Place | None:
        """The place that comes next; None at the very beginning."""
        ...


@dataclass(frozen=True)
class Prediction:
    """A peer's prediction on one mediator batch, with the version of the model that made it."""

    task: str
    tensors: dict[str, Tensor]
    producer_step: int
    staleness_steps: int
    """Training steps of the producer since then, at the time of the look-up."""
    age_seconds: float


@dataclass(frozen=True)
class PeerPredictions:
    """What a look-up found."""

    by_quantity: dict[str, Prediction] = field(default_factory=dict)
    misses: dict[str, str] = field(default_factory=dict)
    """Peer task -> ``absent``, ``stale`` (beyond the bound), ``timeout``, ``unavailable`` (the
    cache did not answer, or the bytes are lost)."""
    window: int = 0
    """The mediator window to be in."""
    bounds: dict[str, int] = field(default_factory=dict)
    """Peer task -> the largest staleness, in its steps, that the window lets through."""


class Peers(Protocol):
    """The rest of the collective, as one task sees it. No method raises because of a peer."""

    def ask(self, batch: Batch, step: int, use: int) -> None:
        """Start to look up the peers' predictions on a batch; the task is at ``step`` and needs
        them at step ``use``. Returns at once."""
        ...

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        """Hand the task's own prediction to its peers. Returns at once."""
        ...

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        """What the look-up found. Waits for an answer that is late, and where a peer is waited
        for (``staleness.on_stale: wait``, or a task without labels)."""
        ...

    def stepped(self, step: int) -> None:
        """The task has made its step number ``step - 1``. Returns at once."""
        ...


class NoPeers:
    """A task without relations."""

    def ask(self, batch: Batch, step: int, use: int) -> None: ...

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None: ...

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        return PeerPredictions()

    def stepped(self, step: int) -> None: ...
