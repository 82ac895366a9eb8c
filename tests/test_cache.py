"""The prediction cache: its bound, its window, its wait rule and its budget, as plain Python."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskray.data.streams.order import START, Place
from taskray.exchange.cache import NOT_ANNOUNCED, PredictionCache
from taskray.exchange.messages import Announcement, Answer, Found, Publication, Question
from taskray.exchange.objection import objection
from taskray.exchange.producer import StepCount
from taskray.exchange.shelf import Entry, Key, Shelf
from taskray.exchange.staleness import Version, window_bound, within
from taskray.exchange.transport import ByValue
from taskray.exchange.window import Window
from taskray.job.config import MediatorConfig, StalenessConfig

Arrays = dict[str, np.ndarray]

WAIT = StalenessConfig(on_stale="wait")
LOCK_STEP = StalenessConfig(on_stale="wait", max_steps=0)
SIZES = {"depth": (2, 1, 4, 6), "normals": (2, 3, 4, 6)}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def arrays_of(quantity: str = "depth", value: float = 1.0) -> Arrays:
    return {quantity: np.full(SIZES[quantity], value, "float32")}


def made(
    batch: int = 7,
    step: int = 40,
    at: float = 1000.0,
    arrays: Arrays | None = None,
    place: Place = START,
    task: str = "depth",
) -> Publication:
    """A publication; the task predicts the quantity of its own name."""
    token = ByValue(arrays_of(task) if arrays is None else arrays)
    return Publication(task, batch, place, step, token, at)


def about(batch: int = 7, place: Place = START, step: int = 0, blocks: bool = False) -> Question:
    """A question of the task ``normals`` about depth."""
    return Question("normals", ("depth",), batch, place, step, blocks)


def collective(
    bound: StalenessConfig | None = None,
    mediator: MediatorConfig | None = None,
    clock: Clock | None = None,
    tasks: Sequence[str] = ("depth", "normals"),
    steps_per_visit: float = 1.0,
) -> PredictionCache:
    cache = PredictionCache(1000, bound, mediator, clock=clock or Clock())
    for task in tasks:
        cache.announce(Announcement(task, (task,), steps_per_visit=steps_per_visit))
    return cache


def found(cache: PredictionCache, question: Question | None = None) -> Found:
    """What depth has on the batch of a question."""
    return all_found(cache, question or about())["depth"]


def all_found(cache: PredictionCache, question: Question) -> dict[str, Found]:
    return cache.look_up.found(question)[0]


def newest(cache: PredictionCache) -> dict[str, str]:
    """Whose prediction of each quantity is used."""
    return cache.look_up.found(about())[1]


def asked(
    cache: PredictionCache, question: Question, publications: Sequence[Publication] = ()
) -> list[Answer | None]:
    """The replies to a question, as they come."""
    replies: list[Answer | None] = []
    cache.ask(publications, question, replies.append)
    return replies


@pytest.fixture
def cache() -> PredictionCache:
    return collective()


# Predictions and their versions


def test_a_peer_finds_what_was_published_with_its_version(cache: PredictionCache) -> None:
    assert cache.publish(made(arrays=arrays_of(value=3.0))) is None
    cache.progress("depth", 65)
    depth = found(cache)
    assert depth.miss is None
    assert depth.version == Version(40, 1000.0)
    assert depth.staleness_steps == 25
    assert cache.transport.fetch(depth.token)["depth"].max() == 3.0


def test_a_task_never_finds_its_own_prediction(cache: PredictionCache) -> None:
    cache.publish(made())
    assert all_found(cache, Question("depth", ("depth",), 7)) == {}


def test_a_batch_without_a_prediction_is_absent(cache: PredictionCache) -> None:
    assert found(cache).miss == "absent"


def test_publishing_the_same_version_again_changes_nothing(cache: PredictionCache) -> None:
    cache.publish(made(arrays=arrays_of(value=1.0)))
    cache.publish(made(arrays=arrays_of(value=2.0)))
    assert cache.transport.fetch(found(cache).token)["depth"].max() == 1.0
    assert cache.statistics()["entries"] == 1


def test_a_late_arrival_does_not_replace_a_newer_prediction(cache: PredictionCache) -> None:
    cache.publish(made(step=40, at=1000.0))
    cache.publish(made(step=30, at=995.0))
    assert found(cache).version == Version(40, 1000.0)


def test_a_task_that_went_back_to_its_checkpoint_replaces_its_old_predictions(
    cache: PredictionCache,
) -> None:
    cache.publish(made(step=40))
    cache.announce(Announcement("depth", ("depth",), step=20))
    assert found(cache).staleness_steps == 0
    cache.progress("depth", 30)
    assert found(cache).staleness_steps == 10  # the steps made again, not 30 - 40
    cache.publish(made(step=30, at=1005.0))
    assert found(cache).version == Version(30, 1005.0)
    assert found(cache).staleness_steps == 0


def test_the_step_of_a_question_counts_for_the_predictions_of_its_task(
    cache: PredictionCache,
) -> None:
    cache.publish(made(step=40))
    cache.exchange([], Question("depth", ("normals",), 0, step=47))
    assert found(cache).staleness_steps == 7


def test_of_two_producers_only_the_newest_prediction_travels(cache: PredictionCache) -> None:
    cache.announce(Announcement("stereo", ("depth",)))
    cache.publish(made(task="depth", at=1000.0))
    cache.publish(made(task="stereo", at=1001.0, arrays=arrays_of()))
    both = all_found(cache, about())
    assert newest(cache) == {"depth": "stereo"}
    assert both["stereo"].token is not None
    assert both["depth"].token is None
    assert both["depth"].miss is None
    assert both["depth"].version == Version(40, 1000.0)


def test_a_newer_prediction_beyond_the_bound_gives_way_to_a_usable_one() -> None:
    cache = collective(StalenessConfig(max_steps=5))
    cache.announce(Announcement("stereo", ("depth",)))
    cache.publish(made(task="depth", at=1000.0))
    cache.publish(made(task="stereo", at=1001.0, arrays=arrays_of()))
    cache.progress("stereo", 46)
    both = all_found(cache, about())
    assert newest(cache) == {"depth": "depth"}
    assert both["depth"].token is not None
    assert (both["stereo"].miss, both["stereo"].token) == ("stale", None)


def test_a_prediction_that_came_with_a_question_is_kept_or_refused_with_a_reason(
    cache: PredictionCache,
) -> None:
    good = made(7, 1, task="normals")
    bad = made(8, 2, task="normals", arrays={"normals": arrays_of("depth")["depth"]})
    (answer,) = asked(cache, about(9, step=3), [good, bad])
    assert answer is not None
    assert ["shape" in reason for reason in answer.refused] == [True]
    kept, lost = (
        all_found(cache, Question("depth", ("normals",), batch))["normals"] for batch in (7, 8)
    )
    assert (kept.miss, kept.staleness_steps) == (None, 2)
    assert lost.miss == "absent"


def test_a_restarted_cache_asks_for_announcements() -> None:
    cache = PredictionCache(1000)
    assert cache.publish(made()) == NOT_ANNOUNCED
    assert cache.exchange([], about()) is None


# What is refused


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"depth": np.full((2, 1, 4, 6), np.nan, "float32")}, "not finite"),
        ({"depth": np.full((2, 1, 4, 6), np.inf, "float16")}, "not finite"),
        ({"depth": np.ones((2, 3, 4, 6), "float32")}, "shape"),
        ({"depth": np.ones((2, 1, 4, 6), "int64")}, "not an array of floats"),
        ({"depth": np.ones(3, "float32")}, "batch dimension"),
        ({"depth": "text"}, "not an array"),
        ({"normals": np.ones((2, 3, 4, 6), "float32")}, "announced"),
        ({}, "announced"),
    ],
)
def test_the_objection_to_a_bad_prediction_names_what_is_wrong(arrays: Arrays, reason: str) -> None:
    assert reason in str(objection(arrays, ("depth",)))


def test_quantities_of_one_prediction_have_one_batch_size() -> None:
    both = {"depth": np.ones((2, 1, 4, 6), "float32"), "normals": np.ones((3, 3, 4, 6), "float32")}
    assert "batch size" in str(objection(both, ("normals", "depth")))
    both["normals"] = both["normals"][:2]
    assert objection(both, ("normals", "depth")) is None


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan, 65504.0, -65504.0, -0.0])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_check_for_finite_values_agrees_with_numpy(value: float, dtype: str) -> None:
    arrays = {"depth": np.ones((2, 1, 4, 6), dtype)}
    arrays["depth"][1, 0, 2, 3] = value
    assert (objection(arrays, ("depth",)) is None) == bool(np.isfinite(arrays["depth"]).all())


def test_a_refused_prediction_is_counted_and_its_task_is_named(cache: PredictionCache) -> None:
    reason = cache.publish(made(arrays=arrays_of(value=np.nan)))
    assert "not finite" in str(reason)
    assert cache.statistics()["refused"] == 1
    assert cache.statistics()["refusals"] == {f"depth: {reason}": 1}
    assert found(cache).miss == "absent"


def test_a_refused_prediction_does_not_replace_a_good_one(cache: PredictionCache) -> None:
    cache.publish(made(step=40))
    cache.publish(made(step=41, at=1001.0, arrays=arrays_of(value=np.inf)))
    assert found(cache).version == Version(40, 1000.0)
    assert found(cache).staleness_steps == 1


# The byte budget


class Released:
    """A transport that records what it may forget."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def release(self, token: int) -> None:
        self.tokens.append(token)


def entry(token: int, num_bytes: int = 10) -> Entry:
    return Entry(Version(0, float(token)), 0, 0, token, num_bytes)


def test_the_budget_is_kept_by_dropping_the_oldest() -> None:
    shelf, keys = Shelf(50, released := Released()), [Key("depth", 0, n) for n in range(9)]
    for number, key in enumerate(keys):
        shelf.put(key, entry(number))
        assert shelf.num_bytes <= 50
    assert (len(shelf), shelf.evictions, released.tokens) == (5, 4, [0, 1, 2, 3])
    assert [shelf.get(key) is not None for key in keys] == [False] * 4 + [True] * 5


def test_a_large_prediction_drops_as_many_as_it_needs() -> None:
    shelf = Shelf(50, released := Released())
    for number in range(5):
        shelf.put(Key("depth", 0, number), entry(number))
    shelf.put(Key("depth", 0, 9), entry(9, num_bytes=25))
    assert (shelf.num_bytes, shelf.evictions, released.tokens) == (45, 3, [0, 1, 2])


def test_a_replaced_prediction_is_released_and_counts_as_the_youngest() -> None:
    shelf = Shelf(50, released := Released())
    for number in range(5):
        shelf.put(Key("depth", 0, number), entry(number))
    shelf.put(Key("depth", 0, 0), entry(7))
    assert (shelf.num_bytes, shelf.evictions, released.tokens) == (50, 0, [0])
    shelf.put(Key("depth", 0, 9), entry(9))
    assert shelf.get(Key("depth", 0, 0)) is not None
    assert shelf.get(Key("depth", 0, 1)) is None


def test_predictions_of_earlier_windows_are_dropped() -> None:
    shelf = Shelf(500, released := Released())
    for window in range(3):
        shelf.put(Key("depth", window, 0), entry(window))
    shelf.drop_before(2)
    assert (len(shelf), shelf.num_bytes, shelf.evictions) == (1, 10, 0)
    assert released.tokens == [0, 1]


def test_a_prediction_beyond_the_whole_budget_is_refused(cache: PredictionCache) -> None:
    reason = cache.publish(made(arrays={"depth": np.ones((99, 1, 4, 6), "float32")}))
    assert reason == "9504 bytes are more than the budget of 1000"
    assert cache.statistics()["entries"] == 0


def test_memory_stays_flat_over_many_publications(cache: PredictionCache) -> None:
    for step in range(5_000):
        assert cache.publish(made(step, step, 1000.0 + step)) is None
    statistics = cache.statistics()
    assert (statistics["entries"], statistics["bytes"]) == (5, 5 * 192)
    assert (statistics["publishes"], statistics["evictions"]) == (5_000, 4_995)


# The bound


@pytest.mark.parametrize(
    ("bound", "steps", "seconds", "window", "usable"),
    [
        (StalenessConfig(), 10**6, 10**6, None, True),
        (StalenessConfig(max_steps=20), 20, 0, None, True),
        (StalenessConfig(max_steps=20), 21, 0, None, False),
        (StalenessConfig(max_steps=0), 0, 0, None, True),
        (StalenessConfig(max_seconds=5), 10**6, 5, None, True),
        (StalenessConfig(max_seconds=5), 0, 5.1, None, False),
        (StalenessConfig(max_steps=20, max_seconds=5), 21, 1, None, False),
        (StalenessConfig(), 12, 10**6, 12, True),
        (StalenessConfig(), 13, 0, 12, False),
        (StalenessConfig(max_steps=20), 13, 0, 12, False),
        (StalenessConfig(max_steps=5), 6, 0, 12, False),
    ],
)
def test_the_bound_holds_to_the_step_and_the_second(
    bound: StalenessConfig, steps: int, seconds: float, window: int | None, usable: bool
) -> None:
    assert within(bound, steps, seconds, window) is usable


def test_the_window_bounds_staleness_by_one_pass_and_what_is_under_way() -> None:
    assert window_bound(16, 1.0) == 18
    assert window_bound(16, 2.0) == 36
    assert window_bound(3, 1.5) == 8
    assert window_bound(None, 2.0) is None


def test_a_prediction_older_than_the_window_lets_through_is_stale() -> None:
    cache = collective(mediator=MediatorConfig(data="d", window=4), steps_per_visit=2.0)
    cache.publish(made(step=40, place=Place(0, 0, 4)))
    question = about(place=Place(0, 4, 4))
    cache.progress("depth", 52)
    assert (found(cache, question).miss, found(cache, question).bound) == (None, 12)
    cache.progress("depth", 53)
    assert (found(cache, question).miss, found(cache, question).bound) == ("stale", 12)


def test_without_a_window_any_age_will_do() -> None:
    cache = collective(mediator=MediatorConfig(data="d", window="all"))
    cache.publish(made(step=40))
    cache.progress("depth", 10**6)
    assert (found(cache).miss, found(cache).bound) == (None, None)


def test_a_stale_prediction_is_named_and_withheld() -> None:
    cache = collective(StalenessConfig(max_steps=20))
    cache.publish(made(step=40))
    cache.progress("depth", 61)
    depth = found(cache)
    assert (depth.miss, depth.token, depth.staleness_steps) == ("stale", None, 21)
    assert newest(cache) == {}


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1), st.integers(0, 3)), max_size=8))
def test_staleness_counts_the_steps_that_are_made_again_after_a_restart(
    lives: list[tuple[int, float, int]],
) -> None:
    """In each life a task makes some steps and dies; it goes on from a checkpoint on the way.
    The count learns of every step, or of every second, third ... one."""
    count, step, steps_made = StepCount(0), 0, 0
    predictions: list[tuple[int, int]] = []  # the count, and the truth, when they were made
    for steps, kept, gap in lives:
        count.resume(step)
        begun = step
        for _ in range(steps):
            step, steps_made = step + 1, steps_made + 1
            if step % (gap + 1) == 0:
                count.reach(step)
                predictions.append((count.at(step), steps_made))
                predictions.append((count.at(step - 1), steps_made - 1))  # it came late
        count.reach(step)
        for counted, truth in [*predictions, (0, 0)]:
            assert count.made - counted == steps_made - truth
        step = begun + int(kept * (step - begun))


# The window


def visits(window: Window, task: str, passes: int, training: Sequence[str]) -> bool:
    """Bring a task to the last visit of so many passes over the present window, of 4 batches."""
    return window.visit(task, Place(window.number, 4 * passes - 1, 4), training)


BOTH = ("fast", "slow")


def test_a_window_moves_on_when_every_task_has_made_its_passes() -> None:
    window = Window(visits=3)
    assert not visits(window, "slow", 1, BOTH)
    assert not visits(window, "fast", 10, BOTH)  # the slow one has made one pass
    assert not visits(window, "slow", 2, BOTH)
    assert visits(window, "slow", 3, BOTH)
    assert window.number == 1
    assert not visits(window, "slow", 3, BOTH)  # passes are counted again from none
    assert not visits(window, "fast", 2, BOTH)
    assert visits(window, "fast", 3, BOTH)
    assert window.number == 2


def test_a_pass_is_finished_with_its_last_visit() -> None:
    window = Window(visits=2)
    assert not window.visit("fast", Place(0, 6, 4), ("fast",))
    assert window.visit("fast", Place(0, 7, 4), ("fast",))


def test_with_one_visit_one_pass_of_each_is_enough() -> None:
    window = Window(visits=1)
    window.visit("slow", Place(0, 0, 4), BOTH)
    assert not visits(window, "fast", 5, BOTH)
    assert visits(window, "slow", 1, BOTH)


def test_a_task_that_has_not_begun_is_not_waited_for_and_one_that_has_is() -> None:
    training = (*BOTH, "late")
    window = Window(visits=2)
    window.visit("slow", Place(0, 0, 4), training)
    visits(window, "fast", 2, training)
    assert visits(window, "slow", 2, training)
    window.visit("late", Place(1, 0, 4), training)
    visits(window, "fast", 2, training)
    assert not visits(window, "slow", 2, training)
    assert visits(window, "late", 2, training)
    assert window.number == 2


def test_a_task_that_has_ended_is_not_waited_for() -> None:
    window = Window(visits=2)
    window.visit("slow", Place(0, 0, 4), BOTH)
    assert not visits(window, "fast", 2, BOTH)
    assert not window.advance(BOTH)
    assert window.advance(("fast",))
    assert window.number == 1


def test_a_window_without_visits_is_never_left() -> None:
    window = Window(None)
    assert not visits(window, "fast", 100, ("fast",))
    assert not window.advance(("fast",))
    assert window.number == 0


def test_passes_over_an_earlier_window_do_not_count() -> None:
    window = Window(visits=2)
    assert visits(window, "fast", 2, ("fast",))
    window.visit("slow", Place(0, 99, 4), BOTH)
    assert not visits(window, "fast", 2, BOTH)
    assert visits(window, "slow", 2, BOTH)


def test_a_task_that_resumes_in_a_later_window_takes_the_collective_there() -> None:
    window = Window(visits=2)
    visits(window, "slow", 2, BOTH)
    assert window.visit("fast", Place(5, 3, 4), BOTH)
    assert window.number == 5
    assert not visits(window, "fast", 2, BOTH)  # what the slow task did before counts for nothing
    assert visits(window, "slow", 2, BOTH)


def test_the_window_never_goes_back() -> None:
    window = Window(visits=2)
    window.visit("fast", Place(5, 0, 4), BOTH)
    assert not window.visit("slow", Place(2, 0, 4), BOTH)
    assert window.number == 5


def test_every_answer_carries_the_window_and_old_predictions_are_dropped() -> None:
    cache = collective(mediator=MediatorConfig(data="d", window=1, visits=2))
    windows = []
    for window in range(3):
        cache.publish(made(window, window, place=Place(window, 0)))
        for visit in (0, 1):
            for task, wanted in (("depth", "normals"), ("normals", "depth")):
                question = Question(task, (wanted,), window, Place(window, visit))
                answer = cache.exchange([], question)
                assert answer is not None
                windows.append(answer.window)
    assert windows == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    misses = [found(cache, about(n, Place(n, 5))).miss for n in range(3)]
    assert misses == ["absent", "absent", None]


def test_a_prediction_of_another_window_is_absent(cache: PredictionCache) -> None:
    cache.publish(made(place=Place(1, 0)))
    assert found(cache, about(place=Place(1, 3))).miss is None
    assert found(cache, about(place=Place(2, 0))).miss == "absent"
    assert found(cache, about(place=Place(0, 9))).miss == "absent"


def test_a_resumed_task_is_told_the_window_of_the_collective() -> None:
    cache = collective(mediator=MediatorConfig(data="d", window=1, visits=1))
    for window in range(4):
        cache.exchange([], Question("depth", ("normals",), window, Place(window, 0)))
    welcome = cache.announce(Announcement("normals", ("normals",), 9, Place(1, 0)))
    assert welcome.window == 4


def test_in_lock_step_the_cache_moves_no_window_on() -> None:
    cache = collective(LOCK_STEP, MediatorConfig(data="d", window=1, visits=1), tasks=("depth",))
    question = Question("depth", (), 0, Place(0, 50))
    answer = cache.exchange([], question)
    assert answer is not None
    assert answer.window == 0


def test_a_task_that_has_ended_does_not_hold_the_window() -> None:
    cache = collective(mediator=MediatorConfig(data="d", window=1, visits=2))
    cache.exchange([], about(0, Place(0, 0)))
    cache.exchange([], Question("depth", ("normals",), 0, Place(0, 9)))
    assert cache.window.number == 0
    cache.retire("normals", ("normals",))
    assert cache.window.number == 1


# The wait rule


def test_a_task_with_labels_never_waits(cache: PredictionCache) -> None:
    assert len(asked(cache, about())) == 1


@pytest.mark.parametrize("bound", [WAIT, LOCK_STEP])
def test_the_task_that_is_farthest_behind_never_waits(bound: StalenessConfig) -> None:
    cache = collective(bound)
    cache.publish(made(8, place=Place(0, 1)))  # and nothing on batch 7, the visit before
    (answer,) = asked(cache, about(7, Place(0, 0)))
    assert answer is not None
    assert answer.found["depth"].miss == "absent"
    assert not asked(cache, about(9, Place(0, 2)))


def test_a_peer_that_has_published_in_a_later_window_is_not_waited_for() -> None:
    cache = collective(WAIT)
    cache.publish(made(place=Place(3, 0)))
    assert not cache.look_up.awaited(about(place=Place(2, 9)))
    assert cache.look_up.awaited(about(place=Place(3, 9), batch=8)) == {"depth"}


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=2, max_size=5),
    st.sampled_from([WAIT, LOCK_STEP, StalenessConfig(on_stale="wait", max_steps=3)]),
    st.booleans(),
)
def test_of_all_questions_that_follow_a_publication_one_is_answered(
    places: list[tuple[int, int]], bound: StalenessConfig, blocks: bool
) -> None:
    names = [f"task{number}" for number in range(len(places))]
    cache = PredictionCache(1, bound)  # keeps nothing, so every question has something to wait for
    for name in names:
        cache.announce(Announcement(name, (name,)))
    replies = {}
    for name, place in zip(names, places, strict=True):
        cache.publish(Publication(name, 0, Place(*place), 0, ByValue({name: np.ones((1, 1))})))
        wanted = tuple(other for other in names if other != name)
        question = Question(name, wanted, 0, Place(*place), blocks_on_miss=blocks)
        replies[name] = asked(cache, question)
    assert replies[min(names, key=lambda name: places[names.index(name)])]


def test_a_task_without_labels_waits_for_the_first_prediction_on_a_batch(
    cache: PredictionCache,
) -> None:
    replies = asked(cache, about(place=Place(0, 3), blocks=True))
    assert not replies
    cache.publish(made(6, place=Place(0, 2)))
    assert not replies
    cache.publish(made(7, place=Place(0, 3)))
    (answer,) = replies
    assert answer is not None
    assert answer.newest == {"depth": "depth"}
    assert len(asked(cache, about(place=Place(0, 11), blocks=True))) == 1  # there is one now


def test_a_task_without_labels_waits_for_a_peer_to_announce_what_it_needs() -> None:
    cache = collective(tasks=("normals",))
    replies = asked(cache, about(blocks=True))
    assert cache.look_up.awaited(about(blocks=True)) == {"depth"}
    cache.announce(Announcement("stereo", ("depth",)))
    assert cache.look_up.awaited(about(blocks=True)) == {"stereo"}
    assert not replies
    cache.publish(made(task="stereo", arrays=arrays_of()))
    assert len(replies) == 1


def test_a_quantity_of_a_task_that_failed_before_it_began_is_not_waited_for() -> None:
    cache = collective(tasks=("normals",))
    replies = asked(cache, about(blocks=True))
    assert not replies
    cache.retire("depth", ("depth",))
    assert len(replies) == 1


@pytest.mark.parametrize("blocks", [False, True])
def test_a_task_that_ends_is_not_waited_for_any_more(blocks: bool) -> None:
    cache = collective(WAIT)
    replies = asked(cache, about(blocks=blocks))
    assert not replies
    cache.retire("depth", ("depth",))
    assert len(replies) == 1


def test_a_peer_that_predicts_on_demand_is_asked_and_not_waited_for() -> None:
    cache = collective(WAIT)
    cache.announce(Announcement("depth", ("depth",), trains=False, on_demand="the handle"))
    (answer,) = asked(cache, about(blocks=True))
    assert answer is not None
    assert answer.found["depth"].on_demand == "the handle"
    assert answer.found["depth"].miss == "absent"


def test_a_task_that_has_ended_waits_for_nothing() -> None:
    cache = collective(WAIT)
    cache.announce(Announcement("normals", ("normals",), trains=False, on_demand="the handle"))
    assert len(asked(cache, about(blocks=True))) == 1


def test_what_a_resumed_task_published_before_is_not_waited_for() -> None:
    cache = collective(WAIT, tasks=("normals",))
    cache.announce(Announcement("depth", ("depth",), step=50, place=Place(2, 5)))
    assert not cache.look_up.awaited(about(place=Place(2, 4)))
    assert cache.look_up.awaited(about(place=Place(2, 5))) == {"depth"}


def test_a_bound_in_steps_is_waited_for_in_visits_of_the_peer() -> None:
    cache = collective(StalenessConfig(on_stale="wait", max_steps=4), steps_per_visit=2.0)
    cache.publish(made(place=Place(0, 10)))
    assert not cache.look_up.awaited(about(place=Place(0, 12)))
    assert cache.look_up.awaited(about(place=Place(0, 13))) == {"depth"}


def test_a_bound_in_seconds_is_waited_for() -> None:
    clock = Clock()
    cache = collective(StalenessConfig(on_stale="wait", max_seconds=5), clock=clock)
    cache.publish(made(place=Place(0, 0)))
    clock.now += 5
    assert not cache.look_up.awaited(about(place=Place(0, 4)))
    clock.now += 1
    assert cache.look_up.awaited(about(place=Place(0, 4))) == {"depth"}


def test_a_question_is_answered_by_the_publication_it_waits_for_and_no_later_one() -> None:
    cache = collective(LOCK_STEP)
    cache.publish(made(step=2, place=Place(0, 2)))
    replies = asked(cache, about(place=Place(0, 4)))
    cache.publish(made(3, 3, 1001.0, place=Place(0, 3)))
    assert not replies
    cache.publish(made(step=4, at=1002.0, place=Place(0, 4)))
    assert len(replies) == 1
    cache.publish(made(step=5, at=1003.0, place=Place(0, 5)))
    (answer,) = replies
    assert answer is not None
    assert answer.found["depth"].version == Version(4, 1002.0)
    assert answer.found["depth"].staleness_steps == 0


def test_publications_that_come_with_a_question_answer_the_questions_of_peers() -> None:
    cache = collective(LOCK_STEP)
    replies = asked(cache, about(place=Place(0, 4)))
    asked(cache, Question("depth", ("normals",), 8, Place(0, 5)), [made(place=Place(0, 4))])
    assert len(replies) == 1


def test_a_new_question_ends_the_wait_of_the_one_before() -> None:
    cache = collective(LOCK_STEP)
    before = asked(cache, about(place=Place(0, 4)))
    after = asked(cache, about(place=Place(0, 5)))
    assert (len(before), len(after)) == (1, 0)
    assert cache.statistics()["timed_out"] == 0
    assert cache.look_up.awaited(about(place=Place(0, 5))) == {"depth"}


def test_a_peer_that_timed_out_is_not_waited_for_until_it_publishes_again() -> None:
    cache = collective(WAIT)
    cache.publish(made(0, place=Place(0, 0)))
    replies = asked(cache, about(1, Place(0, 1)))
    assert not replies
    cache.expire("normals")
    (answer,) = replies
    assert answer is not None
    assert answer.found["depth"].miss == "absent"
    assert cache.statistics()["timed_out"] == 1
    assert len(asked(cache, about(2, Place(0, 2)))) == 1
    cache.publish(made(1, place=Place(0, 1)))
    assert not asked(cache, about(3, Place(0, 3)))


def test_one_task_that_gives_up_does_not_decide_for_its_peers() -> None:
    cache = collective(WAIT, tasks=("depth", "normals", "edges"))
    cache.publish(made(0, place=Place(0, 0)))
    asked(cache, about(1, Place(0, 1)))
    cache.expire("normals")
    assert not asked(cache, Question("edges", ("depth",), 1, Place(0, 1)))


def test_a_peer_that_has_not_begun_is_waited_for_again_after_a_timeout() -> None:
    cache = collective(WAIT)
    asked(cache, about(0, Place(0, 0)))
    cache.expire("normals")
    assert not asked(cache, about(1, Place(0, 1)))


def test_an_exchange_returns_when_a_peer_publishes() -> None:
    cache = collective(LOCK_STEP.model_copy(update={"wait_seconds": 30}))
    answers: list[Answer | None] = []
    waiting = threading.Thread(target=lambda: answers.append(cache.exchange([], about())))
    waiting.start()
    while "normals" not in cache.waiting:
        pass
    cache.publish(made())
    waiting.join(10)
    (answer,) = answers
    assert answer is not None
    assert answer.found["depth"].version == Version(40, 1000.0)


def test_an_exchange_returns_after_its_time_without_a_prediction() -> None:
    cache = collective(LOCK_STEP.model_copy(update={"wait_seconds": 0.02}))
    answer = cache.exchange([], about())
    assert answer is not None
    assert answer.found["depth"].miss == "absent"
    assert (cache.statistics()["timed_out"], cache.waiting) == (1, {})
