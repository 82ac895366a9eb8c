"""The prediction cache: the newest prediction of every task on every mediator batch.

    a task, once a mediator visit                    PredictionCache
    ┌─────────────────────────────┐  publications,   ┌─────────────────────────────────────┐
    │ predicts on batch b         │  question (b+1)  │ shelf    what each task predicted   │
    │ asks about batch b+1    ────┼─────────────────▶│ window   the one that all are in    │
    │                             │                  │ waiting  questions that wait until  │
    │ goes on in the window   ◀───┼──────────────────│          a peer has published       │
    └─────────────────────────────┘  answer: window, └─────────────────────────────────────┘
                                     predictions

One wait rule: a question waits for a peer in training only while that peer has no fresh enough
prediction on the batch *and* has not published at the question's place in the mediator's order or
a later one. Of the tasks that have begun, the one that is farthest behind never waits, so there
is no deadlock. A task that has not begun or not announced itself is waited for, too, for a limited
time.

The cache owns what it keeps (``transport``), so a crashed task's last predictions go on serving.
This file is plain Python; ``runtime/placement.py`` makes the Ray actor of it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

from taskray.exchange.look_up import LookUp, handed_out
from taskray.exchange.messages import Announcement, Answer, Publication, Question, Welcome
from taskray.exchange.objection import objection
from taskray.exchange.producer import Producer, StepCount
from taskray.exchange.shared_memory import Lost
from taskray.exchange.shelf import Entry, Key, Shelf
from taskray.exchange.staleness import Version
from taskray.exchange.transport import CacheTransport
from taskray.exchange.window import Window
from taskray.job.config import MediatorConfig, StalenessConfig

NOT_ANNOUNCED = "the task has not announced itself"
"""The refusal of a cache that was restarted: the task announces itself and publishes again."""

Reply = Callable[[Answer | None], Any]


class PredictionCache:
    """See the drawing above. Raises nothing at a task: a bad prediction is refused, counted, and
    answered with the reason."""

    def __init__(
        self,
        max_bytes: int,
        bound: StalenessConfig | None = None,
        mediator: MediatorConfig | None = None,
        transport: CacheTransport | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.bound, self.clock = bound or StalenessConfig(), clock
        self.transport = transport or CacheTransport()
        self.shelf = Shelf(max_bytes, self.transport)
        windowed = mediator is not None and mediator.window != "all"
        # in lock-step each task moves on by itself, after the same visits (MediatorOrder)
        follows = mediator is not None and windowed and not self.bound.synchronous
        self.window = Window(mediator.visits if mediator is not None and follows else None)
        self.producers: dict[str, Producer] = {}
        self.look_up = LookUp(self.producers, self.shelf, self.bound, windowed, clock)
        self.waiting: dict[str, tuple[Question, Reply]] = {}
        self.timed_out: set[tuple[str, str]] = set()  # (consumer, peer that it waits for no more)
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self._lock = threading.RLock()  # in the actor, waiting calls have threads of their own

    # ---- tasks come and go ----------------------------------------------------------------

    def announce(self, new: Announcement) -> Welcome:
        """A task joins, or comes back from its checkpoint."""
        with self._lock:
            before = self.producers.get(new.task)
            count = before.count if before else StepCount(new.step)
            count.resume(new.step)
            self.producers[new.task] = Producer(new, count)
            if new.trains:
                self.window.join(new.task, new.place)
            self._after_a_change()
            return Welcome(self.window.number, self.transport.host)

    def progress(self, task: str, step: int) -> bool:
        """A task has come to ``step``, which is what staleness is measured against. False: this
        cache was restarted and does not know the task."""
        with self._lock:
            if task not in self.producers:
                return False
            self.producers[task].count.reach(step)
            return True

    def retire(self, task: str, quantities: Sequence[str]) -> None:
        """A task has ended, before it began perhaps: its predictions stay, and no question waits
        for it."""
        with self._lock:
            new = Announcement(task, tuple(quantities))
            producer = self.producers.setdefault(task, Producer(new, StepCount(0)))
            producer.trains, producer.on_demand = False, None
            self._after_a_change()

    # ---- predictions ----------------------------------------------------------------------

    def publish(self, new: Publication) -> str | None:
        """Keep a prediction, unless a later one is here. Returns the reason of a refusal.

        Idempotent by (task, batch, step): publishing again what is here changes nothing.
        """
        with self._lock:
            refusal = self._publish(new)
            self._after_a_change()
            return refusal

    def exchange(
        self, publications: Sequence[Publication], question: Question, host: str = ""
    ) -> Answer | None:
        """The usual call, once a mediator visit: what the task has predicted since the last one,
        and its question. Returns when :meth:`ask` replies, after ``wait_seconds`` at the latest.

        ``host``: of the reader (``Transport.host``). None: this cache was restarted and does not
        know the task.
        """
        answer: Future[Answer | None] = Future()
        with self._lock:
            self.ask(publications, question, answer.set_result)
        try:
            found = answer.result(self.bound.wait_seconds)
        except FutureTimeout:
            with self._lock:
                if not answer.done():
                    self.expire(question.consumer)
            found = answer.result()
        with self._lock:
            return found and handed_out(found, self.transport, host)

    def ask(self, publications: Sequence[Publication], question: Question, reply: Reply) -> None:
        """As :meth:`exchange`; ``reply`` is called with the answer, now or when what the question
        waits for has come. A task has one question at a time: a new one ends the wait of the one
        before."""
        producer = self.producers.get(question.consumer)
        if producer is None:
            reply(None)
            return
        self.expire(question.consumer, timeout=False)
        refused = tuple(r for r in map(self._publish, publications) if r is not None)
        producer.count.reach(question.step)
        self.counts["look_ups"] += 1
        if producer.trains and self.window.visit(
            question.consumer, question.place, self._training()
        ):
            self.shelf.drop_before(self.window.number - 1)
        self.waiting[question.consumer] = (
            question,
            lambda answer: reply(answer and replace(answer, refused=refused)),
        )
        self._after_a_change()

    def expire(self, consumer: str, timeout: bool = True) -> None:
        """Answer a question that still waits with what there is. ``timeout``: it has waited long
        enough, so this task waits no more for those peers until they publish again."""
        if consumer not in self.waiting:
            return
        question, reply = self.waiting.pop(consumer)
        if timeout:
            late = [self.producers.get(peer) for peer in self._awaited(question)]
            begun = {peer.task for peer in late if peer and peer.published is not None}
            self.timed_out |= {(consumer, peer) for peer in begun}
            self.counts["timed_out"] += 1
        reply(self._answer(question))

    def statistics(self) -> dict[str, Any]:
        """Counts since the cache began, as in the result file."""
        with self._lock:
            counts = {n: self.counts[n] for n in ("publishes", "refused", "look_ups", "timed_out")}
            return {
                "entries": len(self.shelf),
                "bytes": self.shelf.num_bytes,
                "evictions": self.shelf.evictions,
                **counts,
                "window": self.window.number,
                "refusals": dict(self.refusals.most_common(20)),
            }

    def close(self) -> None:
        """Free what the predictions occupy."""
        self.transport.close()

    # ---- inside ---------------------------------------------------------------------------

    def _publish(self, new: Publication) -> str | None:
        self.counts["publishes"] += 1
        refusal = self._keep(new)
        if refusal is not None:
            self.counts["refused"] += 1
            self.refusals[f"{new.task}: {refusal}"] += 1
        return refusal

    def _keep(self, new: Publication) -> str | None:
        producer = self.producers.get(new.task)
        if producer is None:
            return NOT_ANNOUNCED
        producer.count.reach(new.step)
        if producer.published is None or new.place > producer.published:
            producer.published = new.place
        if self.timed_out:
            self.timed_out = {pair for pair in self.timed_out if pair[1] != new.task}
        try:
            token = self.transport.accept(new.token)
            reason = objection(self.transport.fetch(token), producer.quantities)
        except Lost:
            return "its bytes are lost"
        if reason is None and token.num_bytes > self.shelf.max_bytes:
            reason = f"{token.num_bytes} bytes are more than the budget of {self.shelf.max_bytes}"
        key = Key(new.task, new.place.window, new.batch)
        before, version = self.shelf.get(key), Version(new.step, new.produced_at)
        made = producer.count.at(new.step)
        later = before and (before.made, before.version.produced_at) >= (made, new.produced_at)
        if reason is not None or later:
            self.transport.release(token)
            return reason
        self.shelf.put(key, Entry(version, made, new.place.visit, token, token.num_bytes))
        return None

    def _after_a_change(self) -> None:
        """Move the window on and answer the questions that need not wait any more, at once: what
        a peer publishes after the change must not be part of their answers."""
        if self.window.advance(self._training()):
            self.shelf.drop_before(self.window.number - 1)
        ready = [c for c, (question, _) in self.waiting.items() if not self._awaited(question)]
        for question, reply in [self.waiting.pop(consumer) for consumer in ready]:
            reply(self._answer(question))

    def _awaited(self, question: Question) -> set[str]:
        late = self.look_up.awaited(question)
        return {peer for peer in late if (question.consumer, peer) not in self.timed_out}

    def _answer(self, question: Question) -> Answer:
        return Answer(self.window.number, *self.look_up.found(question))

    def _training(self) -> list[str]:
        return [task for task, producer in self.producers.items() if producer.trains]
