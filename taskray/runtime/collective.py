"""The collective: all tasks of a job, training at once on Ray.

    datasets ──▶ task actors ──chunks of steps──▶ reports ──▶ observer
                    │  ▲                             │
                    ▼  │                             └─ lost process? restart from its checkpoint
                  cache (and forward servers)           error?  the task fails, the others go on

The driver asks every task for a short chunk of steps and takes whichever answers first. It makes no
task wait for another, and none of the tasks' data passes through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import ray

from taskray.job.config import Job
from taskray.loop.assembly import build_relations, build_task, published_quantities
from taskray.record.result import TaskState, summarize
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import NUM_SAMPLES
from taskray.runtime.placement import Share, place_cache, place_server, place_task, plan
from taskray.runtime.supervision import Decision, judge, traceback_of

SERVE_SECONDS = 1.0
"""How long a task that is done serves its peers before it answers the driver again."""

START_TIMEOUT = 30.0
"""Seconds that tasks wait for the slowest to be ready. Afterwards nobody waits for anybody."""

SAVE_TIMEOUT = 60.0
"""Seconds that an interrupted task has to end its chunk and write its checkpoint."""


class Observer(Protocol):
    """Who looks on while the collective trains: files, a live table, Tune."""

    def report(self, report: dict[str, Any], restarts: int) -> None:
        """A task has ended a chunk."""
        ...

    def event(self, text: str, task: str | None = None, step: int | None = None) -> None:
        """Something happened that a person should know."""
        ...


class Collective:
    """One run of a job on Ray. The processes start at once, while the data is being made ready.

    Call :meth:`train`, then :meth:`evaluate`, then :meth:`result`. An error of one task stands in
    the result; it is never raised, for the others train on.
    """

    def __init__(self, job: Job, checkpoints: str, observer: Observer) -> None:
        self.job, self.checkpoints, self.observer = job, checkpoints, observer
        self.states = {name: TaskState() for name in job.tasks}
        self.shares: dict[str, Share] = plan(job, ray.cluster_resources())
        self.cache = place_cache(job)
        self.servers: dict[str, Any] = {}
        if job.uses_forward_servers:
            training = {n: s for n, s in self.shares.items() if n not in job.frozen}
            self.servers = {n: place_server(job, n, s, self.cache) for n, s in training.items()}
        self.actors = {n: place_task(job, n, s) for n, s in self.shares.items()}
        self.pending: dict[Any, str] = {}  # call that is under way -> whose it is
        self.data: dict[str, Any] = {}
        self.evaluations: dict[str, Any] = {}

    # ---- the run --------------------------------------------------------------------------

    def train(self, data: dict[str, Any]) -> None:
        """Every task to its last step: chunk by chunk, whoever answers first. ``data`` maps names
        to opened datasets. On Ctrl-C all checkpoints are written before KeyboardInterrupt goes on
        its way."""
        self.data = data
        self.pending = {self._start(name): name for name in self.states}
        try:
            # Tasks that begin together find each other's predictions from the start.
            calls = list(self.pending)
            _, late = ray.wait(calls, num_returns=len(calls), timeout=START_TIMEOUT)
            for call in late:
                self._say_late(self.pending[call])
            while self.pending:
                answered, _ = ray.wait(list(self.pending), num_returns=1, timeout=1.0)
                for call in answered:
                    self._take(self.pending.pop(call), call)
                for name in (n for n, s in self.states.items() if s.error is not None):
                    self._nobody_waits_for(name)  # again: a restarted cache has forgotten it
        except KeyboardInterrupt:
            self._save_all()
            self._take_the_last()
            raise

    def _say_late(self, name: str) -> None:
        share, text = self.shares[name], f"task {name!r} is not ready after {START_TIMEOUT:g} s"
        if share.cpus or share.gpus:
            place = f"{share.cpus:g} CPUs and {share.gpus:g} GPUs"
            text = f"{text}; is there a machine with {place} free?"
        self.observer.event(text, name)

    def _start(self, name: str) -> Any:
        call = self.actors[name].setup.remote(
            self.data, self.checkpoints, self.cache, self.servers.get(name)
        )
        if self.evaluations:
            self.actors[name].add_evaluations.remote(self.evaluations)
        return call

    def _take(self, name: str, call: Any) -> None:
        """Take a task's answer, and ask it to go on, unless it has ended."""
        state = self.states[name]
        try:
            report = ray.get(call)
        except Exception as error:
            self._expect(name, self._supervise(name, error))
            return
        state.step = report["step"]
        if "served" in report:
            self._expect(name, self._serve(name) if report["served"] else None)
            return
        if "values" in report:
            state.report = report
        # asked for before anybody looks on: the actor must not idle, and who looks on may interrupt
        self._expect(name, self._go_on(name))
        if "values" in report:
            self.observer.report(report, state.restarts)
        elif state.step:
            self.observer.event(f"task {name!r} goes on from step {state.step}", name, state.step)

    def _expect(self, name: str, call: Any) -> None:
        if call is not None:
            self.pending[call] = name

    def _go_on(self, name: str) -> Any:
        if self._has_ended(name):
            return self._serve(name)
        return self.actors[name].train.remote(self.job.runtime.chunk_steps)

    def _has_ended(self, name: str) -> bool:
        state = self.states[name]
        done = state.step >= self.job.steps_of(name) and state.report is not None
        return done or state.error is not None

    def _serve(self, name: str) -> Any:
        """A task that is done goes on predicting for those that are not; None when all are."""
        if not self.job.active_relations:
            return None
        if name not in self.job.frozen and self.job.runtime.publisher != "trainer":
            return None
        if all(self._has_ended(other) for other in self.states):
            return None
        return self.actors[name].serve.remote(SERVE_SECONDS)

    def _supervise(self, name: str, error: Exception) -> Any:
        state = self.states[name]
        verdict = judge(name, state.step, error, state.restarts, self.job.runtime.max_restarts)
        self.observer.event(verdict.reason, name, state.step)
        if verdict.decision is Decision.FAIL:
            state.error, state.traceback = verdict.error, traceback_of(error)
            self._nobody_waits_for(name)
            return None
        state.restarts += 1
        self.actors[name] = place_task(self.job, name, self.shares[name])
        return self._start(name)

    def _nobody_waits_for(self, name: str) -> None:
        """It has failed or is stopped: its peers must not wait for what it would have predicted."""
        task = build_task(self.job, name)
        published = published_quantities(task, build_relations(self.job, name, task))
        self.cache.retire.remote(name, published)

    def _save_all(self) -> None:
        self.observer.event("interrupted; writing checkpoints")
        for name in self.states:  # or one that waits would come to its checkpoint too late
            self._nobody_waits_for(name)
        living = [n for n, s in self.states.items() if s.error is None]
        calls = {self.actors[name].save.remote(): name for name in living}
        written, late = ray.wait(list(calls), num_returns=len(calls), timeout=SAVE_TIMEOUT)
        for name in (calls[call] for call in late):
            steps = CheckpointStore(self.checkpoints).steps(name)
            last = f"the last is of step {steps[-1]}" if steps else "there is none"
            text = f"task {name!r} wrote no checkpoint within {SAVE_TIMEOUT:g} s; {last}"
            self.observer.event(text, name, self.states[name].step)
        for call in written:
            try:
                report = ray.get(call)
            except ray.exceptions.RayError as error:
                self.observer.event(f"task {calls[call]!r} wrote no checkpoint: {error}")
                continue
            state = self.states[calls[call]]
            state.step, state.report = report["step"], report

    def _take_the_last(self) -> None:
        """The chunks that were under way at Ctrl-C: they ended before the checkpoints did."""
        calls = list(self.pending)
        ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        for call in ended:
            name = self.pending.pop(call)
            state = self.states[name]
            try:
                report = ray.get(call)
            except Exception as error:
                verdict = judge(name, state.step, error, state.restarts, state.restarts + 1)
                if verdict.decision is Decision.FAIL:  # a lost process goes on another time
                    state.error, state.traceback = verdict.error, traceback_of(error)
                    self.observer.event(verdict.reason, name, state.step)
                continue
            if "values" in report:
                with suppress(KeyboardInterrupt):  # who looks on may have asked for the end
                    self.observer.report(report, state.restarts)

    # ---- the result -----------------------------------------------------------------------

    def add_evaluations(self, data: dict[str, Any]) -> None:
        """The opened datasets of the evaluations, by title; before training or after."""
        self.evaluations = data
        for name, state in self.states.items():
            if state.report is not None and state.error is None:
                self.actors[name].add_evaluations.remote(data)

    def evaluate(self) -> None:
        """Every task measures itself; those that failed are left out. One whose process is lost
        does so again, from its last checkpoint."""
        living = [name for name, state in self.states.items() if state.error is None]
        calls = {name: self._measure(name) for name in living}  # all at once
        for name in living:
            self._take_evaluations(name, calls[name])

    def _measure(self, name: str) -> dict[str, Any]:
        """A task's evaluations, by title, on their way."""
        return {
            title: self.actors[name].evaluate.remote(title, 0 if number else NUM_SAMPLES)
            for number, title in enumerate(self.job.evaluation.data)
        }

    def _take_evaluations(self, name: str, calls: dict[str, Any], back: Sequence[Any] = ()) -> None:
        """Take what a task measures, once its process is ``back`` where it was lost."""
        try:
            ray.get(list(back))
            for title, call in calls.items():
                self.states[name].evaluations[title] = ray.get(call)
        except Exception as error:
            again = self._supervise(name, error)
            if again is not None:
                self._take_evaluations(name, self._measure(name), [again])

    def result(self, seconds: float) -> dict[str, Any]:
        """The result file's content."""
        try:
            cache = ray.get(self.cache.statistics.remote(), timeout=10)
        except ray.exceptions.RayError:
            cache = {}
        return summarize(self.job, self.states, cache, seconds)

    def close(self) -> None:
        """End the processes of this run (and of no other on the same Ray)."""
        for actor in (*self.actors.values(), *self.servers.values(), self.cache):
            ray.kill(actor)
