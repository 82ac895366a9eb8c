"""The processes of a collective, and what the driver knows of each task."""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any

import ray

from taskray.exchange.shared_memory import remove_leftovers
from taskray.job.config import Job
from taskray.loop.wiring import wire
from taskray.record.result import TaskState
from taskray.runtime.observer import Observer
from taskray.runtime.placement import Share, place_cache, place_server, place_task, plan
from taskray.runtime.supervision import Decision, decide, traceback_of

CLOSE_TIMEOUT = 5.0
"""Seconds for the cache to free its shared memory; the next run frees what it leaves."""


class Roster:
    """Places the actors of a job, starts them, and replaces those whose process is lost."""

    def __init__(self, job: Job, checkpoints: str, observer: Observer) -> None:
        self.job, self.checkpoints, self.observer = job, checkpoints, observer
        self.wiring = wire(job)
        self.states = {name: TaskState() for name in self.wiring.roles}
        self.shares: dict[str, Share] = plan(job, ray.cluster_resources())
        remove_leftovers()
        self.cache = place_cache(job, self.wiring, secrets.token_hex(8))
        self.servers: dict[str, Any] = {}
        if job.uses_forward_servers:
            self.servers = {
                name: place_server(job, name, share, self.wiring, self.cache)
                for name, share in self.shares.items()
                if not self.wiring.roles[name].frozen
            }
        self.actors = {n: place_task(job, n, s) for n, s in self.shares.items()}
        self.data: dict[str, Any] = {}
        self.evaluations: dict[str, Any] = {}

    @property
    def living(self) -> list[str]:
        """The tasks that have not failed."""
        return [name for name, state in self.states.items() if state.error is None]

    def start(self, name: str) -> Any:
        """Let a task build everything and join the collective; returns the call."""
        call = self.actors[name].setup.remote(
            self.wiring, self.data, self.checkpoints, self.cache, self.servers.get(name)
        )
        if self.evaluations:
            self.actors[name].add_evaluations.remote(self.evaluations)
        return call

    def supervise(self, name: str, error: Exception) -> Any:
        """A call to a task has failed: start it again, and return that call; or let it fail, and
        return None."""
        state = self.states[name]
        verdict = decide(name, state.step, error, state.restarts, self.job.runtime.max_restarts)
        self.observer.event(verdict.reason, name, state.step)
        if verdict.decision is Decision.FAIL:
            state.error, state.traceback = verdict.error, traceback_of(error)
            self.retire(name)
            return None
        state.restarts += 1
        self.actors[name] = place_task(self.job, name, self.shares[name])
        return self.start(name)

    def has_ended(self, name: str) -> bool:
        """Whether a task has made its last step and reported it, or has failed."""
        state = self.states[name]
        done = state.step >= self.wiring.roles[name].steps and state.report is not None
        return done or state.error is not None

    def retire(self, name: str) -> None:
        """The task has failed or is stopped: its peers must not wait for its predictions."""
        self.cache.retire.remote(name, self.wiring.roles[name].publishes)

    def add_evaluations(self, data: dict[str, Any]) -> None:
        """The opened datasets of the evaluations, by title; before training or after."""
        self.evaluations = data
        for name in self.living:
            if self.states[name].report is not None:  # others get them when they start
                self.actors[name].add_evaluations.remote(data)

    def close(self) -> None:
        """End the processes of this run (and of no other on the same Ray)."""
        with suppress(ray.exceptions.RayError):
            ray.get(self.cache.close.remote(), timeout=CLOSE_TIMEOUT)
        for actor in (*self.actors.values(), *self.servers.values(), self.cache):
            ray.kill(actor)
