"""The order of mediator batches, and the streams that feed training."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch

from taskray.data.storage.codec import ArraySpec, Columns
from taskray.data.storage.source import (
    DatasetInfo,
    MemorySource,
    Source,
    StreamHandle,
    StreamSource,
    load_in_process,
    open_source,
)
from taskray.data.storage.store import prepare
from taskray.data.streams.dedicated import DedicatedStream
from taskray.data.streams.mediator import MediatorStream
from taskray.data.streams.order import START, MediatorOrder, Place
from taskray.data.streams.prefetch import Closed, Prefetcher
from taskray.data.streams.stream import plain_batches
from taskray.errors import InputError
from taskray.job.config import DataConfig

Kind = Literal["memory", "stream"]
KINDS = pytest.mark.parametrize("kind", ["memory", "stream"])


def make_source(
    kind: Kind, rows: int, corrupt: tuple[int, ...] = (), block: int = 5, allowed: int = 10
) -> Source:
    """A source of ``rows`` samples whose depth is their number, in blocks of ``block``."""
    layout = {"image": ArraySpec((2, 3, 3), "uint8"), "depth": ArraySpec((1, 2, 3), "float32")}
    info = DatasetInfo("numbers", "/numbers", rows, layout, max_corrupt_rows=allowed)

    def blocks() -> Iterator[Columns]:
        for start in range(0, rows, block):
            numbers = np.arange(start, min(start + block, rows))
            columns = {
                "image": np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 3, 3)),
                "depth": np.broadcast_to(numbers[:, None, None, None], (len(numbers), 1, 2, 3)),
                "key": np.array([f"k{n}" for n in numbers]),
                "error": np.array([f"k{n}: broken" if n in corrupt else "" for n in numbers]),
            }
            columns["image"] = columns["image"].astype(np.uint8)
            columns["depth"] = columns["depth"].astype(np.float32)
            for values in columns.values():
                values.flags.writeable = False
            yield columns

    return MemorySource(info, list(blocks())) if kind == "memory" else StreamSource(info, blocks)


def dedicated(source: Source, batch_size: int = 4, seed: int = 0) -> DedicatedStream:
    return DedicatedStream(source, batch_size, seed, ["image", "depth"])


def mediator(
    source: Source,
    batch_size: int = 4,
    window: int | Literal["all"] = "all",
    visits: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> MediatorStream:
    """``visits``: as in lock-step; None: the window is left when the stream is told to."""
    num_batches = -(-source.info.num_rows // batch_size)
    order = MediatorOrder(num_batches, window, shuffle, seed, visits)
    return MediatorStream(source, batch_size, order, ["depth"])


def numbers(batch: Any) -> list[int]:
    return [int(v) for v in batch.tensors["depth"][:, 0, 0, 0]]


def taken(stream: Any, batches: int) -> list[tuple[int | None, list[int]]]:
    out = [stream.next() for _ in range(batches)]
    return [(batch.id, numbers(batch)) for batch in out]


# The order of visits


def places(order: MediatorOrder, visits: int, told: int = 0) -> list[Place]:
    """The first places of a task that is told to be in a window at once."""
    place = order.place(0, 0, told)
    found = [place]
    while len(found) < visits:
        place = order.place(place.window, place.visit + 1, told)
        found.append(place)
    return found


def in_order(order: MediatorOrder, visits: int) -> list[int]:
    return [order.batch(place) for place in places(order, visits)]


def test_in_lock_step_a_window_is_left_after_its_passes() -> None:
    order = MediatorOrder(num_batches=5, window=2, visits=3)
    visited = in_order(order, 20)
    assert visited == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 4, 4, 4, 0, 1, 0, 1, 0]
    windows = [place.window for place in places(order, 20)]
    assert windows == [0] * 6 + [1] * 6 + [2] * 3 + [3] * 5  # it counts up where the data repeats
    assert [place.size for place in places(order, 16)] == [2] * 12 + [1] * 3 + [2]


def test_a_task_stays_in_its_window_until_it_is_told_of_a_later_one() -> None:
    order = MediatorOrder(num_batches=5, window=2)
    assert in_order(order, 7) == [0, 1, 0, 1, 0, 1, 0]
    assert order.place(0, 7, told=2) == Place(2, 0, 1)
    assert order.place(4, 3, told=4) == Place(4, 3, 2)
    assert order.place(4, 3, told=2) == Place(4, 3, 2)  # never back
    assert [order.batch(Place(4, visit, 2)) for visit in range(3)] == [2, 3, 2]


def test_in_lock_step_a_task_does_not_listen() -> None:
    order = MediatorOrder(num_batches=5, window=2, visits=3)
    assert order.place(0, 2, told=7) == Place(0, 2, 2)


def test_places_compare_by_window_and_then_by_visit() -> None:
    assert Place(0, 9, 2) < Place(1, 0, 2) < Place(1, 1, 2)
    assert min(START, Place(0, 1), Place(1, 0)) == START


def test_a_pass_is_finished_with_the_last_batch_of_the_window() -> None:
    assert [Place(0, visit, 3).finished_passes for visit in range(7)] == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("visits", [None, 7])
def test_all_is_the_plain_pass(visits: int | None) -> None:
    order = MediatorOrder(num_batches=3, window="all", visits=visits)
    assert in_order(order, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert set(places(order, 30, told=5)) == {Place(0, visit, 3) for visit in range(30)}


def test_a_window_wider_than_the_dataset_is_the_dataset() -> None:
    order = MediatorOrder(num_batches=3, window=16, visits=2)
    assert in_order(order, 8) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [place.window for place in places(order, 8)] == [0] * 6 + [1] * 2


@pytest.mark.parametrize("num_batches", [1, 4, 7])
@pytest.mark.parametrize("window", [1, 3, "all"])
def test_shuffling_permutes_the_batches_of_each_pass_and_no_more(
    num_batches: int, window: int | Literal["all"]
) -> None:
    plain = MediatorOrder(num_batches, window, visits=2)
    shuffled = MediatorOrder(num_batches, window, visits=2, shuffle=True, seed=3)
    assert places(plain, 50) == places(shuffled, 50)
    passes: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for place in places(plain, 5 * num_batches):
        before, after = passes.setdefault((place.window, place.visit // place.size), ([], []))
        before.append(plain.batch(place))
        after.append(shuffled.batch(place))
    *complete, _ = passes.values()
    assert all(sorted(before) == sorted(after) for before, after in complete)
    again = MediatorOrder(num_batches, window, visits=2, shuffle=True, seed=3)
    assert in_order(again, 50) == in_order(shuffled, 50)


@pytest.mark.parametrize("window", [8, "all"])
def test_the_passes_of_a_shuffled_window_differ(window: int | Literal["all"]) -> None:
    visited = in_order(MediatorOrder(num_batches=8, window=window, visits=2, shuffle=True), 64)
    passes = [tuple(visited[start : start + 8]) for start in range(0, 64, 8)]
    assert len(set(passes)) == len(passes)


# Dedicated streams


@KINDS
def test_a_pass_gives_every_sample_once_in_another_order(kind: Kind) -> None:
    stream = dedicated(make_source(kind, 20))
    passes = [[n for _ in range(5) for n in numbers(stream.next())] for _ in range(3)]
    stream.close()
    assert all(sorted(samples) == list(range(20)) for samples in passes)
    assert len({tuple(samples) for samples in passes}) == 3


@KINDS
def test_the_seed_decides_the_order(kind: Kind) -> None:
    orders = []
    for seed in (1, 1, 2):
        stream = dedicated(make_source(kind, 20), seed=seed)
        orders.append(taken(stream, 8))
        stream.close()
    assert orders[0] == orders[1] != orders[2]


@KINDS
def test_batches_are_always_full(kind: Kind) -> None:
    stream = dedicated(make_source(kind, 10, corrupt=(3,)), batch_size=4)
    batches = [numbers(stream.next()) for _ in range(18)]  # 72 = 8 passes of 9
    stream.close()
    assert {len(batch) for batch in batches} == {4}
    assert sorted(n for batch in batches for n in batch) == sorted(
        [n for n in range(10) if n != 3] * 8
    )
    assert len(stream.corrupt) == 1


@KINDS
@pytest.mark.parametrize("before", [0, 3, 7, 12])
def test_a_dedicated_stream_resumes_where_it_was(kind: Kind, before: int) -> None:
    stream = dedicated(make_source(kind, 17))
    taken(stream, before)
    state = stream.state_dict()
    expected = taken(stream, 9)
    stream.load_state_dict(state)
    assert taken(stream, 9) == expected
    stream.close()
    fresh = dedicated(make_source(kind, 17))
    fresh.load_state_dict(state)
    assert taken(fresh, 9) == expected
    fresh.close()


def test_the_state_is_that_of_batches_given_not_of_those_assembled_ahead() -> None:
    stream = dedicated(make_source("memory", 40))
    stream.next()
    time.sleep(0.05)
    assert stream.state_dict() == {"pass": 0, "position": 4}
    stream.close()


def test_images_are_floats_channels_first_and_own_their_memory() -> None:
    stream = dedicated(make_source("memory", 8))
    batch = stream.next()
    stream.close()
    image, depth = batch.tensors["image"], batch.tensors["depth"]
    assert batch.id is None
    assert image.shape == (4, 3, 2, 3)
    assert image.dtype == depth.dtype == torch.float32
    assert torch.allclose(image[:, 0, 0, 0] * 255, depth[:, 0, 0, 0])
    image.zero_()


@KINDS
def test_too_many_corrupt_rows_stop_the_stream(kind: Kind) -> None:
    stream = dedicated(make_source(kind, 20, corrupt=(2, 5, 8), allowed=2))
    with pytest.raises(InputError, match=r"'numbers': 3 rows cannot be read.*k\d: broken"):
        taken(stream, 10)
    stream.close()


def test_a_dataset_without_a_readable_row_is_no_endless_loop() -> None:
    stream = dedicated(make_source("memory", 3, corrupt=(0, 1, 2)))
    with pytest.raises(InputError, match="3 rows cannot be read"):
        stream.next()
    stream.close()


def test_a_column_that_was_not_opened_is_named() -> None:
    with pytest.raises(InputError, match=r"'numbers': column 'normals' was not opened"):
        DedicatedStream(make_source("memory", 3), 1, 0, ["normals"])


# Mediator streams


@KINDS
def test_mediator_batches_are_fixed_and_numbered(kind: Kind) -> None:
    stream = mediator(make_source(kind, 10), window=2, visits=2)
    got = taken(stream, 9)
    stream.close()
    first, second, last = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]
    round_ = [(0, first), (1, second), (0, first), (1, second), (2, last), (2, last)]
    assert got == round_ + round_[:3]


@pytest.mark.parametrize("window", [1, 3, 9, "all"])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_memory_and_stream_give_the_same_batches(window: int | Literal["all"], block: int) -> None:
    order = MediatorOrder(num_batches=6, window=window, visits=3)
    given: dict[Kind, list[Any]] = {"memory": [], "stream": []}
    for kind, batches in given.items():
        source = make_source(kind, 23, corrupt=(5,), block=block)
        stream = mediator(source, window=window, visits=3)
        for _ in range(40):  # two passes over the dataset and more
            batch = stream.next()
            batches.append((batch.id, batch.place, numbers(batch)))
        stream.close()
    assert given["memory"] == given["stream"]
    for (number, place, rows), expected in zip(given["memory"], places(order, 40), strict=True):
        assert place == expected
        assert number == order.batch(place)
        first = 4 * number
        assert rows == [row for row in range(first, min(first + 4, 23)) if row != 5]


@KINDS
def test_corrupt_rows_never_shift_the_numbers(kind: Kind) -> None:
    source = make_source(kind, 12, corrupt=(1, 4, 5, 6, 7))
    stream = mediator(source, window=3, visits=2)
    got = [stream.next() for _ in range(6)]
    stream.close()
    assert [(b.id, numbers(b)) for b in got] == [(0, [0, 2, 3]), (2, [8, 9, 10, 11])] * 3
    assert [b.place.visit for b in got] == [0, 2, 3, 5, 0, 2]
    assert len(stream.corrupt) == 5


@KINDS
def test_a_window_without_a_readable_batch_is_left(kind: Kind) -> None:
    source = make_source(kind, 24, corrupt=tuple(range(8, 16)))
    stream = mediator(source, window=2)
    stream.follow(1)
    batch = stream.next()
    assert (batch.place, batch.id) == (Place(2, 0, 2), 4)
    assert [id for id, _ in taken(stream, 3)] == [5, 4, 5]  # and it stays in the next one
    stream.close()


@KINDS
@pytest.mark.parametrize("told", [1, 2, 3, 8])
def test_the_next_batch_is_one_of_the_window_that_the_stream_is_told_of(
    kind: Kind, told: int
) -> None:
    stream = mediator(make_source(kind, 24), window=2)
    before = [stream.next() for _ in range(5)]
    assert [batch.place for batch in before] == [Place(0, visit, 2) for visit in range(5)]
    stream.follow(told)
    stream.follow(told - 1)  # an answer that was late
    after = [stream.next() for _ in range(5)]
    assert [batch.place for batch in after] == [Place(told, visit, 2) for visit in range(5)]
    first = 2 * (told % 3)
    assert [batch.id for batch in after] == [first, first + 1, first, first + 1, first]
    assert numbers(after[0]) == [4 * first + row for row in range(4)]
    state, expected = stream.state_dict(), taken(stream, 3)
    stream.load_state_dict(state)
    assert taken(stream, 3) == expected
    stream.close()


@KINDS
def test_a_stream_follows_window_after_window(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window=2)
    visited = []
    for window in range(7):
        stream.follow(window)
        visited += [stream.next().id for _ in range(3)]
    stream.close()
    assert visited == [0, 1, 0, 2, 3, 2, 4, 5, 4] * 2 + [0, 1, 0]


@KINDS
def test_in_lock_step_a_stream_moves_on_by_itself_alone(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window=2, visits=2)
    stream.follow(9)
    batches = [stream.next() for _ in range(6)]
    stream.close()
    assert [batch.id for batch in batches] == [0, 1, 0, 1, 2, 3]


@KINDS
def test_a_plain_pass_is_never_left(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window="all")
    taken(stream, 2)
    stream.follow(1)
    assert [id for id, _ in taken(stream, 6)] == [2, 3, 4, 5, 0, 1]
    stream.close()


@KINDS
def test_a_stream_has_no_position_before_its_first_batch(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window=2)
    assert stream.position() is None
    stream.follow(3)
    taken(stream, 3)
    position = stream.position()
    assert position is not None
    assert position[:2] == (3, 3)
    state = stream.state_dict()
    stream.close()
    fresh = mediator(make_source(kind, 24), window=2)
    fresh.load_state_dict(state)
    assert fresh.position() == position
    fresh.close()


@KINDS
@pytest.mark.parametrize(("window", "visits"), [(2, 3), (2, None), ("all", None)])
@pytest.mark.parametrize("before", [0, 1, 5, 11, 14])
def test_a_mediator_stream_resumes_where_it_was(
    kind: Kind, window: int | Literal["all"], visits: int | None, before: int
) -> None:
    def fresh() -> MediatorStream:
        shuffle = window != "all"
        return mediator(make_source(kind, 18), 4, window, visits, shuffle, seed=7)

    def to_the_end(stream: MediatorStream) -> list[Any]:
        stream.follow(2)
        found = taken(stream, 10)
        stream.follow(4)
        return found + taken(stream, 10)

    stream = fresh()
    taken(stream, before)
    state = stream.state_dict()
    expected = to_the_end(stream)
    stream.load_state_dict(state)
    assert to_the_end(stream) == expected
    stream.close()
    stream = fresh()
    stream.load_state_dict(state)
    assert to_the_end(stream) == expected
    stream.close()


@KINDS
def test_a_stream_that_goes_back_to_its_checkpoint_forgets_what_it_was_told(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window=2)
    taken(stream, 3)
    state = stream.state_dict()
    stream.follow(2)
    taken(stream, 2)
    stream.load_state_dict(state)
    assert stream.next().place == Place(0, 3, 2)
    stream.close()


def test_a_streamed_mediator_is_shuffled_within_windows_only() -> None:
    with pytest.raises(InputError, match=r"mediator\.shuffle: .* set mediator\.window"):
        mediator(make_source("stream", 8), window="all", shuffle=True)


# Evaluation


@KINDS
def test_evaluation_reads_every_row_once_in_order(kind: Kind) -> None:
    source = make_source(kind, 11, corrupt=(2,))
    threads = set(threading.enumerate())
    for _ in range(2):
        batches = [numbers(batch) for batch in plain_batches(source, 4, ["depth"])]
        assert batches == [[0, 1, 3, 4], [5, 6, 7, 8], [9, 10]]
        assert set(threading.enumerate()) <= threads  # a finished pass leaves nothing behind


# Working ahead


def test_two_batches_are_assembled_ahead_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n

    prefetcher = Prefetcher(items, depth=2, name="test")
    time.sleep(0.1)
    assert made == [0, 1]
    assert next(prefetcher) == 0
    time.sleep(0.1)
    assert made == [0, 1, 2]
    prefetcher.close()
    with pytest.raises(Closed):
        next(prefetcher)


def test_the_consumer_gets_what_the_background_raises() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InputError("file x", "broken")

    prefetcher = Prefetcher(items, depth=2, name="test")
    assert next(prefetcher) == 1
    for _ in range(2):
        with pytest.raises(InputError, match="file x: broken"):
            next(prefetcher)
    prefetcher.close()


@KINDS
def test_closing_ends_every_thread_at_once(kind: Kind) -> None:
    before = set(threading.enumerate())
    streams: list[Any] = [
        dedicated(make_source(kind, 200)), mediator(make_source(kind, 200), window=4)
    ]  # fmt: skip
    for stream in streams:
        taken(stream, 30)
    started = time.monotonic()
    for stream in streams:
        stream.close()
    assert time.monotonic() - started < 1
    assert set(threading.enumerate()) <= before
    assert taken(streams[1], 1)  # it can go on afterwards
    streams[1].close()


# Ray


def test_ray_streams_give_what_memory_gives(ray_session: ModuleType, cache: Any) -> None:
    reader = {"name": "test_data:Counting", "rows": 150}
    config = DataConfig(reader=reader, materialize="never")
    folder = prepare(config, name="d", use_ray=False)
    handle = open_source(config, folder, ["depth"], use_ray=True)
    assert isinstance(handle, StreamHandle)
    held = load_in_process(folder, config, ["depth"]).open()
    order: dict[str, Any] = {"window": 4, "visits": 2, "shuffle": True}
    streamed, in_memory = mediator(handle.open(), **order), mediator(held, **order)
    try:
        assert taken(streamed, 200) == taken(in_memory, 200)
    finally:
        streamed.close()
        in_memory.close()
