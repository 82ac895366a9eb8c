"""The collective: all tasks of a job, training at once on Ray.

    datasets ──▶ task actors ──chunks of steps──▶ reports ──▶ observer
                    │  ▲                             │
                    ▼  │                             └─ lost process? restart from its checkpoint
                  cache (and forward servers)           error?  the task fails, the others go on
                                                            (in its first step: the run ends)

The driver asks every task for a short chunk of steps and takes the first answer that comes. No task
waits for another here, and none of the tasks' data passes through here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray

from taskray.job.config import Job
from taskray.loop.report import ChunkReport
from taskray.record.result import TaskState, ends_run, summarize
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import NUM_SAMPLES
from taskray.runtime.observer import Observer
from taskray.runtime.reports import SetupReport, StandByReport
from taskray.runtime.roster import Roster
from taskray.runtime.supervision import Decision, decide, traceback_of

STAND_BY_SECONDS = 1.0
"""Between two looks at a task that has ended and predicts on demand."""

START_TIMEOUT = 30.0
"""Seconds that tasks wait for the slowest to be ready. Afterwards each trains when it is."""

SAVE_TIMEOUT = 60.0
"""Seconds that an interrupted task has to end its chunk and write its checkpoint."""


class Collective:
    """One run of a job on Ray. The processes start at once, while the data is being made ready.

    Call :meth:`train`, then :meth:`evaluate`, then :meth:`result`. An error of one task is part of
    the result; it is never raised, and the others train on, unless it comes in the task's first
    step (``runtime.on_failure``).
    """

    def __init__(self, job: Job, checkpoints: str, observer: Observer) -> None:
        self.job, self.observer = job, observer
        self.roster = Roster(job, checkpoints, observer)
        self.pending: dict[Any, str] = {}  # call that is under way -> its task
        self.standing_by: dict[str, float] = {}  # ended task -> when to look at it again

    @property
    def states(self) -> dict[str, TaskState]:
        """What is known of each task."""
        return self.roster.states

    # ---- the run --------------------------------------------------------------------------

    def train(self, data: dict[str, Any]) -> None:
        """Every task to its last step, chunk by chunk. ``data`` maps names to opened datasets. On
        Ctrl-C all checkpoints are written before KeyboardInterrupt goes on its way."""
        self.roster.data = data
        self.pending = {self.roster.start(name): name for name in self.states}
        try:
            # Tasks that begin together find each other's predictions from the start.
            calls = list(self.pending)
            _, late = ray.wait(calls, num_returns=len(calls), timeout=START_TIMEOUT)
            for call in late:
                self._report_late(self.pending[call])
            while self.pending and not ends_run(self.job, self.states):
                answered, _ = ray.wait(list(self.pending), num_returns=1, timeout=1.0)
                for call in answered:
                    self._take(self.pending.pop(call), call)
                self._look_after_the_ended()
            if reason := ends_run(self.job, self.states):
                self.observer.event(reason)
        except KeyboardInterrupt:
            self._save_all()
            self._take_the_last()
            raise

    def _report_late(self, name: str) -> None:
        share, text = self.roster.shares[name], f"task {name!r} is not ready after"
        text = f"{text} {START_TIMEOUT:g} s"
        if share.cpus or share.gpus:
            place = f"{share.cpus:g} CPUs and {share.gpus:g} GPUs"
            text = f"{text}; is there a machine with {place} free?"
        self.observer.event(text, name)

    def _take(self, name: str, call: Any) -> None:
        """Take a task's answer, and ask it to go on, unless it has ended."""
        state = self.states[name]
        try:
            report: SetupReport | ChunkReport | StandByReport = ray.get(call)
        except Exception as error:
            self._expect(name, self.roster.supervise(name, error))
            return
        state.step = report.step
        if isinstance(report, ChunkReport):
            state.report = report
        if not self.roster.has_ended(name):
            # asked before it is reported: the actor must not idle, and an observer may interrupt
            chunk = self.roster.actors[name].train.remote(self.job.runtime.chunk_steps)
            self._expect(name, chunk)
        elif not isinstance(report, StandByReport) or report.needed:
            self.standing_by[name] = time.monotonic() + STAND_BY_SECONDS
        if isinstance(report, ChunkReport):
            self.observer.report(report, state.restarts)
        elif isinstance(report, SetupReport) and state.step:
            self.observer.event(f"task {name!r} goes on from step {state.step}", name, state.step)

    def _expect(self, name: str, call: Any) -> None:
        if call is not None:
            self.pending[call] = name

    def _look_after_the_ended(self) -> None:
        """Ended tasks predict on demand for those that still train: see that they live. Tell the
        cache again of tasks that failed, in case it was restarted."""
        for name, state in self.states.items():
            if state.error is not None:
                self.roster.retire(name)
        if all(self.roster.has_ended(name) for name in self.states):
            return
        for name, due in list(self.standing_by.items()):
            if time.monotonic() >= due:
                del self.standing_by[name]
                self._expect(name, self.roster.actors[name].stand_by.remote())

    # ---- an interrupted run ---------------------------------------------------------------

    def _save_all(self) -> None:
        self.observer.event("interrupted; writing checkpoints")
        for name in self.states:  # a task that waits for another would save too late
            self.roster.retire(name)
        calls = {self.roster.actors[name].save.remote(): name for name in self.roster.living}
        written, late = ray.wait(list(calls), num_returns=len(calls), timeout=SAVE_TIMEOUT)
        for name in (calls[call] for call in late):
            steps = CheckpointStore(self.roster.checkpoints).steps(name)
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
                verdict = decide(name, state.step, error, state.restarts, state.restarts + 1)
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
        self.roster.add_evaluations(data)

    def evaluate(self) -> None:
        """Every task measures itself; those that failed are left out. One whose process is lost
        does so again, from its last checkpoint. Nothing is measured of a run that ended early."""
        if ends_run(self.job, self.states):
            return
        calls = {name: self._measure(name) for name in self.roster.living}  # all at once
        for name, measured in calls.items():
            self._take_evaluations(name, measured)

    def _measure(self, name: str) -> dict[str, Any]:
        """A task's evaluations, by title, on their way."""
        return {
            title: self.roster.actors[name].evaluate.remote(title, 0 if number else NUM_SAMPLES)
            for number, title in enumerate(self.job.evaluation.data)
        }

    def _take_evaluations(self, name: str, calls: dict[str, Any], back: Sequence[Any] = ()) -> None:
        """Take what a task measures, once its process is ``back`` where it was lost."""
        try:
            ray.get(list(back))
            for title, call in calls.items():
                self.states[name].evaluations[title] = ray.get(call)
        except Exception as error:
            again = self.roster.supervise(name, error)
            if again is not None:
                self._take_evaluations(name, self._measure(name), [again])

    def result(self, seconds: float) -> dict[str, Any]:
        """The result file's content."""
        try:
            cache = ray.get(self.roster.cache.statistics.remote(), timeout=10)
        except ray.exceptions.RayError:
            cache = {}
        return summarize(self.job, self.states, cache, seconds)

    def close(self) -> None:
        """End the processes of this run."""
        self.roster.close()
