"""The collective: all tasks of a job, training at once on Ray.

    datasets ──▶ task actors ──chunks of steps──▶ reports ──▶ observer
                    │  ▲                             │
                    ▼  │                             └─ lost process? restart from its checkpoint
                  cache (and forward servers)           error?  the task fails, the others go on

The driver asks every task for a short chunk of steps and takes whichever answers first. It makes no
task wait for another, and none of the tasks' data passes through here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray

from taskray.exchange.shared_memory import remove_leftovers
from taskray.job.config import Job
from taskray.loop.report import ChunkReport
from taskray.loop.wiring import wire
from taskray.record.result import TaskState, summarize
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import NUM_SAMPLES
from taskray.runtime.observer import Observer
from taskray.runtime.placement import Share, place_cache, place_server, place_task, plan
from taskray.runtime.reports import SetupReport, StandByReport
from taskray.runtime.supervision import Decision, judge, traceback_of

STAND_BY_SECONDS = 1.0
"""Between two looks at a task that has ended and predicts on demand."""

START_TIMEOUT = 30.0
"""Seconds that tasks wait for the slowest to be ready. Afterwards nobody waits for anybody."""

CLOSE_TIMEOUT = 5.0
"""Seconds for the cache to free its shared memory; the next run frees what it leaves."""

SAVE_TIMEOUT = 60.0
"""Seconds that an interrupted task has to end its chunk and write its checkpoint."""


class Collective:
    """One run of a job on Ray. The processes start at once, while the data is being made ready.

    Call :meth:`train`, then :meth:`evaluate`, then :meth:`result`. An error of one task stands in
    the result; it is never raised, for the others train on.
    """

    def __init__(self, job: Job, checkpoints: str, observer: Observer) -> None:
        self.job, self.checkpoints, self.observer = job, checkpoints, observer
        self.states = {name: TaskState() for name in job.tasks}
        self.wiring = wire(job)
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
        self.pending: dict[Any, str] = {}  # call that is under way -> its task
        self.standing_by: dict[str, float] = {}  # ended task -> when to look at it again
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
                self._look_after_the_ended()
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
            self.wiring, self.data, self.checkpoints, self.cache, self.servers.get(name)
        )
        if self.evaluations:
            self.actors[name].add_evaluations.remote(self.evaluations)
        return call

    def _take(self, name: str, call: Any) -> None:
        """Take a task's answer, and ask it to go on, unless it has ended."""
        state = self.states[name]
        try:
            report: SetupReport | ChunkReport | StandByReport = ray.get(call)
        except Exception as error:
            self._expect(name, self._supervise(name, error))
            return
        state.step = report.step
        if isinstance(report, ChunkReport):
            state.report = report
        if self._has_ended(name):
            if not isinstance(report, StandByReport) or report.needed:
                self.standing_by[name] = time.monotonic() + STAND_BY_SECONDS
        else:  # asked before it is reported: the actor must not idle, and a report may interrupt
            self._expect(name, self.actors[name].train.remote(self.job.runtime.chunk_steps))
        if isinstance(report, ChunkReport):
            self.observer.report(report, state.restarts)
        elif isinstance(report, SetupReport) and state.step:
            self.observer.event(f"task {name!r} goes on from step {state.step}", name, state.step)

    def _expect(self, name: str, call: Any) -> None:
        if call is not None:
            self.pending[call] = name

    def _has_ended(self, name: str) -> bool:
        state = self.states[name]
        done = state.step >= self.wiring.roles[name].steps
        if done and state.step:  # one that resumes at its last step still reports once
            done = state.report is not None
        return done or state.error is not None

    def _look_after_the_ended(self) -> None:
        """Ended tasks predict on demand for those that still train: see that they live. Tell the
        cache again of tasks that failed, in case it was restarted."""
        for name, state in self.states.items():
            if state.error is not None:
                self._retire(name)
        if all(self._has_ended(name) for name in self.states):
            return
        for name, due in list(self.standing_by.items()):
            if time.monotonic() >= due:
                del self.standing_by[name]
                self._expect(name, self.actors[name].stand_by.remote())

    def _supervise(self, name: str, error: Exception) -> Any:
        state = self.states[name]
        verdict = judge(name, state.step, error, state.restarts, self.job.runtime.max_restarts)
        self.observer.event(verdict.reason, name, state.step)
        if verdict.decision is Decision.FAIL:
            state.error, state.traceback = verdict.error, traceback_of(error)
            self._retire(name)
            return None
        state.restarts += 1
        self.actors[name] = place_task(self.job, name, self.shares[name])
        return self._start(name)

    def _retire(self, name: str) -> None:
        """The task has failed or is stopped: its peers must not wait for its predictions."""
        self.cache.retire.remote(name, self.wiring.roles[name].publishes)

    def _save_all(self) -> None:
        self.observer.event("interrupted; writing checkpoints")
        for name in self.states:  # or one that waits would come to its checkpoint too late
            self._retire(name)
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
            state.step, state.report = report.step, report

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
            if isinstance(report, ChunkReport):
                with suppress(KeyboardInterrupt):  # the observer may have asked for the end
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
        with suppress(ray.exceptions.RayError):
            ray.get(self.cache.close.remote(), timeout=CLOSE_TIMEOUT)
        for actor in (*self.actors.values(), *self.servers.values(), self.cache):
            ray.kill(actor)
