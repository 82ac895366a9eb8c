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
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

import ray
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.exchange.arrays import to_arrays, to_tensors
from taskray.exchange.messages import Announcement, Answer, Found, Made, Question
from taskray.exchange.shared_memory import Lost
from taskray.job.config import Job
from taskray.loop.interfaces import PeerPredictions, Prediction
from taskray.loop.wiring import Wiring
from taskray.runtime.answering import Request
from taskray.runtime.cache_link import CALL_TIMEOUT, CacheLink

log = logging.getLogger(__name__)

OLD_ANSWER = 0.25
"""Seconds after which an answer is asked for again before it is used: the peers have trained on. A
task whose steps are so long does not notice the call, and after a pause (an evaluation, a
checkpoint) it is due."""

LONG_STEP = 0.1
"""Seconds since the last question beyond which a prediction is sent at once. With the next question
it would reach the peers of a slow task late, and one more call costs a slow task nothing."""


class CachePeers:
    """Implements ``loop.interfaces.Peers`` over Ray.

    Args:
        job: of the run.
        task: name of the task.
        wiring: of the collective.
        cache: handle of the cache actor.
    """

    def __init__(self, job: Job, task: str, wiring: Wiring, cache: Any) -> None:
        self.job, self.task, self.role, self.bound = job, task, wiring.roles[task], job.staleness
        role = self.role
        self.link = CacheLink(
            Announcement(task, role.publishes, steps_per_visit=role.steps_per_visit), cache
        )
        self.on_step: Callable[[int], None] = lambda step: None
        """Called after each step with the number of steps made."""
        self.by_server = job.runtime.publisher == "forward_server"
        self.waits = self.bound.on_stale == "wait"
        blocks = self.waits or role.blocks_on_miss
        self.patience = job.runtime.peer_timeout + (self.bound.wait_seconds if blocks else 0)
        self.at_once = self.waits or wiring.blocks  # a peer may wait for what this task publishes
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="ask")
        self._answer: Future[PeerPredictions] | None = None
        self._question = Question(task, (), 0)
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
        self.link.moved(step, batch.place)
        self._told, self._asked_at = step, time.monotonic()
        self.link.asking()
        self._question = question
        self._answer = self._asking.submit(self._look_up, batch, question)

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        if self.by_server:
            return
        assert batch.id is not None
        arrays = to_arrays(prediction, self.job.cache.dtype)
        self.link.keep(Made(batch.id, batch.place, step, arrays))
        if self.at_once or time.monotonic() - self._asked_at > LONG_STEP:
            self.link.tell(self.link.send, self.waits)

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        answer, self._answer = self._answer, None
        if answer is None:
            return PeerPredictions()
        try:
            late = self._late and not self.role.blocks_on_miss
            found = answer.result(0 if late else self.patience)
            if not self.waits and time.monotonic() - self._found_at > OLD_ANSWER:
                question = replace(self._question, step=step)
                again = self._answer = self._asking.submit(self._look_up, batch, question)
                found, self._answer = again.result(self.patience), None
        except FutureTimeout:
            answer.cancel()
            self._late = True
            return self._all_missing("timeout")
        self._late = False
        return self._aged(found)

    def stepped(self, step: int) -> None:
        unsent = self.link.unsent_since()
        if unsent is not None and unsent < step - 2:  # no question has taken it along
            self.link.tell(self.link.send)
        if self._told < step - 2:  # many supervised steps: staleness is measured against them, too
            self._told = step
            self.link.progress(step)
        self.on_step(step)

    # ---- the "ask" thread -----------------------------------------------------------------

    def _look_up(self, batch: Batch, question: Question) -> PeerPredictions:
        try:
            answer = self._exchange(question)
            asked = self._let_predict(batch, answer)
            if asked:  # the first answer stays for the others: they may have gone on since
                quantities = tuple({q for t in asked for q in answer.found[t].quantities})
                again = self._exchange(replace(question, quantities=quantities))
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
        finally:
            self._found_at = time.monotonic()

    def _exchange(self, question: Question) -> Answer:
        return self.link.exchange(question, CALL_TIMEOUT + self.patience, not self.at_once)

    def _let_predict(self, batch: Batch, answer: Answer) -> list[str]:
        """Let peers predict that do so on demand; returns their names."""
        asked = {
            task: peer
            for task, peer in answer.found.items()
            if peer.on_demand is not None and self._is_worth_asking(peer)
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

    def _is_worth_asking(self, peer: Found) -> bool:
        """Whether a peer that predicts on demand may have something newer."""
        if peer.trains:  # its forward server may have newer weights
            return self.by_server or peer.miss is not None
        return peer.miss is not None or peer.staleness_steps > 0

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
        bounds = {t: f.bound for t, f in answer.found.items() if f.bound is not None}
        return PeerPredictions(chosen, misses, answer.window, bounds)

    def _fetch(self, task: str, peer: Found) -> Prediction:
        assert peer.version is not None
        tensors = to_tensors(self.link.transport.fetch(peer.token))
        age = max(0.0, time.time() - peer.version.produced_at)
        return Prediction(task, tensors, peer.version.producer_step, peer.staleness_steps, age)

    def _all_missing(self, reason: str) -> PeerPredictions:
        return PeerPredictions({}, dict.fromkeys(self._known, reason))

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
