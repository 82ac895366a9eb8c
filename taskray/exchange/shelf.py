"""Where the cached predictions are kept, within a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

from taskray.exchange.staleness import Version


class Key(NamedTuple):
    """One task's prediction on one mediator batch in one window."""

    task: str
    window: int
    batch: int


@dataclass(frozen=True)
class Entry:
    """One cached prediction."""

    version: Version
    made: int
    """The producer's count of training steps when it was made (``producer.StepCount``)."""
    visit: int
    """The visit of the window in which it was made."""
    token: Any
    """The arrays, as the transport keeps them."""
    num_bytes: int


class Shelf:
    """Predictions by :class:`Key`. Beyond ``max_bytes`` the oldest are dropped."""

    def __init__(self, max_bytes: int, transport: Any) -> None:
        self.max_bytes, self.transport = max_bytes, transport
        self.num_bytes = self.evictions = 0
        self._entries: OrderedDict[Key, Entry] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def put(self, key: Key, entry: Entry) -> None:
        """Keep a prediction in place of what is there."""
        self._drop(key)
        while self._entries and self.num_bytes + entry.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))
            self.evictions += 1
        self._entries[key] = entry
        self.num_bytes += entry.num_bytes

    def drop_before(self, window: int) -> None:
        """Drop the predictions of earlier windows than this."""
        for key in [key for key in self._entries if key.window < window]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
            self.transport.release(entry.token)
