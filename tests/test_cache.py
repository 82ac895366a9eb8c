"""The prediction cache and the staleness bound, as plain Python."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from collectives import tiny_job
from taskray.exchange.waiting import WaitingCache
from taskray.loop.staleness import Version, within, worth_waiting_for

from taskray.errors import InputError
from taskray.exchange.cache import Awaited, PredictionCache
from taskray.exchange.messages import NOT_ANNOUNCED, Publication, Query
from taskray.job.config import Job, StalenessConfig
from taskray.loop.assembly import build_tasks

WAIT = StalenessConfig(max_steps=0, on_stale="wait", wait_seconds=5)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def depth(value: float = 1.0, batch: int = 2, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {"depth": np.full((batch, 1, 4, 6), value, dtype)}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> PredictionCache:
    cache = PredictionCache(max_bytes=1000, clock=clock)
    cache.announce("depth", ["depth"])
    cache.announce("normals", ["normals"])
    return cache


def test_a_peer_finds_what_was_published_with_its_version(cache, clock):
    assert cache.publish(Publication("depth", 7, 40, clock.now, depth(3.0))) is None
    cache.progress("depth", 65)
    found = cache.look_up(Query("normals", 7, ("depth",)))["depth"]
    assert found.miss is None
    assert found.version == Version(40, clock.now)
    assert found.staleness_steps == 25
    assert found.arrays["depth"].max() == 3.0


def test_a_task_never_finds_its_own_prediction(cache, clock):
    cache.publish(Publication("depth", 7, 40, clock.now, depth()))
    assert cache.look_up(Query("depth", 7, ("depth",))) == {}


def test_a_batch_nobody_predicted_on_is_absent(cache):
    assert cache.look_up(Query("normals", 7, ("depth",)))["depth"].miss == "absent"


def test_publishing_the_same_version_again_changes_nothing(cache, clock):
    cache.publish(Publication("depth", 7, 40, clock.now, depth(1.0)))
    cache.publish(Publication("depth", 7, 40, clock.now, depth(2.0)))
    found = cache.look_up(Query("normals", 7, ("depth",)))["depth"]
    assert found.arrays["depth"].max() == 1.0
    assert cache.statistics()["entries"] == 1


def test_a_late_arrival_does_not_replace_a_newer_prediction(cache, clock):
    cache.publish(Publication("depth", 7, 40, clock.now, depth(1.0)))
    cache.publish(Publication("depth", 7, 30, clock.now - 5, depth(2.0)))
    assert cache.look_up(Query("normals", 7, ("depth",)))["depth"].version.producer_step == 40


def test_a_task_that_went_back_to_its_checkpoint_replaces_its_old_predictions(cache, clock):
    cache.publish(Publication("depth", 7, 40, clock.now, depth(1.0)))
    cache.announce("depth", ["depth"], step=20)
    found = cache.look_up(Query("normals", 7, ("depth",)))["depth"]
    assert found.staleness_steps == 0  # it is not younger than new
    cache.publish(Publication("depth", 7, 30, clock.now + 5, depth(2.0)))
    found = cache.look_up(Query("normals", 7, ("depth",)))["depth"]
    assert found.version.producer_step == 30


def test_the_byte_budget_is_kept_by_evicting_the_oldest(cache, clock):
    for batch in range(10):
        assert cache.publish(Publication("depth", batch, batch, clock.now + batch, depth())) is None
        assert cache.num_bytes <= 1000
    statistics = cache.statistics()
    assert statistics["entries"] == 5  # 192 bytes each
    assert statistics["bytes"] == 5 * 192
    assert statistics["evictions"] == 5
    assert cache.look_up(Query("normals", 0, ("depth",)))["depth"].miss == "absent"
    assert cache.look_up(Query("normals", 9, ("depth",)))["depth"].miss is None


def test_a_replaced_prediction_counts_as_young_again(cache, clock):
    for batch in range(5):
        cache.publish(Publication("depth", batch, 0, clock.now + batch, depth()))
    cache.publish(Publication("depth", 0, 9, clock.now + 9, depth()))
    cache.publish(Publication("depth", 99, 10, clock.now + 10, depth()))
    assert cache.look_up(Query("normals", 0, ("depth",)))["depth"].miss is None
    assert cache.look_up(Query("normals", 1, ("depth",)))["depth"].miss == "absent"


def test_a_prediction_beyond_the_whole_budget_is_refused(cache, clock):
    reason = cache.publish(Publication("depth", 0, 0, clock.now, depth(batch=100)))
    assert "whole budget" in reason
    assert cache.statistics()["refused"] == 1


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"depth": np.full((2, 1, 4, 6), np.nan, "float32")}, "not finite"),
        ({"depth": np.full((2, 1, 4, 6), np.inf, "float16")}, "not finite"),
        ({"depth": np.ones((2, 3, 4, 6), "float32")}, "shape"),
        ({"depth": np.ones((2, 1, 4, 6), "int64")}, "not an array of floats"),
        ({"normals": np.ones((2, 3, 4, 6), "float32")}, "announced"),
        ({}, "announced"),
        ({"depth": "text"}, "not an array"),
    ],
)
def test_a_bad_prediction_is_refused_counted_and_named(cache, clock, arrays, reason):
    answer = cache.publish(Publication("depth", 0, 0, clock.now, arrays))
    assert reason in answer
    assert cache.statistics()["refused"] == 1
    assert "depth" in next(iter(cache.statistics()["refusals"]))
    assert cache.look_up(Query("normals", 0, ("depth",)))["depth"].miss == "absent"


def test_a_restarted_cache_asks_publishers_to_announce_themselves():
    assert PredictionCache(1000).publish(Publication("depth", 0, 0, 0.0, depth())) == NOT_ANNOUNCED


@pytest.mark.parametrize(
    ("bound", "steps_ago", "seconds_ago", "usable"),
    [
        (StalenessConfig(), 10**6, 10**6, True),
        (StalenessConfig(max_steps=20), 20, 0, True),
        (StalenessConfig(max_steps=20), 21, 0, False),
        (StalenessConfig(max_steps=0), 0, 0, True),
        (StalenessConfig(max_seconds=5), 10**6, 5, True),
        (StalenessConfig(max_seconds=5), 0, 5.1, False),
        (StalenessConfig(max_steps=20, max_seconds=5), 21, 1, False),
    ],
)
def test_the_bound_holds_to_the_step_and_the_second(bound, steps_ago, seconds_ago, usable):
    version = Version(1000, 50.0)
    assert within(bound, version, 1000 + steps_ago, 50.0 + seconds_ago) is usable


def test_a_stale_prediction_is_named_and_withheld(cache, clock):
    cache.publish(Publication("depth", 7, 40, clock.now, depth()))
    cache.progress("depth", 61)
    cache.bound = StalenessConfig(max_steps=20)
    found = cache.look_up(Query("normals", 7, ("depth",)))["depth"]
    assert (found.miss, found.arrays, found.staleness_steps) == ("stale", None, 21)


def test_waiting_goes_by_the_consumers_own_step():
    bound = StalenessConfig(max_steps=4, on_stale="wait")
    assert worth_waiting_for(bound, None, 10, 0.0)
    assert worth_waiting_for(bound, Version(5, 0.0), 10, 0.0)
    assert not worth_waiting_for(bound, Version(6, 0.0), 10, 0.0)


def walk_together(job: Job) -> bool:
    """Whether tasks that wait for each other come to their last steps, each as far as it can."""
    assert job.mediator is not None
    begins = job.consistency["depth_normals"].start_step
    steps = dict.fromkeys(job.tasks, 0)
    batches = dict.fromkeys(job.tasks, 0)
    made: dict[tuple[str, int], Version] = {}
    while going := [name for name in steps if steps[name] < job.steps_of(name)]:
        before = dict(steps)
        for name in going:
            step, batch = steps[name], batches[name]
            if not job.labels_of(name) or (step >= begins and job.mediator.has_turn(step)):
                made.setdefault((name, batch), Version(step, 0.0))
                peers = [made.get((peer, batch)) for peer in going if peer != name]
                if any(worth_waiting_for(job.staleness, peer, step, 0.0) for peer in peers):
                    continue
                batches[name] += 1
            steps[name] += 1
        if steps == before:
            return False
    return True


@pytest.mark.parametrize(
    ("supervised", "consistency", "begins", "needed"),
    [(1, 1, 0, 20), (3, 2, 0, 24), (0, 1, 0, 0), (1, 1, 10, 25), (0, 1, 7, 7)],
)
def test_a_bound_is_refused_where_tasks_would_wait_for_each_other_for_ever(
    supervised: int, consistency: int, begins: int, needed: int
) -> None:
    for bound in {0, needed - 1, needed} - {-1}:
        job = tiny_job(
            "tasks.normals.dedicated=null",
            f"mediator.supervised_steps={supervised}",
            f"mediator.consistency_steps={consistency}",
            f"consistency.depth_normals.start_step={begins}",
            f"staleness={{max_steps: {bound}, on_stale: wait}}",
        )
        assert walk_together(job) is (bound >= needed)
        if bound >= needed:
            build_tasks(job)
        else:
            with pytest.raises(InputError, match=f"staleness.max_steps: .* at least {needed} "):
                build_tasks(job)


def test_what_begins_elsewhere_does_not_loosen_the_bound():
    job = tiny_job(
        "tasks.normals.dedicated=null",
        "tasks.shapes={task: segmentation, dedicated: labelled}",
        "consistency.depth_normals.start_step=20",
        "consistency.other={relation: 'faults:OfShapesAlone'}",
        "staleness={max_steps: 22, on_stale: wait}",
    )
    with pytest.raises(InputError, match=r"staleness.max_steps: .* at least 30 "):
        build_tasks(job)


def test_tasks_that_all_have_labels_may_wait_in_lock_step():
    job = tiny_job("staleness={max_steps: 0, on_stale: wait}")
    assert walk_together(job)
    build_tasks(job)


def test_nobody_waits_for_a_task_that_has_ended(cache):
    cache.bound = WAIT
    query = Query("normals", 0, ("depth",), use=5)
    assert cache.awaited(query) is Awaited.PREDICTION
    cache.retire("depth", ["depth"])
    assert cache.awaited(query) is Awaited.NOTHING


def test_nobody_waits_for_a_task_that_failed_before_it_began(clock):
    cache = PredictionCache(1000, WAIT, clock=clock)
    query = Query("normals", 0, ("depth",), use=5)
    cache.announce("normals", ["normals"])
    assert cache.awaited(query) is Awaited.PREDICTION
    cache.retire("depth", ["depth"])
    assert cache.awaited(query) is Awaited.NOTHING


def test_a_prediction_of_an_earlier_window_is_none_to_make_do_with(clock):
    cache = PredictionCache(1000, StalenessConfig(on_stale="wait"), clock=clock)
    cache.announce("depth", ["depth"])
    query = Query("normals", 3, ("depth",), window=8, since=8)
    cache.publish(Publication("depth", 3, 4, 1.0, depth(), window=0))
    assert cache.look_up(query)["depth"].miss == "absent"
    assert cache.awaited(query) is Awaited.PREDICTION
    cache.publish(Publication("depth", 3, 12, 2.0, depth(), window=8))
    assert cache.look_up(query)["depth"].miss is None
    assert cache.awaited(query) is Awaited.NOTHING


def test_a_peer_that_has_made_the_visit_does_not_come_back_to_it(clock):
    cache = PredictionCache(1000, StalenessConfig(on_stale="wait"), clock=clock)
    for task in ("depth", "normals"):
        cache.announce(task, [task])
    behind = Query("normals", 3, ("depth",), window=8, since=8, visit=11)
    ahead = Query("depth", 5, ("normals",), window=8, since=8, visit=13)
    cache.arrive(behind)
    cache.arrive(ahead)
    assert cache.awaited(ahead) is Awaited.PREDICTION
    assert cache.awaited(behind) is Awaited.LATE


def test_who_waits_is_not_held_up_for_ever_by_a_peer_ahead_of_it():
    async def scene() -> tuple[float, dict]:
        cache = WaitingCache(1000, StalenessConfig(on_stale="wait", wait_seconds=60))
        for task in ("depth", "normals"):
            await cache.announce(task, [task])
        behind = Query("normals", 3, ("depth",), window=8, since=8, visit=11)
        ahead = Query("depth", 5, ("normals",), window=8, since=8, visit=13)
        waiting = asyncio.create_task(cache.exchange([], behind))
        await asyncio.sleep(0.05)
        other = asyncio.create_task(cache.exchange([], ahead))  # now each waits for the other
        began = time.monotonic()
        found = (await waiting).found
        other.cancel()
        return time.monotonic() - began, found

    seconds, found = asyncio.run(scene())
    assert 1.5 < seconds < 10
    assert found["depth"].miss == "absent"


def test_who_is_done_and_serves_waits_for_nobody_and_is_waited_for(clock):
    cache = PredictionCache(1000, StalenessConfig(on_stale="wait"), clock=clock)
    cache.announce("normals", ["normals"])
    cache.announce("depth", ["depth"], active=False, serves=True)
    assert cache.awaited(Query("depth", 3, ("normals",), window=8)) is Awaited.NOTHING
    query = Query("normals", 3, ("depth",), window=8, since=8, visit=9)
    assert cache.awaited(query) is Awaited.PREDICTION
    cache.arrive(Query("depth", 0, ("normals",), window=16, visit=16))  # it has left the window
    assert cache.awaited(query) is Awaited.NOTHING


def test_an_answer_tells_whether_a_peer_has_come_to_the_mediator(cache):
    query = Query("normals", 3, ("depth",))
    assert not cache.look_up(query)["depth"].has_begun
    cache.arrive(Query("depth", 3, ("normals",)))
    assert cache.look_up(query)["depth"].has_begun


def test_a_waiting_look_up_is_answered_by_the_publish_it_waits_for(clock):
    async def scene() -> tuple[bool, dict]:
        cache = WaitingCache(1000, WAIT)
        for task in ("depth", "normals"):
            await cache.announce(task, [task])
        await cache.publish(Publication("depth", 3, 2, 1.0, depth()))
        waiting = asyncio.create_task(cache.exchange([], Query("normals", 3, ("depth",), 3, 4)))
        await asyncio.sleep(0.05)
        too_early = waiting.done()
        await cache.publish(Publication("depth", 3, 4, 2.0, depth()))
        return too_early, (await waiting).found

    too_early, found = asyncio.run(scene())
    assert not too_early
    assert found["depth"].version.producer_step == 4
    assert found["depth"].staleness_steps == 0


def test_a_waiting_look_up_gives_up_in_time():
    async def scene() -> dict:
        cache = WaitingCache(1000, WAIT.model_copy(update={"wait_seconds": 0.05}))
        for task in ("depth", "normals"):
            await cache.announce(task, [task])
        return (await cache.exchange([], Query("normals", 3, ("depth",), 3, 4))).found

    assert asyncio.run(scene())["depth"].miss == "absent"


def test_an_answer_tells_how_far_the_peers_have_come():
    cache = PredictionCache(1000)
    for task in ("a", "b", "c"):
        cache.announce(task, ["depth"])
    fronts = [
        cache.exchange([], Query(task, 0, ("depth",), window=window)).front
        for task, window in (("a", 32), ("b", 16), ("c", 0), ("a", 32))
    ]
    assert fronts == [-1, 32, 32, 16]
    cache.retire("a", ["depth"])
    assert cache.exchange([], Query("c", 0, ("depth",))).front == 16


def test_a_window_is_through_when_all_peers_in_training_have_walked_it_once() -> None:
    cache = PredictionCache(1000)
    for task, quantity in (("fast", "depth"), ("slow", "normals"), ("slower", "normals")):
        cache.announce(task, (quantity,))

    def through(consumer: str, wanted: str, window: int = 16, walk: int = 0) -> int | None:
        query = Query(consumer, 0, (wanted,), window=window, walk=walk)
        return cache.exchange([], query).through

    assert through("fast", "normals") is None  # no peer has come to any window
    through("slow", "depth", window=16, walk=0)
    assert through("fast", "normals") == 15
    through("slow", "depth", window=16, walk=1)
    assert through("fast", "normals") == 16
    through("slower", "depth", window=0, walk=3)
    assert through("fast", "normals") == 0
    assert through("slow", "depth") == 15  # of what it wants, not of all
    cache.retire("slower", ("normals",))
    assert through("fast", "normals") == 15


def test_a_restarted_cache_answers_nobody_it_does_not_know():
    assert PredictionCache(1000).exchange([], Query("normals", 0, ("depth",))) is None


def test_memory_stays_flat_over_many_publishes(cache, clock):
    for step in range(20_000):
        cache.publish(Publication("depth", step, step, clock.now + step, depth()))
    assert len(cache.entries) == 5
    assert cache.num_bytes <= 1000


def test_a_prediction_that_came_with_a_question_is_kept_or_refused_with_a_reason(cache, clock):
    good = Publication("normals", 7, 1, clock.now, {"normals": np.ones((2, 3, 4, 6), "float32")})
    bad = Publication("normals", 8, 2, clock.now, {"normals": np.ones((2, 1, 4, 6), "float32")})
    answer = cache.exchange([good, bad], Query("normals", 9, ("depth",), now=3))
    assert [("shape" in reason) for reason in answer.refused] == [True]
    assert cache.look_up(Query("depth", 7, ("normals",)))["normals"].staleness_steps == 2
    assert cache.look_up(Query("depth", 8, ("normals",)))["normals"].miss == "absent"


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan, 65504.0, -65504.0, -0.0])
def test_the_quick_look_at_float16_agrees_with_numpy(cache, clock, value):
    arrays = depth(value, dtype="float16")
    refused = cache.publish(Publication("depth", 0, 0, clock.now, arrays))
    assert (refused is None) == bool(np.isfinite(arrays["depth"]).all())
