"""Looking up what peers have predicted on a batch, and what is worth waiting for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from taskray.exchange.messages import Answer, Found, Question
from taskray.exchange.producer import Producer
from taskray.exchange.shared_memory import Lost
from taskray.exchange.shelf import Entry, Key, Shelf
from taskray.exchange.staleness import window_bound, within
from taskray.exchange.transport import CacheTransport
from taskray.job.config import StalenessConfig


class LookUp:
    """Reads what the cache holds; changes nothing.

    Args:
        producers: by task.
        shelf: their predictions.
        bound: how old one may be.
        windowed: whether the mediator is passed over window by window, which bounds the age.
        clock: seconds, as ``time.time``.
    """

    def __init__(
        self,
        producers: Mapping[str, Producer],
        shelf: Shelf,
        bound: StalenessConfig,
        windowed: bool,
        clock: Callable[[], float],
    ) -> None:
        self.producers, self.shelf, self.bound = producers, shelf, bound
        self.windowed, self.clock = windowed, clock

    def found(self, question: Question) -> tuple[dict[str, Found], dict[str, str]]:
        """For every peer that predicts one of the quantities: its prediction on the batch, or why
        there is none. And for each quantity the task with the newest usable prediction; the
        tokens of others are left out, because only what is used should travel."""
        found = {task: self._found(task, peer, question) for task, peer in self._peers(question)}
        newest: dict[str, str] = {}
        for task, peer in found.items():
            for quantity in set(question.quantities) & set(peer.quantities):
                if peer.miss is None:
                    best = newest.setdefault(quantity, task)
                    newest[quantity] = max(best, task, key=lambda t: _produced_at(found[t]))
        for task in found.keys() - set(newest.values()):
            found[task] = replace(found[task], token=None)
        return found, newest

    def awaited(self, question: Question) -> set[str]:
        """The peers that a question waits for, and the quantities that it waits for a peer to
        announce. Empty where the task does not wait."""
        if not (question.blocks_on_miss or self.bound.on_stale == "wait"):
            return set()
        if not self.producers[question.consumer].trains:  # it has ended: nothing to wait for
            return set()
        peers = dict(self._peers(question))
        announced = {quantity for peer in peers.values() for quantity in peer.quantities}
        late = {task for task, peer in peers.items() if self._is_awaited(task, peer, question)}
        return late | (set(question.quantities) - announced)

    def _peers(self, question: Question) -> Iterator[tuple[str, Producer]]:
        for task, producer in self.producers.items():
            if task != question.consumer and set(question.quantities) & set(producer.quantities):
                yield task, producer

    def _entry(self, task: str, question: Question) -> Entry | None:
        return self.shelf.get(Key(task, question.place.window, question.batch))

    def _is_awaited(self, task: str, peer: Producer, question: Question) -> bool:
        if not peer.trains or peer.on_demand is not None:  # it will not come, or is asked
            return False
        if peer.published is not None and peer.published >= question.place:
            return False
        entry = self._entry(task, question)
        return entry is None or not self._is_fresh(entry, peer, question)

    def _is_fresh(self, entry: Entry, peer: Producer, question: Question) -> bool:
        """Whether there is no need to wait for a newer prediction. Counted in visits of the
        mediator, which all tasks make in the same order: from the steps of a task it cannot be
        known when a peer comes to a batch."""
        if self.bound.on_stale != "wait":
            return True
        age = self.clock() - entry.version.produced_at
        if self.bound.max_seconds is not None and age > self.bound.max_seconds:
            return False
        if self.bound.max_steps is None:
            return True
        return question.place.visit - entry.visit <= self.bound.max_steps / peer.steps_per_visit

    def _found(self, task: str, peer: Producer, question: Question) -> Found:
        window = question.place.size if self.windowed else None
        found = Found(
            peer.quantities,
            trains=peer.trains,
            on_demand=peer.on_demand,
            bound=window_bound(window, peer.steps_per_visit),
        )
        entry = self._entry(task, question)
        if entry is None or not self.shelf.transport.has(entry.token):
            return replace(found, miss="absent")
        staleness = peer.count.made - entry.made
        age = self.clock() - entry.version.produced_at
        found = replace(found, version=entry.version, staleness_steps=staleness)
        if not within(self.bound, staleness, age, found.bound):
            return replace(found, miss="stale")
        return replace(found, token=entry.token)


def handed_out(answer: Answer, transport: CacheTransport, host: str) -> Answer:
    """The answer with tokens that a reader on ``host`` (``Transport.host``) can fetch."""
    found = {}
    for task, peer in answer.found.items():
        if peer.token is not None:
            try:
                peer = replace(peer, token=transport.hand_out(peer.token, host))
            except Lost:
                peer = replace(peer, miss="unavailable", token=None)
        found[task] = peer
    newest = {q: t for q, t in answer.newest.items() if found[t].token is not None}
    return replace(answer, found=found, newest=newest)


def _produced_at(found: Found) -> float:
    return found.version.produced_at if found.version else 0.0
