"""The mediator, one batch ahead of the step that uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskray.data.streams.batch import Batch
from taskray.loop.interfaces import PeerPredictions, Peers, WindowStream


class Ahead:
    """Draws the next mediator batch and asks the peers about it, a step before the step that uses
    it: early enough to hide the way there and back, late enough for fresh predictions."""

    def __init__(self, stream: WindowStream, peers: Peers) -> None:
        self.stream, self.peers = stream, peers
        self._batch: Batch | None = None  # the peers are being asked about it
        self._before: dict[str, Any] = {}  # the stream's position before it was drawn

    def ask(self, step: int, use: int) -> None:
        """Draw a batch and ask about it, unless that is done."""
        if self._batch is None:
            self._before = self.stream.state_dict()
            self._batch = self.stream.next()
            self.peers.ask(self._batch, step, use)

    def take(self, step: int) -> Batch:
        """The batch for this step."""
        self.ask(step, step)
        assert self._batch is not None
        batch, self._batch = self._batch, None
        return batch

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        """The peers' predictions on the batch; goes on in the window that the collective is in."""
        found = self.peers.collect(batch, step)
        self.stream.follow(found.window)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The position: a batch that was drawn and not used comes again."""
        return self.stream.state_dict() if self._batch is None else self._before

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self._batch = None
