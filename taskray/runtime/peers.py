"""The peers of one task: through the cache, in the background of the training loop.

    training thread            "ask" thread                          cache
    ask(batch b+1) ──────────▶ publications, question ─────────────▶
                               predict_for ─▶ tasks that answer on demand
    collect(batch b+1) ◀────── arrays as tensors ◀─────────────────── answer
    publish(batch b) ────────▶ (with the next question, or at once in the "tell" thread)

No failure of a peer, a server or the cache reaches the loop: it is a miss, with a reason, counted.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.exchange.arrays import to_arrays, to_tensors
from taskray.exchange.cache import NOT_ANNOUNCED
from taskray.exchange.messages import Announcement, Answer, Found, Publication, Question, Welcome
from taskray.exchange.shared_memory import Lost
from taskray.exchange.transport import Transport
from taskray.job.config import Job
from taskray.loop.interfaces import PeerPredictions, Prediction
from taskray.loop.wiring import Wiring
from taskray.runtime.answering import Request

log = logging.getLogger(__name__)

CALL_TIMEOUT = 10.0
"""Seconds for a call to the cache or a server; it happens in the background."""

MAX_UNSENT = 8
"""Predictions that may wait to be sent; more are dropped and counted."""

LONG_STEP = 0.1
"""Seconds between two questions beyond which a prediction is sent at once. It would else be as old
as a question of a slow task is late, and a call more costs such a task nothing."""


@dataclass(frozen=True)
class Unsent:
    """A prediction of this task that is not on its way yet."""

    batch: int
    place: Place
    step: int
    arrays: dict[str, np.ndarray]
    produced_at: float


class CachePeers:
    """Implements ``loop.interfaces.Peers`` over Ray.

    Args:
        job: of the run.
        task: name of the task.
        wiring: of the collective.
        cache: handle of the cache actor.
        on_step: called after each step, with the number of steps made.
    """

    def __init__(
        self,
        job: Job,
        task: str,
        wiring: Wiring,
        cache: Any,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.job, self.task, self.cache, self.on_step = job, task, cache, on_step
        self.role, self.bound = wiring.roles[task], job.staleness
        self.by_server = job.runtime.publisher == "forward_server"
        self.transport = Transport(get=lambda ref: ray.get(ref, timeout=CALL_TIMEOUT))
        self.announcement = Announcement(
            task, self.role.publishes, steps_per_visit=self.role.steps_per_visit
        )
        waits = self.bound.on_stale == "wait" or self.role.blocks_on_miss
        self.patience = job.runtime.peer_timeout + (self.bound.wait_seconds if waits else 0)
        self.at_once = wiring.blocks or self.bound.on_stale == "wait"  # a peer may wait for it
        self.dropped_publishes = 0
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="ask")
        self._telling = ThreadPoolExecutor(1, thread_name_prefix="tell")
        self._answer: Future[PeerPredictions] | None = None
        self._unsent: deque[Unsent] = deque()
        self._asked_at = self._found_at = 0.0
        self._told = 0  # the step that the cache knows of
        self._late = False  # an answer is overdue: no step waits until the cache is back
        self._known: set[str] = set()

    # ---- what the loop calls --------------------------------------------------------------

    def ask(self, batch: Batch, step: int, use: int) -> None:
        if self._answer is not None:
            self._answer.cancel()
        assert batch.id is not None
        wanted = tuple(q for q, start in self.role.wants.items() if use >= start)
        question = Question(
            self.task, wanted, batch.id, batch.place, step, self.role.blocks_on_miss
        )
        self._told, self._asked_at = step, time.monotonic()
        self.announcement = replace(self.announcement, step=step, place=batch.place)
        self._answer = self._asking.submit(self._look_up, batch, question)

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        if self.by_server:
            return
        if len(self._unsent) >= MAX_UNSENT:
            self.dropped_publishes += 1
            return
        assert batch.id is not None
        arrays = to_arrays(prediction, self.job.cache.dtype)
        self._unsent.append(Unsent(batch.id, batch.place, step, arrays, time.time()))
        if self.at_once or time.monotonic() - self._asked_at > LONG_STEP:
            self.tell(self._send)

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        answer, self._answer = self._answer, None
        if answer is None:
            return PeerPredictions()
        try:
            late = self._late and not self.role.blocks_on_miss
            found = answer.result(0 if late else self.patience)
        except FutureTimeout:
            answer.cancel()
            self._late = True
            return self._all_missing("timeout")
        self._late = False
        return self._aged(found)

    def stepped(self, step: int) -> None:
        if self._unsent and self._unsent[0].step < step - 2:  # no question has taken it along
            self.tell(self._send)
        if self._told < step - 2:  # many supervised steps: staleness is measured against them, too
            self._told = step
            self.announcement = replace(self.announcement, step=step)
            self.tell(self.call, self.cache.progress, self.task, step)
        self.on_step(step)

    # ---- joining and leaving --------------------------------------------------------------

    def announce(self, step: int, place: Place | None, on_demand: Any = None) -> int:
        """Join the collective, or come back to it. Returns the mediator window to be in; 0 where
        the cache does not answer."""
        self._told = step
        self.announcement = replace(self.announcement, step=step, place=place, on_demand=on_demand)
        return self._announce()

    def retire(self, step: int, on_demand: Any) -> None:
        """Training has ended: the predictions stay, and ``on_demand`` predicts when it is asked.
        Returns when everything told so far has arrived, or should have."""
        self.announcement = replace(self.announcement, step=step, trains=False, on_demand=on_demand)
        self.tell(self._send)
        try:
            self._telling.submit(self._announce).result(CALL_TIMEOUT)
        except FutureTimeout:
            log.info("%s: the cache is slow", self.task)

    def announce_again(self) -> None:
        """In case the cache was restarted: it has forgotten the task."""
        self._announce()

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        """Call ``what`` in the background, in order."""
        self._telling.submit(what, *arguments)

    def call(self, method: Any, *arguments: Any) -> Any:
        """One call to an actor; None when it does not answer."""
        try:
            return ray.get(method.remote(*arguments), timeout=CALL_TIMEOUT)
        except ray.exceptions.RayError as error:
            log.info("%s: %s", self.task, type(error).__name__)
            return None

    def publish_now(self, new: Publication) -> str | None:
        """Hand a publication to the cache; returns the reason of a refusal."""
        refused: str | None = self.call(self.cache.publish, new)
        if refused == NOT_ANNOUNCED:
            self._announce()
            refused = self.call(self.cache.publish, new)
        return refused

    # ---- the "ask" thread -----------------------------------------------------------------

    def _look_up(self, batch: Batch, question: Question) -> PeerPredictions:
        try:
            answer = self._exchange(question)
            asked = self._let_predict(batch, answer)
            if asked:  # the first answer stays for the others: they may have gone on since
                again = self._exchange(self._about(question, answer, asked))
                found = {**answer.found, **{t: again.found[t] for t in asked if t in again.found}}
                answer = replace(answer, found=found, newest={**answer.newest, **again.newest})
            self._known |= set(answer.found)
            return self._fetched(answer)
        except ray.exceptions.GetTimeoutError:
            return self._all_missing("timeout")
        except ray.exceptions.RayError:
            return self._all_missing("unavailable")
        except Exception:  # a look-up must not stop the loop; the log has the cause
            log.exception("%s: a look-up failed", self.task)
            return self._all_missing("unavailable")

    def _exchange(self, question: Question) -> Answer:
        for _ in range(2):
            publications = [] if self.at_once else self._publications()
            call = self.cache.exchange.remote(publications, question, self.transport.host)
            try:
                answer: Answer | None = ray.get(call, timeout=CALL_TIMEOUT + self.patience)
            except ray.exceptions.RayError:
                self.dropped_publishes += len(publications)
                raise
            if answer is not None:
                self._warn(answer.refused)
                return answer
            self._announce()  # the cache was restarted and has forgotten this task
        return Answer()

    def _let_predict(self, batch: Batch, answer: Answer) -> list[str]:
        """Let peers predict that do so on demand; returns their names."""
        asked = {
            task: peer
            for task, peer in answer.found.items()
            if peer.on_demand is not None and (self.by_server or peer.miss is not None)
        }
        if not asked:
            return []
        assert batch.id is not None
        inputs = ray.put({k: v.cpu().numpy() for k, v in batch.tensors.items()})  # once, for all
        calls = []
        for peer in asked.values():
            too_old = peer.miss == "stale" and self.bound.max_seconds is not None
            cached = peer.version.producer_step if peer.version and not too_old else None
            request = Request(batch.id, batch.place, cached)
            calls.append(peer.on_demand.predict_for.remote(request, inputs))
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=CALL_TIMEOUT)
        return list(asked) if done else []

    def _about(self, question: Question, answer: Answer, asked: list[str]) -> Question:
        """The question again, about the quantities that the asked peers predict."""
        return replace(
            question, quantities=tuple({q for t in asked for q in answer.found[t].quantities})
        )

    def _fetched(self, answer: Answer) -> PeerPredictions:
        """The answer with the arrays of those predictions that will be used."""
        misses = {t: f.miss for t, f in answer.found.items() if f.miss is not None}
        fetched: dict[str, Prediction] = {}
        for task in set(answer.newest.values()):
            try:
                fetched[task] = self._fetch(task, answer.found[task])
            except Lost:  # replaced, evicted or lost with its node since the look-up
                misses[task] = "unavailable"
        chosen = {q: fetched[t] for q, t in answer.newest.items() if t in fetched}
        self._found_at = time.monotonic()
        bounds = {t: f.bound for t, f in answer.found.items() if f.bound is not None}
        return PeerPredictions(chosen, misses, answer.window, bounds)

    def _fetch(self, task: str, peer: Found) -> Prediction:
        assert peer.version is not None
        tensors = to_tensors(self.transport.fetch(peer.token))
        age = max(0.0, time.time() - peer.version.produced_at)
        return Prediction(task, tensors, peer.version.producer_step, peer.staleness_steps, age)

    def _aged(self, found: PeerPredictions) -> PeerPredictions:
        """As of now: a step, and sometimes an evaluation, is between the look-up and the use."""
        older = time.monotonic() - self._found_at
        usable, misses = {}, dict(found.misses)
        for quantity, prediction in found.by_quantity.items():
            age = prediction.age_seconds + older
            if self.bound.max_seconds is not None and age > self.bound.max_seconds:
                misses[prediction.task] = "stale"
            else:
                usable[quantity] = replace(prediction, age_seconds=age)
        return replace(found, by_quantity=usable, misses=misses)

    def _all_missing(self, reason: str) -> PeerPredictions:
        return PeerPredictions({}, dict.fromkeys(self._known, reason))

    # ---- the "tell" thread ----------------------------------------------------------------

    def _announce(self) -> int:
        welcome: Welcome | None = self.call(self.cache.announce, self.announcement)
        if welcome is None:
            return 0
        if welcome.host != self.transport.host:
            self.transport.join(welcome.host)
        return welcome.window

    def _send(self) -> None:
        for new in self._publications():
            refused = self.publish_now(new)
            self._warn([refused] if refused else [])

    def _publications(self) -> list[Publication]:
        """What is not on its way yet, with its bytes where the cache can find them."""
        taken = []
        while self._unsent:
            try:
                new = self._unsent.popleft()
            except IndexError:  # the other thread was faster
                break
            token = self.transport.publish(new.arrays)
            taken.append(
                Publication(self.task, new.batch, new.place, new.step, token, new.produced_at)
            )
        return taken

    def _warn(self, refused: list[str] | tuple[str, ...]) -> None:
        for reason in refused:
            log.warning("%s: prediction refused by the cache: %s", self.task, reason)
