"""The prediction cache: the newest prediction of every task on every mediator batch.

    trainer ──own prediction on batch b,         ┌────────────────┐
              what do peers say of batch b + 1?─▶│ PredictionCache│  index here,
            ◀──versions and arrays, or           │                │  arrays here (small ones)
               references to them────────────────└────────────────┘  or in the object store

The cache *owns* the arrays: an object dies with the process that put it, so the cache puts them,
and a crashed task's last predictions go on serving its peers. This file is plain Python: ``put``
decides where the arrays live, and the Ray actor is made of it in ``runtime/placement.py``.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import numpy as np

from taskray.exchange.messages import NOT_ANNOUNCED, Answer, Arrays, Found, Publication, Query
from taskray.job.config import StalenessConfig
from taskray.loop.staleness import Version, within, worth_waiting_for
from taskray.schema import PREDICTED_SHAPES, QUANTITIES, quantity_of

HEAP_BYTES = 1 << 20
"""Predictions up to this size lie in the cache's own memory, larger ones in the object store."""


@dataclass(frozen=True)
class Entry:
    """One cached prediction; ``arrays`` is whatever ``put`` made of them."""

    version: Version
    arrays: Any
    num_bytes: int
    window: int
    """Mediator window in which it was made (``Batch.window``)."""


@dataclass
class Producer:
    """A task that publishes: what it predicts, how far it is, and whether it still trains."""

    quantities: tuple[str, ...]
    step: int = 0
    active: bool = True
    server: Any = None
    """Its forward server, where there is one."""
    window: int = -1
    """The mediator window it has come to."""
    walk: int = 0
    """How often it has walked that window before."""
    visit: int = -1
    """The visit of the mediator's order that it has come to."""
    serves: bool = False
    """It has ended, and goes on predicting in the windows that its peers come to."""


class Awaited(Enum):
    """What there is to wait for."""

    NOTHING = auto()
    PREDICTION = auto()
    """A peer that has yet to come to this visit of the batch, or to join."""
    LATE = auto()
    """No more than what may be on its way from peers that have made this visit. They do not come
    back to it: after a resumption from other places in the order, or where the cache has lost
    what they said, two tasks would wait for each other."""


class PredictionCache:
    """Keyed by (task, mediator batch). Evicts the oldest prediction beyond its byte budget.

    Raises nothing at a publisher: what it is given is checked (names, shapes, finite values), and
    a bad prediction is refused, counted, and answered with the reason.
    """

    def __init__(
        self,
        max_bytes: int,
        bound: StalenessConfig | None = None,
        put: Callable[[Arrays], Any] = dict,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.max_bytes, self.put, self.clock = max_bytes, put, clock
        self.bound = bound or StalenessConfig()
        self.entries: OrderedDict[tuple[str, int], Entry] = OrderedDict()  # oldest first
        self.producers: dict[str, Producer] = {}
        self.num_bytes = 0
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()

    # ---- producers ------------------------------------------------------------------------

    def announce(
        self,
        task: str,
        quantities: Sequence[str],
        step: int = 0,
        server: Any = None,
        active: bool = True,
        serves: bool = False,
    ) -> None:
        """A task joins, or comes back from its checkpoint at ``step``; see ``retire`` for one that
        is not ``active``."""
        self.producers[task] = Producer(tuple(quantities), step, active, server, serves=serves)

    def progress(self, task: str, step: int) -> None:
        """A task has come to ``step``, which is what staleness is measured against."""
        if task in self.producers:
            self.producers[task].step = max(self.producers[task].step, step)

    def arrive(self, query: Query) -> None:
        """A task asks: so far has it come, in steps and in the mediator's order."""
        producer = self.producers[query.consumer]
        producer.step, producer.visit = query.now, query.visit
        producer.window, producer.walk = query.window, query.walk

    def front(self, consumer: str) -> int:
        """The farthest window that another task, still in training, has come to; -1 for none."""
        others = (p for t, p in self.producers.items() if t != consumer and p.active)
        return max((p.window for p in others), default=-1)

    def through(self, query: Query) -> int | None:
        """The last window that all peers that train and have come to a window have walked at
        least once; None where there is no such peer."""
        peers = (p for _, p in self._peers_of(query) if p.active and p.window >= 0)
        # windows are numbered by their first visit: one less lies in the window before
        return min((p.window if p.walk else p.window - 1 for p in peers), default=None)

    def retire(self, task: str, quantities: Sequence[str], serves: bool = False) -> None:
        """A task has ended, before it began perhaps: its predictions stay, but nobody waits for
        fresher ones. ``serves``: it still predicts on batches that are new."""
        producer = self.producers.setdefault(task, Producer(tuple(quantities)))
        producer.active, producer.serves = False, serves

    # ---- predictions ----------------------------------------------------------------------

    def publish(self, new: Publication) -> str | None:
        """Keep a prediction unless a later one is here already. Returns why it was refused.

        Idempotent by (task, batch, step): publishing again what is here changes nothing.
        """
        self.counts["publishes"] += 1
        reason = self._objection(new.task, new.arrays)
        if reason is not None:
            self.counts["refused"] += 1
            self.refusals[f"{new.task}: {reason}"] += 1
            return reason
        producer = self.producers[new.task]
        producer.step = max(producer.step, new.step)
        key = (new.task, new.batch)
        before = self.entries.get(key)
        if before is not None and new.produced_at <= before.version.produced_at:
            return None
        num_bytes = sum(a.nbytes for a in new.arrays.values())
        if num_bytes > self.max_bytes:
            self.counts["refused"] += 1
            self.refusals[f"{new.task}: larger than the whole budget"] += 1
            return f"{num_bytes} bytes are more than the whole budget of {self.max_bytes}"
        self._drop(key)
        while self.num_bytes + num_bytes > self.max_bytes:
            self._drop(next(iter(self.entries)))
            self.counts["evictions"] += 1
        version = Version(new.step, new.produced_at)
        self.entries[key] = Entry(version, self.put(new.arrays), num_bytes, new.window)
        self.num_bytes += num_bytes
        return None

    def look_up(self, query: Query) -> dict[str, Found]:
        """For every peer that predicts one of the quantities: its prediction, or why not."""
        self.counts["look_ups"] += 1
        now = self.clock()
        answer = {}
        for task, producer in self._peers_of(query):
            entry = self._entry(task, query)
            may_come = (producer.active or producer.serves) and producer.window <= query.window
            found = Found(
                producer.quantities,
                "absent",
                server=producer.server,
                may_come=may_come,
                has_begun=producer.window >= 0,
            )
            if entry is not None:
                fresh = within(self.bound, entry.version, producer.step, now)
                found = replace(
                    found,
                    miss=None if fresh else "stale",
                    arrays=entry.arrays if fresh else None,
                    version=entry.version,
                    staleness_steps=entry.version.staleness(producer.step),
                )
            answer[task] = found
        return answer

    def exchange(self, publications: Sequence[Publication], query: Query) -> Answer | None:
        """The usual call of a consistency step, one way and back: what the task has predicted
        since it last called, and what it wants to know for its next consistency step.

        None: this cache was restarted and does not know the task any more.
        """
        if query.consumer not in self.producers:
            return None
        refused = tuple(r for r in map(self.publish, publications) if r is not None)
        self.arrive(query)
        found, front = self.look_up(query), self.front(query.consumer)
        return Answer(found, front, refused, self.through(query))

    def awaited(self, query: Query) -> Awaited:
        """What a consumer that waits should wait for: see :class:`Awaited`."""
        consumer = self.producers.get(query.consumer)
        if consumer is not None and not consumer.active:  # it serves: nobody is to hold it up
            return Awaited.NOTHING
        promised = {
            q for t, p in self.producers.items() if t != query.consumer for q in p.quantities
        }
        peers = [p for t, p in self._peers_of(query) if self._is_due(t, p, query)]
        if set(query.quantities) - promised or any(p.visit <= query.visit for p in peers):
            return Awaited.PREDICTION
        return Awaited.LATE if peers else Awaited.NOTHING

    def _is_due(self, task: str, producer: Producer, query: Query) -> bool:
        """Whether a peer has not come far enough on the batch, and may yet."""
        entry = self._entry(task, query)
        version = entry.version if entry else None
        if producer.active:
            return worth_waiting_for(self.bound, version, query.use, self.clock())
        return version is None and producer.serves and producer.window <= query.window

    def statistics(self) -> dict[str, Any]:
        """Counts since the cache began, as in the result file."""
        names = ("publishes", "refused", "evictions", "look_ups", "waits_given_up")
        counts = {name: self.counts[name] for name in names}
        return {
            "entries": len(self.entries),
            "bytes": self.num_bytes,
            **counts,
            "refusals": dict(self.refusals.most_common(20)),
        }

    # ---- inside ---------------------------------------------------------------------------

    def _peers_of(self, query: Query) -> list[tuple[str, Producer]]:
        return [
            (task, producer)
            for task, producer in self.producers.items()
            if task != query.consumer and set(query.quantities) & set(producer.quantities)
        ]

    def _entry(self, task: str, query: Query) -> Entry | None:
        """What a task has predicted on the batch, unless that was in an earlier window."""
        entry = self.entries.get((task, query.batch))
        return entry if entry is not None and entry.window >= query.since else None

    def _drop(self, key: tuple[str, int]) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes

    def _objection(self, task: str, arrays: Arrays) -> str | None:
        if task not in self.producers:
            return NOT_ANNOUNCED
        promised = self.producers[task].quantities
        if set(arrays) != set(promised):
            return f"predicts {sorted(arrays)}, announced {sorted(promised)}"
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 2:
                return f"{name} is not an array of floats with a batch dimension"
            if not _has_shape(name, array):
                return f"{name} has shape {array.shape}"
            if not _is_finite(array):
                return f"{name} has values that are not finite"
        if len({array.shape[0] for array in arrays.values()}) > 1:
            return "its quantities differ in batch size"
        return None


def keep_small(put: Callable[[Arrays], Any], limit: int = HEAP_BYTES) -> Callable[[Arrays], Any]:
    """A ``put`` that keeps predictions of up to ``limit`` bytes in the cache's own memory, and
    leaves the others to ``put``: for small ones the object store costs more than a copy."""

    def keep(arrays: Arrays) -> Any:
        if sum(a.nbytes for a in arrays.values()) > limit:
            return put(arrays)
        # copied: what came with a call lies in memory that belongs to the publisher
        return {name: array.copy() for name, array in arrays.items()}

    return keep


def _is_finite(array: np.ndarray) -> bool:
    """As ``np.isfinite(array).all()``. For float16, twenty times as fast by its bits: infinities
    and NaN are the largest positive values as int16, and the largest of all as uint16."""
    if array.dtype == np.float16 and array.size:
        bits = array.view(np.int16)
        return bool(bits.max() < 0x7C00 and bits.view(np.uint16).max() < 0xFC00)
    return bool(np.isfinite(array).all())


def _has_shape(name: str, array: np.ndarray) -> bool:
    """Whether the sizes that ``schema`` fixes for this quantity are kept."""
    quantity = QUANTITIES.get(quantity_of(name))
    if quantity is None:
        return True
    shape = ("B", *PREDICTED_SHAPES.get(quantity.name, quantity.shape))
    return array.ndim == len(shape) and all(
        isinstance(wanted, str) or wanted == got
        for wanted, got in zip(shape, array.shape, strict=True)
    )
