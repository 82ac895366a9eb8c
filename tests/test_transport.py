"""Predictions travel by value, in shared memory and in the object store; runs leave no files."""

from __future__ import annotations

import logging
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from taskray.exchange.shared_memory import IDLE, InFile, Lost, remove_leftovers
from taskray.exchange.transport import GRACE, SMALL, ByValue, CacheTransport, InStore, Transport

FLOATS = SMALL  # float16: twice as many bytes as a prediction needs to go into a file


class Clock:
    """Time that passes when the test wants it to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    """An object store in a dict."""

    def __init__(self) -> None:
        self.objects: list[dict[str, np.ndarray]] = []

    def put(self, arrays) -> int:
        self.objects.append({name: array.copy() for name, array in arrays.items()})
        return len(self.objects) - 1

    def get(self, ref: int) -> dict[str, np.ndarray]:
        return self.objects[ref]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def cache(tmp_path: Path, clock: Clock, store: Store) -> Iterator[CacheTransport]:
    cache = CacheTransport(store.put, store.get, clock=clock)
    cache.create("run", tmp_path)
    yield cache
    cache.close()


@pytest.fixture
def join(cache: CacheTransport, clock: Clock, store: Store) -> Iterator[Callable[[], Transport]]:
    """Makes the transport of one more task on the machine of the cache."""
    tasks = []

    def new_task() -> Transport:
        tasks.append(Transport(store.get, clock=clock))
        tasks[-1].join(cache.host)
        return tasks[-1]

    yield new_task
    for task in tasks:
        task.close()


def prediction(value: float = 1.0, floats: int = FLOATS) -> dict[str, np.ndarray]:
    return {"depth": np.full((2, 1, 8, floats // 16), value, np.float16)}


def files(cache: CacheTransport) -> list[Path]:
    return [path for path in Path(cache.host).rglob("*") if path.is_file()]


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name])
        for name in left
    )


@pytest.mark.parametrize("floats", [16, FLOATS])
def test_a_consumer_gets_the_bytes_that_were_published(cache, join, floats):
    rng = np.random.default_rng(0)
    arrays = {
        "depth": rng.normal(size=(1, floats)).astype(np.float16),
        "odd": rng.normal(size=(3, 1, 7)).astype(np.float16),
        "normals": rng.normal(size=(2, 3, 5, 4)).astype(np.float32).transpose(0, 2, 3, 1),
        "empty": np.zeros((0, 4), np.float32),
    }
    token = cache.accept(pickle.loads(pickle.dumps(join().publish(arrays))))
    assert isinstance(token, InFile if floats == FLOATS else ByValue)
    assert token.num_bytes >= sum(array.nbytes for array in arrays.values())
    fetched = join().fetch(pickle.loads(pickle.dumps(cache.hand_out(token, cache.host))))
    assert equal(fetched, arrays)
    for array in fetched.values():
        assert not array.flags.writeable
    if floats == FLOATS:
        addresses = [array.ctypes.data for array in fetched.values() if array.size]
        assert [address % 64 for address in addresses] == [0, 0, 0]


def test_the_cache_keeps_its_own_copy_of_what_came_by_value(cache, join):
    arrays = prediction(1.0, 16)
    token = cache.accept(join().publish(arrays))
    arrays["depth"][:] = 2.0
    assert equal(join().fetch(token), prediction(1.0, 16))


def test_without_shared_memory_and_object_store_everything_is_on_the_heap():
    cache, task = CacheTransport(), Transport()
    arrays = prediction()
    token = cache.accept(task.publish(arrays))
    arrays["depth"][:] = 2.0
    assert equal(task.fetch(cache.hand_out(token, task.host)), prediction())
    cache.release(token)
    task.close()
    cache.close()


def test_a_released_prediction_can_be_fetched_for_a_while_and_then_its_file_vanishes(
    cache, join, clock
):
    consumer = join()
    token = cache.accept(join().publish(prediction()))
    cache.release(token)
    assert cache.released_bytes == token.num_bytes
    clock.now += 0.9 * GRACE
    cache.release(ByValue({}))
    assert equal(consumer.fetch(token), prediction())
    clock.now += 0.1 * GRACE
    cache.release(ByValue({}))
    assert cache.released_bytes == 0
    with pytest.raises(Lost, match=token.name):
        consumer.fetch(token)
    clock.now += IDLE
    cache.release(ByValue({}))
    assert files(cache) == []


def test_many_released_bytes_shorten_the_grace_period(cache, join):
    task = join()
    tokens = [cache.accept(task.publish(prediction(value))) for value in (1.0, 2.0)]
    cache.max_released = tokens[0].num_bytes
    for token in tokens:
        cache.release(token)
    with pytest.raises(Lost):
        task.fetch(tokens[0])
    assert equal(task.fetch(tokens[1]), prediction(2.0))


def test_a_file_that_is_not_read_any_more_is_overwritten(cache, join, clock):
    producer, consumer = join(), join()
    inodes = set()
    for value in range(5):
        token = cache.accept(producer.publish(prediction(value)))
        assert equal(consumer.fetch(token), prediction(value))
        cache.release(token)
        clock.now += GRACE
        cache.release(ByValue({}))
        with pytest.raises(Lost):
            consumer.fetch(token)
        inodes |= {path.stat().st_ino for path in files(cache)}
    assert len(inodes) == 1


def test_a_reader_keeps_its_bytes(cache, join, clock):
    producer, consumer = join(), join()
    token = cache.accept(producer.publish(prediction(1.0)))
    one_of_them = consumer.fetch(token)["depth"][1:, 0]
    cache.release(token)
    for value in (2.0, 3.0, 4.0):
        clock.now += GRACE
        cache.release(cache.accept(producer.publish(prediction(value))))
    clock.now += GRACE + IDLE
    cache.release(ByValue({}))
    assert (one_of_them == 1.0).all()
    cache.close()
    assert (one_of_them == 1.0).all()


def test_a_reader_on_another_machine_gets_one_object_of_the_store(cache, join, store):
    token = cache.accept(join().publish(prediction()))
    remote = Transport(store.get)
    for _ in range(3):
        handed = cache.hand_out(token, remote.host)
        assert isinstance(handed, InStore)
        assert equal(remote.fetch(handed), prediction())
    assert len(store.objects) == 1
    assert cache.hand_out(token, cache.host) is token
    with pytest.raises(Lost, match="is not the shared memory"):
        remote.fetch(token)


def test_a_producer_on_another_machine_is_read_through_the_shared_memory_of_the_cache(cache, join):
    remote = Transport()
    remote.join(cache.host + "elsewhere")
    assert remote.host == ""
    token = remote.publish(prediction())
    assert isinstance(token, ByValue)
    token = cache.accept(token)
    assert isinstance(token, InFile)
    assert equal(join().fetch(token), prediction())


def test_a_lost_object_is_lost(store):
    with pytest.raises(Lost, match="IndexError"):
        Transport(store.get).fetch(InStore(7, 100))


def test_a_restarted_cache_removes_what_it_had_and_takes_new_predictions(
    cache, join, tmp_path, clock
):
    task = join()
    token = cache.accept(task.publish(prediction()))
    restarted = CacheTransport(clock=clock)
    restarted.create("run", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [Path(restarted.host).name]
    with pytest.raises(Lost):
        task.fetch(token)
    with pytest.raises(Lost):
        restarted.accept(token)
    assert isinstance(task.publish(prediction()), ByValue)
    task.join(restarted.host)
    token = restarted.accept(task.publish(prediction()))
    assert equal(task.fetch(token), prediction())
    restarted.close()


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_shared_memory_is_full_predictions_travel_by_value(cache, join, store, caplog):
    producer = join()
    with files_of_at_most(SMALL), caplog.at_level(logging.WARNING):
        for _ in range(2):
            token = producer.publish(prediction())
            assert isinstance(token, ByValue)
            token = cache.accept(token)
            assert isinstance(token, InStore)
            assert equal(join().fetch(token), prediction())
    assert files(cache) == []
    assert len(caplog.records) == 2  # one line of the producer, one of the cache
    assert isinstance(producer.publish(prediction()), InFile)


def test_some_shared_memory_is_left_to_other_uses(cache):
    producer = Transport(reserve=1 << 60)
    producer.join(cache.host)
    assert isinstance(producer.publish(prediction()), ByValue)
    assert files(cache) == []
    producer.close()


def test_a_machine_without_shared_memory_is_no_error(tmp_path, caplog):
    cache = CacheTransport()
    with caplog.at_level(logging.WARNING):
        cache.create("run", tmp_path / "missing")
    assert cache.host == ""
    assert len(caplog.records) == 1
    assert isinstance(cache.accept(cache.publish(prediction())), ByValue)
    remove_leftovers(tmp_path / "missing")


PRODUCER = """
import pickle, sys, time
from pathlib import Path
import numpy as np
from taskray.exchange.transport import CacheTransport, Transport

cache, task, root, host = CacheTransport(), Transport(), *sys.argv[1:]
if not host:
    cache.create("killed", Path(root))
task.join(host or cache.host)
token = task.publish({"depth": np.full((2, 1, 8, 4096), 3.0, np.float16)})
print(pickle.dumps(token).hex(), flush=True)
time.sleep(60)
"""


@contextmanager
def producer_process(root: Path, host: str = "") -> Iterator[InFile]:
    """A process that publishes and is then killed; it makes a folder if it is given none."""
    arguments = [sys.executable, "-c", PRODUCER, str(root), host]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield pickle.loads(bytes.fromhex(process.stdout.readline()))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_a_prediction_outlives_the_killed_process_that_made_it(cache, join, tmp_path):
    with producer_process(tmp_path, cache.host) as token:
        token = cache.accept(token)
    expected = {"depth": np.full((2, 1, 8, 4096), 3.0, np.float16)}
    assert equal(join().fetch(token), expected)


def test_leftovers_of_a_killed_run_are_removed_and_a_living_run_is_kept(cache, join, tmp_path):
    token = cache.accept(join().publish(prediction()))
    with producer_process(tmp_path) as killed:
        remove_leftovers(tmp_path)
        assert Path(killed.host, killed.name).exists()
    assert Path(killed.host, killed.name).exists()
    remove_leftovers(tmp_path)
    assert not Path(killed.host).exists()
    assert equal(join().fetch(token), prediction())


def test_a_run_that_ends_leaves_nothing(tmp_path):
    cache = CacheTransport()
    cache.create("run", tmp_path)
    assert Path(cache.host).stat().st_mode & 0o777 == 0o700
    cache.accept(cache.publish(prediction()))
    cache.close()
    assert list(tmp_path.iterdir()) == []
