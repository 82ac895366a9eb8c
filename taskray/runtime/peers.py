"""The other tasks, as one task sees them: through the cache, off the training step's path.

A thread beside the training loop asks a step ahead of the step that uses the answer, and takes
with it what the task has predicted: one call to the cache in each consistency step. A second
thread tells what cannot wait for the next question. No failure of a peer, a server or the cache
reaches the loop: it is a miss, with a reason, counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from taskray.data.streams.batch import Batch
from taskray.exchange.messages import NOT_ANNOUNCED, Answer, Found, Publication, Query, newest
from taskray.job.config import Job
from taskray.loop.interfaces import PeerPredictions, Prediction

log = logging.getLogger(__name__)

CALL_TIMEOUT = 10.0
"""Seconds that a call to the cache or a server may take. No training step waits for one."""

MAX_PENDING_PUBLISHES = 8
"""Beyond this the cache is too slow for us: further predictions are dropped, never queued up."""

ASK_AGAIN = 0.02
"""Seconds after which a task without labels asks again for what a peer has yet to predict."""

SERVER_CHECK_EVERY = 25
"""Steps between two looks at whether the forward server still has its weights."""


class CachePeers:
    """Peers behind a cache actor (and, where the job uses them, forward servers)."""

    def __init__(
        self,
        job: Job,
        task: str,
        quantities: Sequence[str],
        wanted: Mapping[str, int],
        cache: Any,
        server: Any = None,
    ) -> None:
        self.job, self.task, self.quantities = job, task, tuple(quantities)
        self.wanted = dict(wanted)
        self.cache, self.server = cache, server
        self.bound = job.staleness
        self.waits = self.bound.on_stale == "wait"
        # A task without labels has nothing to do but to wait: a miss would cost it a step, and a
        # step that learns nothing is short, so it would run away from its peers for ever.
        self.idle_without = job.labels_of(task) is None
        waits = self.waits or self.idle_without
        self.patience = job.runtime.peer_timeout + (self.bound.wait_seconds if waits else 0)
        self.by_server = job.runtime.publisher == "forward_server"
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="ask")
        self._telling = ThreadPoolExecutor(1, thread_name_prefix="tell")
        self._answer: Future[PeerPredictions] | None = None
        self._asked = threading.Event()  # the look-up for the next publish is on its way
        self._asked.set()
        self._late = False  # an answer is overdue: no step waits until the cache is back
        self._question = 0  # number of the last request
        self._given_up: set[str] = set()  # peers that let us wait in vain, until they are found
        self._outbox: deque[Publication] = deque()  # predictions not yet on their way
        self._published = 0  # at this step last
        self._told = 0  # the cache knows that this task has come so far
        self._known: set[str] = set()
        self._weights: tuple[int, dict[str, np.ndarray]] | None = None
        self.dropped_publishes = 0
        self.frozen = task in job.frozen
        self.active = not self.frozen  # peers may wait for this task
        self.serves = not (self.by_server or self.frozen)  # once it is done, see ``Trainer.serve``

    # ---- what the loop calls --------------------------------------------------------------

    def announce(self, step: int, model: nn.Module) -> None:
        """Join the collective, or come back to it: peers may now look this task up."""
        if self.server is not None and not self.frozen:
            self._refresh_server(step, model)
        self.active = not self.frozen
        self._tell(self._announce, step)

    def request(self, batch: Batch, now: int, use: int) -> None:
        if self._answer is not None:
            self._answer.cancel()
        self._asked.clear()
        self._question += 1
        self._told = now
        self._answer = self._asking.submit(self._ask, batch, now, use, self._question)

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        if self.by_server:
            return
        if len(self._outbox) >= MAX_PENDING_PUBLISHES:
            self.dropped_publishes += 1
            return
        dtype = self.job.cache.dtype
        self._outbox.append(Publication.of(self.task, batch, step, prediction, dtype))
        self._published = step
        if self.waits:  # a peer may be waiting for it now
            self._tell(self._send)

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        answer, self._answer = self._answer, None
        if answer is None:
            return PeerPredictions()
        try:
            late = self._late and not self.idle_without
            found = answer.result(0 if late else self.patience)
        except FutureTimeout:
            answer.cancel()
            self._late = True
            return self._all_missing("timeout")
        self._late = False
        return self._aged(found)

    def stepped(self, step: int, model: nn.Module) -> None:
        if self._outbox and self._published < step - 1:  # no question has taken it along
            self._tell(self._send)
        if self._told < step - 2:  # many supervised steps: staleness is measured against them, too
            self._told = step
            self._tell(self._call, self.cache.progress, self.task, step)
        if self.server is None:
            return
        if step % self.job.forward_server.refresh_every == 0:
            self._refresh_server(step, model)
        elif step % SERVER_CHECK_EVERY == 0:
            self._tell(self._revive_server)

    def retire(self) -> None:
        """Training has ended: the predictions stay, but nobody should wait for new ones. Returns
        when everything told so far has arrived, or should have."""
        self.active = False
        self._tell(self._send)
        last = self._telling.submit(
            self._call, self.cache.retire, self.task, self.quantities, self.serves
        )
        try:
            last.result(CALL_TIMEOUT)
        except FutureTimeout:
            log.info("%s: the cache is slow", self.task)

    # ---- asking, on its own thread --------------------------------------------------------

    def _ask(self, batch: Batch, now: int, use: int, question: int) -> PeerPredictions:
        try:
            query = self._query(batch, now, use)
            answer = self._exchange(query)
            if self.idle_without and not self.waits:
                answer = self._ask_until_they_come(query, answer, question)
            asked = self._ask_servers(batch, answer.found)
            if asked:  # of the others the first answer holds: since then they may have gone on
                again = self._exchange(query).found
                found = answer.found | {t: again[t] for t in asked if t in again}
                answer = replace(answer, found=found)
            self._known |= set(answer.found)
            return self._fetch(answer)
        except ray.exceptions.GetTimeoutError:
            return self._all_missing("timeout")
        except ray.exceptions.RayError:
            return self._all_missing("unavailable")
        except Exception:  # never the loop's business; but somebody should know
            log.exception("%s: a look-up failed", self.task)
            return self._all_missing("unavailable")
        finally:
            self._asked.set()

    def _ask_until_they_come(self, query: Query, answer: Answer, question: int) -> Answer:
        """Ask again while a peer in training has yet to predict on this batch, for up to
        ``wait_seconds``; ends early where the step no longer waits for this question."""
        end = time.monotonic() + self.bound.wait_seconds
        while (coming := self._still_coming(query, answer)) - self._given_up:
            if question != self._question or not self.active:
                return answer
            if time.monotonic() > end:
                self._given_up |= {t for t in coming if self._has_begun(answer, t)}
                break
            time.sleep(ASK_AGAIN)
            answer = self._exchange(query)
        self._given_up -= {t for t, peer in answer.found.items() if peer.version is not None}
        return answer

    def _has_begun(self, answer: Answer, peer: str) -> bool:
        """Whether a peer is on the mediator, and should have come. One whose relations have yet
        to begin is waited for again: to run ahead of it would waste every step until then."""
        return peer not in answer.found or answer.found[peer].has_begun

    def _still_coming(self, query: Query, answer: Answer) -> set[str]:
        """Peers that may yet predict what is missing, by themselves, and quantities whose
        producer has not come to the collective yet."""
        missing = {t: peer for t, peer in answer.found.items() if peer.miss == "absent"}
        coming = {t for t, peer in missing.items() if peer.may_come and not self._is_asked(t, peer)}
        promised = {quantity for peer in answer.found.values() for quantity in peer.quantities}
        return coming | (set(query.quantities) - promised)

    def _query(self, batch: Batch, now: int, use: int) -> Query:
        assert batch.id is not None
        bounded = self.job.mediator is not None and self.job.mediator.window != "all"
        since = batch.window if bounded else -1
        wanted = tuple(quantity for quantity, start in self.wanted.items() if use >= start)
        place = (batch.window, batch.walk, batch.visit)
        return Query(self.task, batch.id, wanted, now, use, *place, since)

    def _exchange(self, query: Query) -> Answer:
        publications = [] if self.waits else self._take_outbox()
        for _ in range(2):
            call = self.cache.exchange.remote(publications, query)
            self._asked.set()
            try:
                answer: Answer | None = ray.get(call, timeout=CALL_TIMEOUT + self.patience)
            except ray.exceptions.RayError:
                self.dropped_publishes += len(publications)
                raise
            if answer is not None:
                self._warn(answer.refused)
                return answer
            self._announce(query.now)  # the cache was restarted and has forgotten us
        return Answer({}, -1)

    def _take_outbox(self) -> list[Publication]:
        taken = []
        while self._outbox:
            try:
                taken.append(self._outbox.popleft())
            except IndexError:  # the other thread was faster
                break
        return taken

    def _warn(self, refused: Sequence[str]) -> None:
        for reason in refused:
            log.warning("%s: prediction refused by the cache: %s", self.task, reason)

    def _ask_servers(self, batch: Batch, found: Mapping[str, Found]) -> list[str]:
        """Let forward servers and frozen tasks fill what is missing; returns whose predictions
        to look up again."""
        asked = [task for task, peer in found.items() if self._is_asked(task, peer)]
        if not asked:
            return []
        inputs = ray.put({k: v.cpu().numpy() for k, v in batch.tensors.items()})  # once, for all
        fills = []
        for peer in (found[task] for task in asked):
            too_old = peer.miss == "stale" and self.bound.max_seconds is not None
            cached = peer.version.producer_step if peer.version and not too_old else None
            fills.append(peer.server.fill.remote(batch.id, inputs, cached, batch.window))
        done, _ = ray.wait(fills, num_returns=len(fills), timeout=CALL_TIMEOUT)
        return asked if done else []

    def _is_asked(self, task: str, peer: Found) -> bool:
        if peer.server is None:
            return False
        if self.by_server and task not in self.job.frozen:
            return True
        may_ask = task in self.job.frozen or self.bound.on_stale == "forward_server"
        return may_ask and peer.miss is not None

    def _fetch(self, answer: Answer) -> PeerPredictions:
        """The arrays of those predictions that will be used: the newest for each quantity."""
        misses = {t: f.miss for t, f in answer.found.items() if f.miss is not None}
        usable = {t: f for t, f in answer.found.items() if f.miss is None}
        chosen: dict[str, Prediction] = {}
        for quantity, task in newest(usable, self.wanted).items():
            try:
                known = [p for p in chosen.values() if p.task == task]
                chosen[quantity] = known[0] if known else self._get(task, usable[task])
            except ray.exceptions.GetTimeoutError:
                misses[task] = "timeout"
            except ray.exceptions.RayError:  # evicted or lost with its node since the look-up
                misses[task] = "unavailable"
        return PeerPredictions(chosen, misses, answer.front, answer.through, time.monotonic())

    def _get(self, task: str, peer: Found) -> Prediction:
        arrays = peer.arrays
        if isinstance(arrays, ray.ObjectRef):
            arrays = ray.get(arrays, timeout=CALL_TIMEOUT)
        # NumPy converts in this thread alone; torch would start a team of threads for it
        tensors = {q: torch.from_numpy(np.array(a, np.float32)) for q, a in arrays.items()}
        return peer.prediction(task, tensors)

    def _all_missing(self, reason: str) -> PeerPredictions:
        return PeerPredictions({}, dict.fromkeys(self._known, reason))

    def _aged(self, found: PeerPredictions) -> PeerPredictions:
        """As of now: a step, and sometimes an evaluation, lies between the look-up and the use."""
        older = time.monotonic() - found.asked_at
        usable, misses = {}, dict(found.misses)
        for quantity, prediction in found.by_quantity.items():
            age = prediction.age_seconds + older
            if self.bound.max_seconds is not None and age > self.bound.max_seconds:
                misses[prediction.task] = "stale"
            else:
                usable[quantity] = replace(prediction, age_seconds=age)
        return replace(found, by_quantity=usable, misses=misses)

    # ---- telling, on its own thread -------------------------------------------------------

    def _tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        self._telling.submit(what, *arguments)

    def _call(self, method: Any, *arguments: Any) -> Any:
        """One call to the cache or a server; None when it does not answer."""
        try:
            return ray.get(method.remote(*arguments), timeout=CALL_TIMEOUT)
        except ray.exceptions.RayError as error:
            log.info("%s: %s", self.task, type(error).__name__)
            return None

    def _announce(self, step: int) -> None:
        serves = self.serves and not self.active
        self._call(
            self.cache.announce, self.task, self.quantities, step, self.server, self.active, serves
        )

    def _send(self) -> None:
        if self.waits:
            # A waiting look-up must reach the cache before the publish that sets the peer free
            # to move on, or the peer's next step would make its own prediction stale.
            self._asked.wait(CALL_TIMEOUT)
        for new in self._take_outbox():
            refused = self._call(self.cache.publish, new)
            if refused == NOT_ANNOUNCED:
                self._announce(new.step)
                refused = self._call(self.cache.publish, new)
            self._warn([refused] if refused else [])

    def _refresh_server(self, step: int, model: nn.Module) -> None:
        state = {k: v.detach().cpu().numpy().copy() for k, v in model.state_dict().items()}
        self._weights = (step, state)
        self._tell(self._send_weights)

    def _send_weights(self) -> None:
        if self._weights is not None:
            self._call(self.server.refresh, *self._weights)

    def _revive_server(self) -> None:
        """A forward server that was restarted has lost its weights: send the same ones again."""
        if self._weights and self._call(self.server.version) != self._weights[0]:
            self._send_weights()
