"""Where actors go, and what they may use. The one place where ``ray.remote`` is applied."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import ray

from taskray.errors import InputError
from taskray.job.config import Job
from taskray.loop.wiring import Wiring
from taskray.runtime.cache_actor import CacheActor
from taskray.runtime.task_actor import ForwardServer, TaskActor


@dataclass(frozen=True)
class Share:
    """What one task's process reserves in Ray, and how many threads it computes with."""

    cpus: float
    gpus: float
    threads: int


def plan(job: Job, available: dict[str, float]) -> dict[str, Share]:
    """Every task's share of the resources; InputError when more is asked for than there is.

    A task that names no ``cpus`` reserves one if that leaves a CPU for reading data, else none:
    on a small machine actors that held every CPU would starve Ray Data.
    """
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    asked_cpus = sum(t.cpus or 0 for t in job.tasks.values())
    asked_gpus = sum(t.gpus for t in job.tasks.values())
    if asked_gpus > gpus:
        raise InputError(
            "tasks.*.gpus", f"got {asked_gpus:g} in all, expected at most the {gpus:g} of Ray"
        )
    streams = any(d.materialize == "never" for d in job.data.values())
    if asked_cpus > cpus - (1 if streams else 0):
        left = ", less one to stream data" if streams else ""
        raise InputError(
            "tasks.*.cpus",
            f"got {asked_cpus:g} in all, expected at most the {cpus:g} of Ray{left}",
        )
    open_tasks = [n for n, t in job.tasks.items() if t.cpus is None]
    one_each = asked_cpus + len(open_tasks) <= cpus - 1
    fair = max(1, math.floor((os.cpu_count() or 1) / len(job.tasks)))
    shares = {}
    for name, task in job.tasks.items():
        reserved = task.cpus if task.cpus is not None else float(one_each)
        threads = task.threads or (math.floor(task.cpus) if task.cpus and task.cpus > 1 else fair)
        shares[name] = Share(reserved, task.gpus, threads)
    return shares


def place_cache(job: Job, wiring: Wiring, run_id: str) -> Any:
    """The cache actor; Ray restarts it. A question that waits occupies a thread of it."""
    waits = wiring.blocks or job.staleness.on_stale == "wait"
    actor = ray.remote(CacheActor).options(
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=2 * len(wiring.roles) + 8 if waits else 1,
        enable_task_events=False,  # recording each of its many calls costs more than it helps
    )
    return actor.remote(
        run_id, max_bytes=job.cache.max_bytes, bound=job.staleness, mediator=job.mediator
    )


def place_task(job: Job, name: str, share: Share) -> Any:
    """A task's process. The driver restarts it, never Ray: only the driver knows the run."""
    actor = ray.remote(TaskActor).options(
        num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, max_task_retries=0
    )
    return actor.remote(job.model_dump(mode="json"), name, share.threads)


def place_server(job: Job, name: str, share: Share, wiring: Wiring, cache: Any) -> Any:
    """A task's forward server; Ray restarts it, its trainer sends the weights again."""
    actor = ray.remote(ForwardServer).options(num_cpus=0, max_restarts=-1)
    return actor.remote(job.model_dump(mode="json"), name, share.threads, wiring, cache)
