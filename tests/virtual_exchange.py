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
from taskray.data.streams.mediator import MediatorStream
from taskray.data.streams.order import MediatorOrder
from taskray.data.streams.stream import AHEAD
from taskray.exchange.cache import PredictionCache
from taskray.exchange.messages import Announcement, Answer, Publication, Question
from taskray.exchange.transport import ByValue
from taskray.job.config import MediatorConfig, StalenessConfig

ARRAY = np.zeros((1, 1), np.float16)
LONG_STEP, OLD_ANSWER = 0.1, 0.25
"""As in ``runtime.peers``, which imports Ray."""


class Rows(MemorySource):
    """A dataset of numbered rows without a column."""

    def __init__(self, num_rows: int) -> None:
        self.info = DatasetInfo("virtual", "", num_rows, {})

    def row(self, index: int) -> dict[str, Any]:
        return {KEY: str(index), ERROR: ""}


class AheadStream(MediatorStream):
    """A mediator stream without its thread: batches are assembled as far ahead as by it."""

    def __init__(self, order: MediatorOrder) -> None:
        super().__init__(Rows(order.num_batches), 1, order, [])
        self.load_state_dict(self.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        batches, assembled = self.batches(dict(state)), deque[Any]()

        class Assembled:
            def __next__(self) -> Any:
                while len(assembled) < 1 + AHEAD:
                    assembled.append(next(batches))
                return assembled.popleft()

            def close(self) -> None: ...

        self._ahead = Assembled()  # type: ignore[assignment]


class RealStream:
    """As the fake tasks know it."""

    def __init__(self, order: MediatorOrder) -> None:
        self.real = AheadStream(order)
        self.state_dict, self.load_state_dict = self.real.state_dict, self.real.load_state_dict
        self.follow = self.real.follow

    def next(self) -> Drawn:
        batch = self.real.next()
        assert batch.id is not None
        return Drawn(batch.place.window, batch.id, batch)


class RealExchange:
    """The calls of ``CachePeers`` to the cache actor, without time between them."""

    def __init__(self, setting: Setting, members: Mapping[str, Member], clock: Clock) -> None:
        self.setting, self.members, self.clock = setting, members, clock
        bound = StalenessConfig(on_stale=setting.on_stale, max_steps=setting.max_steps)
        self.mediator = MediatorConfig(
            data="virtual",
            window=setting.window,
            visits=setting.visits,
            supervised_steps=setting.supervised_steps,
            consistency_steps=setting.consistency_steps,
        )
        self.cache = PredictionCache(1 << 30, bound, self.mediator, clock=clock)
        self.bound = bound
        someone_blocks = any(not member.labelled for member in members.values())
        self.sends_at_once = setting.on_stale == "wait" or someone_blocks
        self._asked_at: dict[str, float] = {}

    def stream(self) -> RealStream:
        visits = self.setting.visits if self.bound.synchronous else None
        return RealStream(
            MediatorOrder(self.setting.num_batches, self.setting.window, visits=visits)
        )

    def announce(self, task: str, step: int, stream: RealStream) -> None:
        stream.follow(self.cache.announce(self._announcement(task, step, stream)).window)

    def ask(
        self,
        task: str,
        publications: list[Made],
        drawn: Drawn,
        now: int,
        use: int,
        reply: Callable[[Reply], None],
    ) -> None:
        wanted = tuple(name for name in self.members if name != task)
        blocks = not self.members[task].labelled
        question = Question(task, wanted, drawn.id, drawn.batch.place, now, blocks)
        self._asked_at[task] = self.clock()

        def take(answer: Answer | None) -> None:
            assert answer is not None
            reply(self._replied(question, answer))

        self.cache.ask([publication(made) for made in publications], question, take)

    def publish(self, made: Made) -> None:
        self.cache.publish(publication(made))

    def sends_now(self, task: str) -> bool:
        return self.sends_at_once or self.clock() - self._asked_at.get(task, 0.0) > LONG_STEP

    def asks_again(self, seconds: float) -> bool:
        return self.setting.on_stale != "wait" and seconds > OLD_ANSWER

    def progress(self, task: str, step: int) -> None:
        self.cache.progress(task, step)

    def expire(self, task: str) -> None:
        self.cache.expire(task)

    def lose(self, task: str) -> None:
        self.cache.waiting.pop(task, None)

    def retire(self, task: str, stays: bool) -> None:
        """The driver's call for a task that leaves, the task's own for one that stays."""
        if stays:
            step = self.members[task].steps
            self.cache.announce(Announcement(task, (task,), step, trains=False, on_demand=step))
        else:
            self.cache.retire(task, (task,))

    def _announcement(self, task: str, step: int, stream: RealStream) -> Announcement:
        steps_per_visit = self.mediator.steps_per_visit(self.members[task].labelled)
        place = stream.real.position()
        return Announcement(task, (task,), step, place, steps_per_visit=steps_per_visit)

    def _replied(self, question: Question, answer: Answer) -> Reply:
        """Peers that predict on demand do so where they are missed."""
        asked = [
            t
            for t, f in answer.found.items()
            if f.on_demand is not None and (f.miss or f.staleness_steps > 0)
        ]
        for task in asked:
            drawn = Drawn(question.place.window, question.batch, None)
            made = Made(task, drawn, answer.found[task].on_demand, self.clock())
            self.cache.publish(publication(made, question))
        found = {**answer.found}
        again = self.cache.look_up.found(question)[0] if asked else {}
        found |= {task: again[task] for task in asked}
        usable = {t: f.version.produced_at for t, f in found.items() if f.version and not f.miss}
        return Reply(usable, frozenset(found) - frozenset(usable), answer.window)


def publication(made: Made, asked: Question | None = None) -> Publication:
    place = asked.place if asked else made.drawn.batch.place
    token = ByValue({made.task: ARRAY})
    return Publication(made.task, made.drawn.id, place, made.step, token, made.at)


if __name__ == "__main__":
    print(table(RealExchange))
