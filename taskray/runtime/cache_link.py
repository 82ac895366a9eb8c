"""One task's line to the prediction cache: announcements, publications, questions.

A failure of the cache is None or a RayError for the caller. A cache that was restarted gets the
announcement again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

import ray

from taskray.data.streams.order import Place
from taskray.exchange.cache import NOT_ANNOUNCED
from taskray.exchange.messages import Announcement, Answer, Made, Publication, Question, Welcome
from taskray.exchange.transport import Transport

log = logging.getLogger(__name__)

CALL_TIMEOUT = 10.0
"""Seconds for a call to the cache or a server; it happens in the background."""

MAX_UNSENT = 8
"""Predictions that may wait to be sent; more are dropped and counted."""


def get_object(ref: Any) -> Any:
    """An object of Ray's object store."""
    return ray.get(ref, timeout=CALL_TIMEOUT)


def object_store_bytes() -> int:
    """The shared memory of this machine that Ray's object store may take."""
    here = ray.get_runtime_context().get_node_id()
    resources: dict[str, float] = next(
        (node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {}
    )
    return int(resources.get("object_store_memory", 0))


class CacheLink:
    """Calls the cache for one task, in the background where nothing is waited for.

    Args:
        announcement: of the task; see :meth:`announce`.
        cache: handle of the cache actor.
    """

    def __init__(self, announcement: Announcement, cache: Any) -> None:
        self.announcement, self.cache = announcement, cache
        self.transport = Transport(get=get_object, reserve=object_store_bytes())
        self.dropped_publishes = 0
        self._unsent: deque[Made] = deque()
        self._asked = threading.Event()  # the last question is on its way
        self._asked.set()
        self._telling = ThreadPoolExecutor(1, thread_name_prefix="tell")

    # ---- joining and leaving --------------------------------------------------------------

    def announce(self, step: int, place: Place | None, on_demand: Any = None) -> int:
        """Join the collective, or come back to it. Returns the mediator window to be in; 0 where
        the cache does not answer."""
        self.moved(step, place)
        self.announcement = replace(self.announcement, on_demand=on_demand)
        return self.announce_again()

    def announce_again(self) -> int:
        """As :meth:`announce`, in case the cache was restarted: it has forgotten the task."""
        welcome: Welcome | None = self.call(self.cache.announce, self.announcement)
        if welcome is None:
            return 0
        if welcome.host != self.transport.host:
            self.transport.join(welcome.host)
        return welcome.window

    def retire(self, step: int, on_demand: Any) -> None:
        """Training has ended: the predictions stay, and ``on_demand`` predicts when it is asked.
        Returns when all that was sent so far has arrived, or after a time limit."""
        self.announcement = replace(self.announcement, step=step, trains=False, on_demand=on_demand)
        self.tell(self.send)
        try:
            self._telling.submit(self.announce_again).result(CALL_TIMEOUT)
        except FutureTimeout:
            log.info("%s: the cache is slow", self.announcement.task)

    def moved(self, step: int, place: Place | None) -> None:
        """Where the task is, for the next announcement."""
        self.announcement = replace(self.announcement, step=step, place=place)

    def progress(self, step: int) -> None:
        """Tell the cache that the task has made ``step`` steps."""
        self.moved(step, self.announcement.place)
        self.tell(self._progress, step)

    def _progress(self, step: int) -> None:
        if self.call(self.cache.progress, self.announcement.task, step) is False:
            self.announce_again()

    # ---- predictions ----------------------------------------------------------------------

    def keep(self, new: Made) -> None:
        """Keep a prediction until it is sent: with the next question, or by :meth:`send`."""
        if len(self._unsent) < MAX_UNSENT:
            self._unsent.append(new)
        else:
            self.dropped_publishes += 1

    def unsent_since(self) -> int | None:
        """The step of the oldest prediction that is not on its way; None: all are."""
        return self._unsent[0].step if self._unsent else None

    def send(self, after_the_question: bool = False) -> None:
        """Send what is not on its way yet; where tasks wait for each other, after the question
        about the same batch: its publication frees the peers, and a question that comes later
        would find that they have gone on."""
        if after_the_question:
            self._asked.wait(CALL_TIMEOUT)
        for new in self._taken():
            refused = self.publish(new)
            self._warn([refused] if refused else [])

    def publish(self, new: Made) -> str | None:
        """Hand a prediction to the cache; returns the reason of a refusal."""
        refused: str | None = self.call(self.cache.publish, self._publication(new))
        if refused == NOT_ANNOUNCED:
            self.announce_again()
            refused = self.call(self.cache.publish, self._publication(new))
        return refused

    def asking(self) -> None:
        """A question will follow: see :meth:`send`."""
        self._asked.clear()

    def exchange(self, question: Question, timeout: float, publish: bool) -> Answer:
        """The answer to a question; with it goes what is not sent yet, if ``publish``. Raises
        RayError where the cache does not answer."""
        taken = self._taken() if publish else []
        try:
            for _ in range(2):
                publications = [self._publication(new) for new in taken]
                call = self.cache.exchange.remote(publications, question, self.transport.host)
                self._asked.set()
                answer: Answer | None = ray.get(call, timeout=timeout)
                if answer is not None:
                    self._warn(answer.refused)
                    return answer
                self.announce_again()  # the cache was restarted, and has nothing of this task
        except ray.exceptions.RayError:
            self.dropped_publishes += len(taken)
            raise
        finally:
            self._asked.set()
        return Answer()

    # ---- calls ----------------------------------------------------------------------------

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        """Call ``what`` in the background; one after the other."""
        self._telling.submit(what, *arguments)

    def call(self, method: Any, *arguments: Any) -> Any:
        """One call to an actor; None when it does not answer."""
        try:
            return ray.get(method.remote(*arguments), timeout=CALL_TIMEOUT)
        except ray.exceptions.RayError as error:
            log.info("%s: %s", self.announcement.task, type(error).__name__)
            return None

    def _taken(self) -> list[Made]:
        """What is not on its way yet."""
        taken = []
        while self._unsent:
            try:
                taken.append(self._unsent.popleft())
            except IndexError:  # the other thread was faster
                break
        return taken

    def _publication(self, new: Made) -> Publication:
        """With the bytes where this cache can find them."""
        token = self.transport.publish(new.arrays)
        task = self.announcement.task
        return Publication(task, new.batch, new.place, new.step, token, new.produced_at)

    def _warn(self, refused: Sequence[str]) -> None:
        for reason in refused:
            task = self.announcement.task
            log.warning("%s: prediction refused by the cache: %s", task, reason)
