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
from taskray.data.streams.order import VisitingOrder
from taskray.data.streams.prefetch import Closed, Prefetcher
from taskray.data.streams.stream import DedicatedStream, MediatorStream, plain_batches
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
    visits: int = 2,
    shuffle: bool = False,
    seed: int = 0,
) -> MediatorStream:
    return MediatorStream(source, batch_size, window, visits, shuffle, seed, ["depth"])


def numbers(batch: Any) -> list[int]:
    return [int(v) for v in batch.tensors["depth"][:, 0, 0, 0]]


def taken(stream: Any, batches: int) -> list[tuple[int | None, list[int]]]:
    out = [stream.next() for _ in range(batches)]
    return [(batch.id, numbers(batch)) for batch in out]


# The order of visits


def test_a_window_is_walked_before_the_next() -> None:
    order = VisitingOrder(num_batches=5, window=2, visits=3)
    walked = [order[n].batch for n in range(20)]
    assert walked == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 4, 4, 4, 0, 1, 0, 1, 0]
    assert [order[n].pass_ for n in (0, 14, 15)] == [0, 0, 1]
    assert [order[n].walk for n in (0, 2, 5, 6, 14)] == [0, 1, 2, 0, 2]


def test_all_is_the_plain_pass() -> None:
    order = VisitingOrder(num_batches=3, window="all", visits=7)
    assert [order[n].batch for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_window_wider_than_the_dataset_is_the_dataset() -> None:
    order = VisitingOrder(num_batches=3, window=16, visits=2)
    assert [order[n].batch for n in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("num_batches", [1, 4, 7])
@pytest.mark.parametrize("window", [1, 3, "all"])
def test_shuffling_permutes_within_each_walk_alone(
    num_batches: int, window: int | Literal["all"]
) -> None:
    plain = VisitingOrder(num_batches, window, visits=2)
    shuffled = VisitingOrder(num_batches, window, visits=2, shuffle=True, seed=3)
    walks: dict[tuple[int, int, int], tuple[list[int], list[int]]] = {}
    for n in range(5 * num_batches):
        a, b = plain[n], shuffled[n]
        assert (a.pass_, a.window, a.walk) == (b.pass_, b.window, b.walk)
        both = walks.setdefault((a.pass_, a.window, a.walk), ([], []))
        both[0].append(a.batch)
        both[1].append(b.batch)
    *complete, _ = walks.values()
    assert all(sorted(a) == sorted(b) for a, b in complete)
    again = VisitingOrder(num_batches, window, visits=2, shuffle=True, seed=3)
    assert [again[n] for n in range(30)] == [shuffled[n] for n in range(30)]


def test_walks_of_a_shuffled_window_differ() -> None:
    order = VisitingOrder(num_batches=8, window=8, visits=2, shuffle=True)
    walks = [tuple(order[n].batch for n in range(s, s + 8)) for s in range(0, 64, 8)]
    assert len(set(walks)) == len(walks)


@pytest.mark.parametrize("window", [1, 2, 3, "all"])
def test_windows_and_walks_know_where_they_begin(window: int | Literal["all"]) -> None:
    order = VisitingOrder(num_batches=5, window=window, visits=2)
    for n in range(1, 25):
        before, here = order[n - 1], order[n]
        new_window = (before.pass_, before.window) != (here.pass_, here.window)
        assert new_window == (order.start_of_window(n) == n)
        assert order.begins_walk(n) == (new_window or before.walk != here.walk)


def test_the_end_of_a_window_is_where_the_next_begins() -> None:
    for window in (1, 2, 3, "all"):
        order = VisitingOrder(num_batches=5, window=window, visits=2)  # type: ignore[arg-type]
        for n in range(25):
            end = order.end_of_window(n)
            here, before, after = order[n], order[end - 1], order[end]
            assert (before.pass_, before.window) == (here.pass_, here.window)
            assert (after.pass_, after.window) != (here.pass_, here.window)


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
    walk = [(0, first), (1, second), (0, first), (1, second), (2, last), (2, last)]
    assert got == walk + walk[:3]


@KINDS
@pytest.mark.parametrize("window", [1, 3, 9, "all"])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_memory_and_stream_give_the_same_batches(
    kind: Kind, window: int | Literal["all"], block: int
) -> None:
    order = VisitingOrder(num_batches=6, window=window, visits=3)
    stream = mediator(make_source(kind, 23, block=block), window=window, visits=3)
    assert [id for id, _ in taken(stream, 40)] == [order[n].batch for n in range(40)]
    stream.close()


@KINDS
def test_corrupt_rows_never_shift_the_numbers(kind: Kind) -> None:
    source = make_source(kind, 12, corrupt=(1, 4, 5, 6, 7))
    stream = mediator(source, window=3, visits=2)
    got = taken(stream, 6)
    stream.close()
    assert got == [(0, [0, 2, 3]), (2, [8, 9, 10, 11])] * 3
    assert len(stream.corrupt) == 5


@KINDS
def test_a_batch_tells_where_its_window_begins(kind: Kind) -> None:
    stream = mediator(make_source(kind, 20), window=2, visits=2)
    assert [stream.next().window for _ in range(14)] == [0] * 4 + [4] * 4 + [8] * 2 + [10] * 4
    stream.close()


@KINDS
@pytest.mark.parametrize("front", [8, 12, 20, 48])
def test_a_slow_task_goes_to_its_peers_window_when_its_walk_ends(kind: Kind, front: int) -> None:
    stream = mediator(make_source(kind, 24), window=2, visits=2)
    taken(stream, 1)
    stream.keep_up(front)
    stream.keep_up(-1)  # no peer is anywhere
    starts = [stream.next().window for _ in range(12)]
    late = starts.index(front)
    assert set(starts[:late]) == {0}
    assert late <= 5  # the walk begun, and what was assembled ahead
    assert starts[late:] == [front + 4 * ((n - late) // 4) for n in range(late, 12)]
    state, expected = stream.state_dict(), taken(stream, 3)
    stream.load_state_dict(state)
    assert taken(stream, 3) == expected
    stream.close()


@KINDS
def test_a_plain_pass_is_ended_before_a_jump(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window="all")
    taken(stream, 1)
    stream.keep_up(18)
    batches = [stream.next() for _ in range(9)]
    stream.close()
    assert [batch.id for batch in batches] == [1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert [batch.window for batch in batches] == [0] * 5 + [18] * 4


@KINDS
@pytest.mark.parametrize("visits", [1, 2])
def test_whoever_is_ahead_walks_its_window_until_all_have_been_there(
    kind: Kind, visits: int
) -> None:
    stream = mediator(make_source(kind, 24), window=2, visits=visits)
    stream.keep_up(-1, through=-1)
    held = [stream.next() for _ in range(10)]
    assert [(batch.id, batch.window, batch.walk) for batch in held] == [
        (n % 2, 0, n // 2) for n in range(10)
    ]
    stream.keep_up(0, through=0)
    free = [stream.next() for _ in range(8)]
    stream.close()
    late = [batch.window for batch in free].index(2 * visits)
    assert late <= 4  # what was assembled ahead, and the walk begun
    assert [batch.walk for batch in free[late : late + 2]] == [0, 0]
    assert [batch.id for batch in free[late : late + 2]] == [2, 3]


@KINDS
def test_a_plain_pass_is_walked_once_whoever_lags_behind(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window="all")
    stream.keep_up(-1, through=-1)
    assert [id for id, _ in taken(stream, 8)] == [0, 1, 2, 3, 4, 5, 0, 1]
    stream.close()


@KINDS
def test_nobody_is_sent_back(kind: Kind) -> None:
    stream = mediator(make_source(kind, 24), window=2, visits=2)
    taken(stream, 9)
    stream.keep_up(4)
    assert [id for id, _ in taken(stream, 6)] == [5, 4, 5, 0, 1, 0]
    stream.close()


@KINDS
@pytest.mark.parametrize("window", [2, "all"])
@pytest.mark.parametrize("before", [0, 1, 5, 11, 14])
def test_a_mediator_stream_resumes_where_it_was(
    kind: Kind, window: int | Literal["all"], before: int
) -> None:
    def fresh() -> MediatorStream:
        shuffle = window != "all"
        return mediator(make_source(kind, 18), window=window, visits=3, shuffle=shuffle, seed=7)

    stream = fresh()
    taken(stream, before)
    state = stream.state_dict()
    expected = taken(stream, 20)
    stream.load_state_dict(state)
    assert taken(stream, 20) == expected
    stream.close()
    stream = fresh()
    stream.load_state_dict(state)
    assert taken(stream, 20) == expected
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


def test_what_the_background_raises_the_consumer_gets() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InputError("file x: broken")

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
