"""The prediction cache alone: latency, throughput and memory, beside bare ``ray.put``/``ray.get``.

1, 4 and 16 clients (threads, in four processes at most) call the cache actor as task actors do,
each waiting for its answer, with predictions of 0.1, 1 and 16 MB in float16:

  publish   write the arrays into shared memory; the cache checks them and keeps the token
  put       ``ray.put`` of the same arrays
  look_up   ask for one peer's prediction on a batch, and map its arrays
  get       ``ray.get`` of the same arrays

The four take turns, phase by phase, several times over. ``median_ms`` and ``p99_ms`` are over all
calls of all clients, ``per_second`` is of all clients together (median over phases), and
``against_put`` and ``against_get`` are the medians over phases of the ratio of ``per_second``.
``cpu_ms`` is the CPU time of all processes together (clients, cache, Ray) for one call: what it
takes from training where cores are few.

``transport``: the bytes alone, without a call to an actor. ``transport_ms`` is publish and read
(write, take over, hand out, map) in the steady state, where files are used again; ``memcpy_ms``
copies the same bytes in this process, ``ray_ms`` is a ``ray.put`` and a ``ray.get`` of them. All
three take turns. The goal for 1 and 16 MB is ``goal_ms`` = 1.5 ``memcpy_ms`` + 0.5.

``memory``: many publishes under a small byte budget, so that nearly each evicts another. Resident
memory of the cache actor (``anonymous`` is its own; ``shared`` is mapped) and the files in shared
memory in MB after each tenth of them; ``growth_mb`` is from the second tenth to the last.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    finish,
    main_job,
    median,
    numbers,
    own_ray,
    parse,
    parser,
    say,
)
from _running import (
    memory,
    others_cpu,
)

from taskray.data.streams.order import Place
from taskray.exchange.messages import Announcement, Publication, Question
from taskray.exchange.transport import CacheTransport, Transport
from taskray.loop.wiring import wire
from taskray.runtime.placement import place_cache

KINDS = ("publish", "put", "look_up", "get")
BATCHES = 2
"""Mediator batches that each client publishes by turns while latency is measured."""
CALLS = {100: 600, 1_000: 300, 16_000: 96}
"""Calls of all clients together in one phase, by size in kB."""
QUICK = {
    "sizes": [100, 1_000], "clients": [1], "repetitions": 1, "publishes": 400, "share": 0.1,
    "settle": 0.1,
}  # fmt: skip
Phase = tuple[float, float, list[float]]


class Client:
    """Some clients in one process; each call of :meth:`run` is one client, in a thread."""

    def __init__(self, cache: Any) -> None:
        import ray

        self.cache, self.transport = cache, Transport(get=ray.get)
        self.refs: dict[tuple[str, int], Any] = {}

    def prepare(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Announce this client as a task and as its own peer, and publish each batch once."""
        import ray

        for task, quantities in ((name, tuple(arrays)), (f"{name}_peer", ("nothing",))):
            new = Announcement(task, quantities, trains=False)
            welcome = ray.get(self.cache.announce.remote(new))
        if self.transport.host != welcome.host:
            self.transport.join(welcome.host)
        for batch in range(BATCHES):
            self.publish(name, batch, arrays)
            self.refs[name, batch] = ray.put(arrays)

    def publish(self, name: str, batch: int, arrays: dict[str, np.ndarray]) -> None:
        import ray

        token = self.transport.publish(arrays)
        new = Publication(name, batch, Place(0, batch, BATCHES), 0, token)
        refused = ray.get(self.cache.publish.remote(new))
        assert refused is None, refused

    def look_up(self, name: str, batch: int, arrays: dict[str, np.ndarray]) -> None:
        import ray

        question = Question(f"{name}_peer", tuple(arrays), batch, Place(0, batch, BATCHES))
        call = self.cache.exchange.remote([], question, self.transport.host)
        found = ray.get(call).found[name]
        assert found.miss is None, found.miss
        self.transport.fetch(found.token)

    def put(self, name: str, batch: int, arrays: dict[str, np.ndarray]) -> None:
        import ray

        ray.put(arrays)

    def get(self, name: str, batch: int, arrays: dict[str, np.ndarray]) -> None:
        import ray

        ray.get(self.refs[name, batch])

    def run(self, kind: str, name: str, calls: int, size: int, batches: int = BATCHES) -> Phase:
        """So many calls one after the other: begin, end, and how long each took."""
        arrays = prediction(name, size)
        act, seconds = getattr(self, kind), []
        begin = time.time()
        for number in range(calls):
            since = time.perf_counter()
            act(name, number % batches, arrays)
            seconds.append(time.perf_counter() - since)
        return begin, time.time(), seconds

    def begin(self, name: str, size: int) -> None:
        self.prepare(name, prediction(name, size))


def prediction(name: str, kilobytes: int) -> dict[str, np.ndarray]:
    """Eight frames of one quantity, in float16."""
    values = kilobytes * 500 // 8
    return {f"map_of_{name}": np.ones((8, 1, values // 8, 8), np.float16)}


class Clients:
    """So many clients of one cache, in four processes at most."""

    def __init__(self, cache: Any, count: int, size: int) -> None:
        import ray

        self.size, self.names = size, [f"client_{number}" for number in range(count)]
        threads = -(-count // 4)
        actor = ray.remote(Client).options(num_cpus=0, max_concurrency=threads)
        self.actors = [actor.remote(cache) for _ in range(min(4, count))]
        ray.get([self._of(i).begin.remote(n, size) for i, n in enumerate(self.names)])

    def _of(self, number: int) -> Any:
        return self.actors[number % len(self.actors)]

    def phase(self, kind: str, calls: int, batches: int = BATCHES) -> tuple[float, list[float]]:
        """All clients at once; calls per second of them together, and what each call took."""
        import ray

        each = max(3, calls // len(self.names))
        phases = ray.get(
            [
                self._of(i).run.remote(kind, name, each, self.size, batches)
                for i, name in enumerate(self.names)
            ]
        )
        seconds = max(end for _, end, _ in phases) - min(begin for begin, _, _ in phases)
        taken = [s for _, _, calls in phases for s in calls]
        return len(taken) / seconds, taken

    def close(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


def new_cache(max_bytes: int) -> Any:
    job = main_job(f"cache.max_bytes={max_bytes}")
    return place_cache(job, wire(job), secrets.token_hex(8))


def end(cache: Any) -> None:
    """Free its shared memory, and end its process."""
    import ray

    ray.get(cache.close.remote())
    ray.kill(cache)


def measure(size: int, count: int, settings: Any) -> dict[str, Any]:
    """The four kinds of calls with one size and number of clients."""
    cache = new_cache(1 << 30)
    clients = Clients(cache, count, size)
    calls = max(count, int(settings.share * CALLS.get(size, 100)))
    for kind in KINDS:
        clients.phase(kind, max(count, calls // 10))
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu = dict.fromkeys(KINDS, 0.0)
    for _ in range(settings.repetitions):
        for kind in KINDS:
            before = others_cpu(())
            speed, seconds = clients.phase(kind, calls)
            cpu[kind] += others_cpu(()) - before
            speeds[kind].append(speed)
            taken[kind] += seconds
    clients.close()
    end(cache)
    result: dict[str, Any] = {
        kind: {
            "median_ms": 1e3 * median(taken[kind]),
            "p99_ms": 1e3 * float(np.percentile(taken[kind], 99)),
            "per_second": median(speeds[kind]),
            "cpu_ms": 1e3 * cpu[kind] / len(taken[kind]),
        }
        for kind in KINDS
    }
    for ours, bare in (("publish", "put"), ("look_up", "get")):
        ratios = [a / b for a, b in zip(speeds[ours], speeds[bare], strict=True)]
        result[ours][f"against_{bare}"] = median(ratios)
    say(f"{size} kB, {count} clients: publish {result['publish']}, look_up {result['look_up']}")
    return {"kilobytes": size, "clients": count, **result}


def measure_memory(settings: Any) -> dict[str, Any]:
    """Publishes of 0.1 MB under a budget of 32 MB, by at most four clients."""
    import ray

    cache = new_cache(32_000_000)
    pid = ray.get(cache.__ray_call__.remote(lambda self: os.getpid()))
    host = ray.get(cache.__ray_call__.remote(lambda self: self.transport.host))
    clients = Clients(cache, min(4, max(settings.clients)), 100)
    samples = []
    for tenth in range(10):
        speed, _ = clients.phase("publish", settings.publishes // 10, batches=1000)
        one = {**memory(pid), "files": megabytes_in(Path(host)), "per_second": speed}
        samples.append(one)
        say(f"{tenth + 1}0 % of {settings.publishes} publishes: {one}")
    statistics = ray.get(cache.statistics.remote())
    clients.close()
    end(cache)
    return {
        "publishes": statistics["publishes"],
        "evictions": statistics["evictions"],
        "refused": statistics["refused"],
        "bytes": statistics["bytes"],
        "growth_mb": {k: samples[-1][k] - samples[1][k] for k in samples[0] if k != "per_second"},
        "samples": samples,
    }


def megabytes_in(folder: Path) -> float:
    """Size of all files below a folder, while some of them come and go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total / 1e6


def measure_transport(size: int, settings: Any) -> dict[str, Any]:
    """Publish and read through the transport, a memcpy, and Ray's object store, by turns."""
    import ray

    arrays = prediction("transport", size)
    copies = {name: np.ones_like(array) for name, array in arrays.items()}
    cache, producer, reader = CacheTransport(), Transport(), Transport()
    cache.create(f"bench-{secrets.token_hex(8)}")
    producer.join(cache.host)
    reader.join(cache.host)
    kept: list[Any] = []

    def transport() -> None:
        kept.append(cache.accept(producer.publish(arrays)))
        if len(kept) > 1:
            cache.release(kept.pop(0))
        reader.fetch(cache.hand_out(kept[0], reader.host))

    def memcpy() -> None:
        for name, array in arrays.items():
            np.copyto(copies[name], array)

    def through_ray() -> None:
        ray.get(ray.put(arrays))

    acts = {"transport": transport, "memcpy": memcpy, "ray": through_ray}
    taken: dict[str, list[float]] = {kind: [] for kind in acts}
    until = time.perf_counter() + settings.settle
    while time.perf_counter() < until:  # files are used again some seconds after their release
        transport()
    for _ in range(max(2, settings.repetitions)):
        for kind, act in acts.items():
            for number in range(max(3, int(settings.share * CALLS.get(size, 100)))):
                since = time.perf_counter()
                act()
                if number:  # the first one comes after other work
                    taken[kind].append(time.perf_counter() - since)
    for side in (reader, producer, cache):
        side.close()
    result = {f"{kind}_ms": 1e3 * median(seconds) for kind, seconds in taken.items()}
    goal = 1.5 * result["memcpy_ms"] + 0.5
    say(f"{size} kB through the transport: {result}, goal {goal:.2f} ms")
    return {"kilobytes": size, **result, "goal_ms": goal, "kept": result["transport_ms"] <= goal}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", type=numbers, default=list(CALLS), help="in kB")
    options.add_argument("--clients", type=numbers, default=[1, 4, 16])
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--publishes", type=int, default=20_000, help="for the memory")
    options.add_argument("--share", type=float, default=1.0, help="of the usual number of calls")
    options.add_argument("--settle", type=float, default=3.0, help="seconds before transport")
    settings = parse(options, arguments, QUICK)
    with own_ray():
        transport = [measure_transport(size, settings) for size in settings.sizes]
        calls = [measure(size, n, settings) for size in settings.sizes for n in settings.clients]
        result = {"transport": transport, "calls": calls, "memory": measure_memory(settings)}
    finish("cache", result, settings)


if __name__ == "__main__":
    main()
