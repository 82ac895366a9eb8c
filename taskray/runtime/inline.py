"""The same loop in one process, without Ray: all models side by side, always in step.

Every task predicts and publishes before any of them reads, so every prediction is of this very
step: the synchronous algorithm, staleness 0. It is what the asynchronous runs are held against.
Where tasks are not on the same batch (some without labels, some frozen) one asks the other.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from taskray.data.storage.source import Handle
from taskray.data.streams.batch import Batch
from taskray.errors import TaskrayError, TrainingError, full_traceback
from taskray.exchange.arrays import to_arrays, to_tensors
from taskray.exchange.cache import PredictionCache
from taskray.exchange.messages import Announcement, Answer, Found, Publication, Question
from taskray.exchange.transport import ByValue
from taskray.job.config import Job
from taskray.loop.interfaces import PeerPredictions, Prediction
from taskray.loop.network import frames_of
from taskray.loop.wiring import Role, wire
from taskray.record.result import TaskState, ends_run, summarize
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import NUM_SAMPLES, Member, choose_device
from taskray.runtime.observer import Observer
from taskray.runtime.process import keep_freed_memory


class LocalPeers:
    """Peers in the same process, behind the same cache. A task that has not predicted on a batch in
    its present step (it had no consistency step, has finished, or is frozen) is asked to.

    Args:
        job: of the run.
        name: of the task.
        role: its role in the collective.
        cache: of the run.
        predict_for: lets the task predict on a batch and publish that; its peers call it.
    """

    def __init__(
        self,
        job: Job,
        name: str,
        role: Role,
        cache: PredictionCache,
        predict_for: Callable[[Batch], None],
    ):
        self.job, self.name, self.role, self.cache = job, name, role, cache
        self.announcement = Announcement(
            name,
            role.publishes,
            trains=not role.frozen,
            steps_per_visit=role.steps_per_visit,
            on_demand=predict_for,
        )

    def announce(self, step: int, trains: bool) -> None:
        """Join the collective, or stay in it to predict on demand."""
        self.cache.announce(replace(self.announcement, step=step, trains=trains))

    def ask(self, batch: Batch, step: int, use: int) -> None: ...

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        assert batch.id is not None
        token = ByValue(to_arrays(prediction, self.job.cache.dtype))
        self.cache.publish(Publication(self.name, batch.id, batch.place, step, token))

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        answer = self._look_up(batch, step)
        old = [f for f in answer.found.values() if f.miss is not None or f.staleness_steps > 0]
        asked = [peer for peer in old if peer.on_demand is not None]  # others have failed
        for peer in asked:
            peer.on_demand(batch)
        answer = self._look_up(batch, step) if asked else answer
        misses = {task: f.miss for task, f in answer.found.items() if f.miss is not None}
        chosen = {q: self._prediction(t, answer.found[t]) for q, t in answer.newest.items()}
        return PeerPredictions(chosen, misses)

    def stepped(self, step: int) -> None:
        """Nothing: the step is not over before all tasks have made it."""

    def _look_up(self, batch: Batch, step: int) -> Answer:
        assert batch.id is not None
        wanted = tuple(self.role.wants)
        answer = self.cache.exchange([], Question(self.name, wanted, batch.id, batch.place, step))
        assert answer is not None
        return answer

    def _prediction(self, task: str, found: Found) -> Prediction:
        assert found.version is not None
        tensors = to_tensors(self.cache.transport.fetch(found.token))
        age = max(0.0, time.time() - found.version.produced_at)
        return Prediction(task, tensors, found.version.producer_step, found.staleness_steps, age)


class InlineCollective:
    """One run of a job in this process, with the interface of ``Collective``."""

    def __init__(self, job: Job, checkpoints: str, observer: Observer) -> None:
        self.job, self.observer = job, observer
        self.store = CheckpointStore(checkpoints, job.checkpoint.keep)
        self.wiring = wire(job)
        self.cache = PredictionCache(job.cache.max_bytes, job.staleness)
        self.states = {name: TaskState() for name in job.tasks}
        self.members: dict[str, Member] = {}
        self.threads = torch.get_num_threads()  # of a task that names none: it is alone in its step
        self.evaluations: dict[str, Handle] = {}

    def build(self, data: Mapping[str, Handle]) -> None:
        """Every task from the opened datasets (by name) and its latest checkpoint."""
        for name, role in self.wiring.roles.items():
            peers = None
            if role.tied:
                predict_for = partial(self._predict_for, name)
                peers = LocalPeers(self.job, name, role, self.cache, predict_for)
            device = choose_device(self.job.tasks[name].gpus)
            member = Member(
                self.job, name, self.wiring, data, self.store, peers, device, in_lock_step=True
            )
            member.evaluations = self.evaluations
            self.states[name].step = step = member.resume()
            if peers is not None:
                peers.announce(step, trains=not member.finished)
            if step:
                self.observer.event(f"task {name!r} goes on from step {step}", name, step)
            if member.finished:
                self.states[name].report = member.after_steps(member.trainer.report())
            self.members[name] = member

    def _predict_for(self, name: str, batch: Batch) -> None:
        """Let a task predict on the batch that a peer asks about."""
        if self.states[name].error is not None:
            return
        trainer = self.members[name].trainer
        try:
            with trainer.naming_errors(), self._threads_of(name):
                frames = frames_of(trainer.task, trainer.published)
                prediction = trainer.network.infer(batch, frames)
        except TrainingError as error:
            self._fail(name, error)
            return
        published = {q: prediction[q] for q in trainer.published}
        trainer.peers.publish(batch, trainer.steps_made, published)

    def train(self, data: Mapping[str, Handle]) -> None:
        """All tasks make each step together: first all predict, then all learn.
        ``data`` maps names to opened datasets. On Ctrl-C all checkpoints are written before
        KeyboardInterrupt goes on its way."""
        keep_freed_memory()
        self.build(data)
        for member in self.members.values():
            member.trainer.start_clock()
        try:
            self._train()
        except KeyboardInterrupt:
            for name, member in self.members.items():
                if self.states[name].error is None:
                    self._stop(name, member)
            raise

    def _stop(self, name: str, member: Member) -> None:
        """Write a checkpoint, and let the result be of the same step."""
        try:
            report = member.trainer.report()
        except TrainingError as error:
            self._fail(name, error)
            return
        member.save()
        self.states[name].step, self.states[name].report = report.step, report

    def _train(self) -> None:
        while (living := self._living()) and not ends_run(self.job, self.states):
            for _ in range(self.job.runtime.chunk_steps):
                with between_steps():
                    self._step(living)
                if not living or ends_run(self.job, self.states):
                    break
            for name, member in living.items():
                self._report(name, member)
        if reason := ends_run(self.job, self.states):
            self.observer.event(reason)

    def _step(self, living: dict[str, Member]) -> None:
        """One step of all tasks, whole; those that end or fail leave ``living``."""
        for name, member in living.items():
            self.cache.progress(name, member.trainer.steps_made)
        steps = {name: member.trainer.step() for name, member in living.items()}
        for _ in ("publish", "learn"):
            for name in list(living):
                self._guard(living, name, steps[name])
        for name in [n for n, m in living.items() if m.finished]:
            peers = living[name].trainer.peers
            if isinstance(peers, LocalPeers):
                peers.announce(living[name].trainer.steps_made, trains=False)
            self._report(name, living.pop(name))

    def _living(self) -> dict[str, Member]:
        return {
            n: m for n, m in self.members.items() if not m.finished and self.states[n].error is None
        }

    def _guard(self, living: dict[str, Member], name: str, step: Iterator[None]) -> None:
        """Half a step of one task; its error ends that task alone."""
        try:
            with living[name].trainer.naming_errors(), self._threads_of(name):
                next(step, None)
        except TrainingError as error:
            self._fail(name, error)
            living.pop(name)

    @contextmanager
    def _threads_of(self, name: str) -> Iterator[None]:
        """Compute with the task's number of threads; without one, with those of the process."""
        before, own = torch.get_num_threads(), self.job.tasks[name].threads or self.threads
        if own != before:
            torch.set_num_threads(own)
        try:
            yield
        finally:
            if own != before:
                torch.set_num_threads(before)

    def _fail(self, name: str, error: TaskrayError) -> None:
        self.cache.retire(name, self.wiring.roles[name].publishes)
        self.states[name].error, self.states[name].traceback = error, full_traceback(error)
        self.observer.event(str(error), name, self.states[name].step)

    def _report(self, name: str, member: Member) -> None:
        try:
            report = member.after_steps(member.trainer.report())
        except Exception as error:
            self._fail(name, _named(name, member, error))
            return
        self.states[name].step, self.states[name].report = report.step, report
        self.observer.report(report, 0)

    def add_evaluations(self, data: Mapping[str, Handle]) -> None:
        """The opened datasets of the evaluations, by title."""
        self.evaluations.update(data)

    def evaluate(self) -> None:
        """Every task that has not failed measures itself, unless the run ended early."""
        if ends_run(self.job, self.states):
            return
        for name, member in self.members.items():
            for number, title in enumerate(self.job.evaluation.data):
                if self.states[name].error is None:
                    samples = NUM_SAMPLES if number == 0 else 0
                    try:
                        with self._threads_of(name):
                            evaluation = member.evaluate(title, samples)
                    except Exception as error:
                        self._fail(name, _named(name, member, error))
                        break
                    self.states[name].evaluations[title] = evaluation

    def result(self, seconds: float) -> dict[str, Any]:
        """The result file's content."""
        return summarize(self.job, self.states, self.cache.statistics(), seconds)

    def close(self) -> None:
        for member in self.members.values():
            member.close()


def _named(name: str, member: Member, error: Exception) -> TaskrayError:
    if isinstance(error, TaskrayError):
        return error
    return TrainingError(name, member.trainer.steps_made, f"{type(error).__name__}: {error}")


@contextmanager
def between_steps() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block has ended: a step is taken by all tasks or by
    none, or they would stay apart."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda received, frame: came.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
