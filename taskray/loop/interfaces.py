"""The two small interfaces the training loop knows: *streams* of data, and *peers*.

Whoever implements them (Ray, or one process) is none of the loop's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from taskray.data.streams.batch import Batch
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

    def keep_up(self, front: int, through: int | None = None) -> None:
        """Mediator streams: at the end of the present walk go to the window ``front``, if it is
        ahead; do not leave the present window before it is ``through``, if that is known."""
        ...

    @property
    def corrupt(self) -> CorruptRows:
        """The rows that were skipped so far because they could not be read."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Prediction:
    """A peer's prediction on one mediator batch, with the version of the model that made it."""

    task: str
    tensors: dict[str, Tensor]
    producer_step: int
    staleness_steps: int
    age_seconds: float


@dataclass(frozen=True)
class PeerPredictions:
    """What a look-up found: usable predictions by quantity, and what was left out and why."""

    by_quantity: dict[str, Prediction] = field(default_factory=dict)
    misses: dict[str, str] = field(default_factory=dict)
    """Peer task -> ``absent``, ``stale`` (beyond the
    bound), ``timeout``, ``unavailable`` (the cache did not answer)."""
    front: int = -1
    """The farthest mediator window that another task has come to (see ``Batch.window``)."""
    through: int | None = None
    """The last window that all peers in training have walked at least once; None where none of
    them is on its way, or it does not matter."""
    asked_at: float = 0.0
    """When, by ``time.monotonic``, the predictions had the ages that they state."""


class Peers(Protocol):
    """How a task sees the rest of the collective. No method ever raises for a peer's sake."""

    def request(self, batch: Batch, now: int, use: int) -> None:
        """Start looking up the peers' predictions on a batch; this task is at step ``now`` and
        will use them at step ``use``."""
        ...

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        """Hand this task's own prediction to its peers; returns at once."""
        ...

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        """What the request found; waits only where the staleness bound says *wait*."""
        ...

    def stepped(self, step: int, model: nn.Module) -> None:
        """Called after each step: a chance to refresh a stale copy of the model."""
        ...


class NoPeers:
    """A task on its own."""

    def request(self, batch: Batch, now: int, use: int) -> None: ...

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None: ...

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        return PeerPredictions()

    def stepped(self, step: int, model: nn.Module) -> None: ...
