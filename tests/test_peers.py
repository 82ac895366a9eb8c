"""How a task looks its peers up in the background, over a cache that is scripted."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from collectives import tiny_job

from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.exchange.messages import Answer, Found, Question
from taskray.exchange.staleness import Version
from taskray.exchange.transport import ByValue
from taskray.loop.wiring import wire
from taskray.runtime import cache_link
from taskray.runtime.peers import OLD_ANSWER, CachePeers

BATCH = Batch({"image": torch.zeros(2, 3, 4, 6)}, 3, Place(0, 3, 4))
ARRAYS = {"normals": np.ones((2, 3, 4, 6), np.float16)}


class Link(cache_link.CacheLink):
    """Answers as it is told, and remembers the questions."""

    def __init__(self) -> None:
        self.transport = cache_link.Transport()
        self.questions: list[Question] = []
        self.answer = self.answered(step=7)

    def answered(self, step: int, **found: Any) -> Answer:
        version = Version(step, time.time())
        normals = Found(("normals",), version=version, token=ByValue(ARRAYS), **found)
        return Answer(5, {"normals": normals}, {"normals": "normals"})

    def exchange(self, question: Question, timeout: float, publish: bool) -> Answer:
        self.questions.append(question)
        return self.answer

    def moved(self, step: int, place: Place | None) -> None: ...

    def asking(self) -> None: ...


def peers(monkeypatch: pytest.MonkeyPatch, *settings: str) -> tuple[CachePeers, Link]:
    monkeypatch.setattr(cache_link, "object_store_bytes", lambda: 0)
    job = tiny_job(*settings)
    made = CachePeers(job, "depth", wire(job), cache=None)
    made.link = link = Link()
    return made, link


def test_what_was_found_a_step_ahead_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made, link = peers(monkeypatch)
    made.ask(BATCH, 6, 7)
    found = made.collect(BATCH, 7)
    assert (found.window, found.by_quantity["normals"].producer_step) == (5, 7)
    assert found.by_quantity["normals"].tensors["normals"].dtype == torch.float32
    assert [question.step for question in link.questions] == [6]


def test_an_answer_that_has_become_old_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, link = peers(monkeypatch)
    made.ask(BATCH, 6, 7)
    assert made._answer is not None
    made._answer.result()
    made._found_at -= OLD_ANSWER  # a long step, an evaluation, a checkpoint
    link.answer = link.answered(step=9)
    assert made.collect(BATCH, 7).by_quantity["normals"].producer_step == 9
    assert [question.step for question in link.questions] == [6, 7]


def test_where_tasks_wait_for_each_other_no_second_question_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, link = peers(monkeypatch, "staleness.on_stale=wait")
    made.ask(BATCH, 6, 7)
    assert made._answer is not None
    made._answer.result()
    made._found_at -= OLD_ANSWER
    made.collect(BATCH, 7)
    assert len(link.questions) == 1


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        ({"trains": True}, False),
        ({"trains": True, "miss": "stale"}, True),
        ({"trains": False}, False),
        ({"trains": False, "staleness_steps": 3}, True),  # it has ended later
    ],
)
def test_a_peer_that_predicts_on_demand_is_asked_where_it_has_something_newer(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], asked: bool
) -> None:
    made, link = peers(monkeypatch)
    requests: list[dict[str, Found]] = []
    monkeypatch.setattr(
        made, "_let_predict", lambda batch, answer: requests.append(dict(answer.found)) or []
    )
    link.answer = link.answered(step=7, on_demand=object(), **found)
    made.ask(BATCH, 6, 7)
    made.collect(BATCH, 7)
    ((peer,),) = [request.values() for request in requests]
    assert made._is_worth_asking(peer) is asked


def test_a_failing_look_up_is_a_miss_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made, link = peers(monkeypatch)
    made.ask(BATCH, 6, 7)
    made.collect(BATCH, 7)

    def fail(question: Question, timeout: float, publish: bool) -> Answer:
        raise RuntimeError("a bug")

    monkeypatch.setattr(link, "exchange", fail)
    made.ask(BATCH, 7, 8)
    assert made.collect(BATCH, 8).misses == {"normals": "unavailable"}
