"""The real cache and the real mediator stream behind the protocols of ``virtual_time``.

``python tests/virtual_exchange.py`` prints the table of unequal tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from virtual_time import Clock, Drawn, Made, Member, Reply, Setting, table

from taskray.data.storage.codec import ERROR, KEY
from taskray.data.storage.source import DatasetInfo, MemorySource
from taskray.data.streams.stream import AHEAD, MediatorStream
from taskray.exchange.cache import Awaited, PredictionCache
from taskray.exchange.messages import Found, Publication, Query
from taskray.job.config import StalenessConfig


class Rows(MemorySource):
    """A dataset of numbered rows without a column."""

    def __init__(self, num_rows: int) -> None:
        self.info = DatasetInfo("virtual", "", num_rows, {})

    def row(self, index: int) -> dict[str, Any]:
        return {KEY: str(index), ERROR: ""}


class AheadStream:
    """A mediator stream, its batches drawn as far ahead as its thread would."""

    def __init__(self, setting: Setting) -> None:
        rows = Rows(setting.num_batches)
        self.real = MediatorStream(rows, 1, setting.window, setting.visits, False, 0, [])
        self.load_state_dict(self.real.state_dict())

    def next(self) -> Drawn:
        self._fill()
        self._state, batch = self._ahead.popleft()
        self._fill()
        return Drawn(batch.window, batch.id, batch)

    def _fill(self) -> None:
        while len(self._ahead) < AHEAD:
            self._ahead.append(next(self._batches))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.real.load_state_dict(state)
        self._state, self._ahead = dict(state), deque[Any]()
        self._batches = self.real.batches(self._state)

    def follow(self, goal: tuple[int, int | None]) -> None:
        self.real.keep_up(*goal)


class RealExchange:
    """What ``CachePeers`` and the cache actor do with the cache, without time between them."""

    def __init__(self, setting: Setting, members: Mapping[str, Member], clock: Clock) -> None:
        self.setting, self.members = setting, members
        bound = StalenessConfig(on_stale=setting.on_stale, max_steps=setting.max_steps)
        self.cache = PredictionCache(1 << 30, bound, clock=clock)
        self.sends_at_once = setting.on_stale == "wait"
        self._questions: dict[str, tuple[Query, Callable[[Reply], None]]] = {}
        self._given_up: dict[str, set[str]] = {name: set() for name in members}
        self._on_demand: dict[str, int] = {}  # tasks that have ended and stay, with their step

    def stream(self) -> AheadStream:
        return AheadStream(self.setting)

    def announce(self, task: str, step: int, stream: AheadStream) -> None:
        self.cache.announce(task, (task,), step)
        self._settle()

    def ask(
        self,
        task: str,
        publications: list[Made],
        drawn: Drawn,
        now: int,
        use: int,
        reply: Callable[[Reply], None],
    ) -> None:
        batch, wanted = drawn.batch, tuple(name for name in self.members if name != task)
        place = batch.window, batch.walk, batch.visit
        query = Query(task, drawn.id, wanted, now, use, *place, since=batch.window)
        self.cache.exchange([publication(made) for made in publications], query)
        self._questions[task] = query, reply
        self._settle()

    def publish(self, made: Made) -> None:
        self.cache.publish(publication(made))
        self._settle()

    def progress(self, task: str, step: int) -> None:
        self.cache.progress(task, step)

    def expire(self, task: str) -> None:
        query, _ = self._questions[task]
        found = self._look_up(query)
        coming = self._coming(query, found)
        self._given_up[task] |= {t for t in coming if t not in found or found[t].has_begun}
        self._reply(task, found)

    def lose(self, task: str) -> None:
        self._questions.pop(task, None)
        self._given_up[task].clear()

    def retire(self, task: str, stays: bool) -> None:
        self.cache.retire(task, (task,), stays)
        if stays:
            self._on_demand[task] = self.cache.producers[task].step
        self._settle()

    def _settle(self) -> None:
        """Answer every question that has nothing to wait for."""
        for task, (query, _) in list(self._questions.items()):
            found = self._look_up(query)
            if self.setting.on_stale == "wait":
                waits = self.cache.awaited(query) is not Awaited.NOTHING
            else:
                coming = self._coming(query, found) - self._given_up[task]
                waits = bool(coming) and not self.members[task].labelled
            if not waits:
                self._reply(task, found)

    def _look_up(self, query: Query) -> dict[str, Found]:
        """Tasks that have ended and stay predict first on what is missing."""
        found = self.cache.look_up(query)
        for task, step in self._on_demand.items():
            if task in found and found[task].miss:
                drawn = Drawn(query.window, query.batch, None)
                self.cache.publish(publication(Made(task, drawn, step, self.cache.clock())))
        return self.cache.look_up(query)

    def _coming(self, query: Query, found: Mapping[str, Found]) -> set[str]:
        coming = {t for t, f in found.items() if f.miss == "absent" and f.may_come}
        return coming | (set(query.quantities) - set(found))

    def _reply(self, task: str, found: Mapping[str, Found]) -> None:
        query, reply = self._questions.pop(task)
        self._given_up[task] -= {t for t, peer in found.items() if peer.version is not None}
        usable = {t: f.version.producer_step for t, f in found.items() if f.version and not f.miss}
        in_step = self.sends_at_once and self.setting.max_steps is not None
        front = 0 if in_step else self.cache.front(task)
        through = None if self.sends_at_once else self.cache.through(query)
        reply(Reply(usable, frozenset(found) - frozenset(usable), (front, through)))


def publication(made: Made) -> Publication:
    arrays, drawn = {made.task: np.zeros((1, 1), np.float32)}, made.drawn
    return Publication(made.task, drawn.id, made.step, made.at, arrays, drawn.window)


if __name__ == "__main__":
    print(table(RealExchange))
