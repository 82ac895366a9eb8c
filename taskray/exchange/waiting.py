"""The prediction cache where ``on_stale`` is ``wait``: a look-up waits for the publish it needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from taskray.exchange.cache import Awaited, PredictionCache
from taskray.exchange.messages import Answer, Arrays, Publication, Query
from taskray.job.config import StalenessConfig

LATE_SECONDS = 2.0
"""How long to wait for a prediction that is on its way, or lost."""


class WaitingCache:
    """The calls of :class:`PredictionCache` on an event loop, which makes each of them dearer;
    where nobody waits, the plain cache is the actor."""

    def __init__(
        self, max_bytes: int, bound: StalenessConfig, put: Callable[[Arrays], Any] = dict
    ) -> None:
        self.cache = PredictionCache(max_bytes, bound, put)
        self.wait_seconds = bound.wait_seconds
        self.changed = asyncio.Condition()
        self.waiting = 0

    async def announce(self, *producer: Any) -> None:
        """As :meth:`PredictionCache.announce`."""
        self.cache.announce(*producer)
        await self._wake()

    async def retire(self, task: str, quantities: Sequence[str], serves: bool = False) -> None:
        """As :meth:`PredictionCache.retire`."""
        self.cache.retire(task, quantities, serves)
        await self._wake()

    async def publish(self, new: Publication) -> str | None:
        """As :meth:`PredictionCache.publish`."""
        refused = self.cache.publish(new)
        await self._wake()
        return refused

    async def exchange(self, publications: Sequence[Publication], query: Query) -> Answer | None:
        """As :meth:`PredictionCache.exchange`, but the answer waits until every peer has come far
        enough, or ``wait_seconds`` have passed."""
        if query.consumer not in self.cache.producers:
            return None
        refused = [reason for new in publications if (reason := await self.publish(new))]
        self.cache.arrive(query)
        await self._wake()  # whoever waits for this task may have been left behind
        await self._wait(query)
        found = self.cache.look_up(query)
        return Answer(found, self.cache.front(query.consumer), tuple(refused))

    async def progress(self, task: str, step: int) -> None:
        """As :meth:`PredictionCache.progress`."""
        self.cache.progress(task, step)

    async def statistics(self) -> dict[str, Any]:
        """As :meth:`PredictionCache.statistics`."""
        return self.cache.statistics()

    async def _wait(self, query: Query) -> None:
        clock = asyncio.get_running_loop().time
        end, late_since = clock() + self.wait_seconds, None
        async with self.changed:
            self.waiting += 1
            try:
                while (awaited := self.cache.awaited(query)) is not Awaited.NOTHING:
                    late_since = (late_since or clock()) if awaited is Awaited.LATE else None
                    until = min(end, late_since + LATE_SECONDS) if late_since else end
                    if clock() >= until:
                        self.cache.counts["waits_given_up"] += 1
                        return
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self.changed.wait(), until - clock())
            finally:
                self.waiting -= 1

    async def _wake(self) -> None:
        if self.waiting:
            async with self.changed:
                self.changed.notify_all()
