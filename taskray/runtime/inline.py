"""The same loop in one process, without Ray: all models side by side, always in step.

Every task predicts and publishes before any of them reads, so every prediction is of this very
step: the synchronous algorithm, staleness 0. It is what the asynchronous runs are held against.
Where tasks are not on the same batch (some without labels, some frozen) one asks the other.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taskray.data.storage.source import Handle
from taskray.data.streams.batch import Batch
from taskray.errors import TaskrayError, TrainingError
from taskray.exchange.cache import PredictionCache
from taskray.exchange.messages import Publication, Query, newest
from taskray.job.config import Job
from taskray.loop.interfaces import PeerPredictions
from taskray.record.result import TaskState, summarize
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.collective import Observer
from taskray.runtime.member import NUM_SAMPLES, Member, choose_device
from taskray.runtime.process import keep_freed_memory
from taskray.runtime.supervision import traceback_of


class LocalPeers:
    """Peers in the same process, behind the same cache. Whoever has not predicted on a batch in
    its present step (it had no consistency step, is done or frozen) is asked to: ``answer`` is
    what the others call."""

    def __init__(
        self,
        job: Job,
        name: str,
        published: Sequence[str],
        wanted: Iterable[str],
        cache: PredictionCache,
        answer: Callable[[Batch], None],
    ):
        self.job, self.name, self.published = job, name, tuple(published)
        self.wanted, self.cache = tuple(wanted), cache
        cache.announce(name, self.published, server=answer)

    def request(self, batch: Batch, now: int, use: int) -> None: ...

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        dtype = self.job.cache.dtype
        self.cache.publish(Publication.of(self.name, batch, step, prediction, dtype))

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        assert batch.id is not None
        query = Query(self.name, batch.id, self.wanted)
        found = self.cache.look_up(query)
        asked = [p for p in found.values() if p.miss is not None or p.staleness_steps > 0]
        for peer in asked:
            peer.server(batch)
        found = self.cache.look_up(query) if asked else found
        misses = {task: f.miss for task, f in found.items() if f.miss is not None}
        usable = {task: f for task, f in found.items() if f.miss is None}
        chosen = {}
        for quantity, task in newest(usable, self.wanted).items():
            peer = usable[task]
            tensors = {q: torch.from_numpy(a).float() for q, a in peer.arrays.items()}
            chosen[quantity] = peer.prediction(task, tensors)
        return PeerPredictions(chosen, misses)

    def stepped(self, step: int, model: nn.Module) -> None: ...


class InlineCollective:
    """One run of a job in this process, with the interface of ``Collective``."""

    def __init__(self, job: Job, checkpoints: str, observer: Observer) -> None:
        self.job, self.observer = job, observer
        self.store = CheckpointStore(checkpoints, job.checkpoint.keep)
        self.cache = PredictionCache(job.cache.max_bytes, job.staleness)
        self.states = {name: TaskState() for name in job.tasks}
        self.members: dict[str, Member] = {}
        self.evaluations: dict[str, Handle] = {}

    def build(self, data: Mapping[str, Handle]) -> None:
        """Every task from the opened datasets (by name) and its latest checkpoint."""
        for name in self.job.tasks:

            def make_peers(
                published: tuple[str, ...], wanted: dict[str, int], name: str = name
            ) -> LocalPeers:
                answer = partial(self._answer, name)
                return LocalPeers(self.job, name, published, wanted, self.cache, answer)

            device = choose_device(self.job.tasks[name].gpus)
            tasks = self.job.tasks
            member = Member(self.job, name, data, self.store, make_peers, device, tasks)
            member.evaluations = self.evaluations
            self.states[name].step = step = member.resume()
            if step:
                self.observer.event(f"task {name!r} goes on from step {step}", name, step)
            if member.finished:
                self.states[name].report = member.after_steps(member.trainer.report())
            self.members[name] = member

    def _answer(self, name: str, batch: Batch) -> None:
        """Let a task predict on the batch that a peer asks it about."""
        if self.states[name].error is None:
            try:
                trainer = self.members[name].trainer
                trainer.peers.publish(batch, trainer.step, trainer.answer(batch))
            except TrainingError as error:
                self._fail(name, error)

    def train(self, data: Mapping[str, Handle]) -> None:
        """All tasks take each step together: first everybody predicts, then everybody learns.
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
        """Write a checkpoint, and let the result tell of the very same step."""
        try:
            report = member.trainer.report()
        except TrainingError as error:
            self._fail(name, error)
            return
        member.save()
        self.states[name].step, self.states[name].report = report["step"], report

    def _train(self) -> None:
        while living := self._living():
            for _ in range(self.job.runtime.chunk_steps):
                with between_steps():
                    self._step(living)
                if not living:
                    break
            for name, member in living.items():
                self._report(name, member)

    def _step(self, living: dict[str, Member]) -> None:
        """One step of all tasks, whole; those that are done or have failed leave ``living``."""
        for name, member in living.items():
            self.cache.progress(name, member.trainer.step)
        for name in list(living):
            self._guard(living, name, living[name].trainer.begin)
        for name in list(living):
            self._guard(living, name, living[name].trainer.finish)
        for name in [n for n, m in living.items() if m.finished]:
            self.cache.retire(name, living[name].trainer.published)
            self._report(name, living.pop(name))

    def _living(self) -> dict[str, Member]:
        return {
            n: m for n, m in self.members.items() if not m.finished and self.states[n].error is None
        }

    def _guard(self, living: dict[str, Member], name: str, half_step: Any) -> None:
        """One task's error ends that task alone."""
        try:
            half_step()
        except TrainingError as error:
            self._fail(name, error)
            living.pop(name)

    def _fail(self, name: str, error: TaskrayError) -> None:
        self.cache.retire(name, self.members[name].trainer.published)
        self.states[name].error, self.states[name].traceback = error, traceback_of(error)
        self.observer.event(str(error), name, self.states[name].step)

    def _report(self, name: str, member: Member) -> None:
        try:
            report = member.after_steps(member.trainer.report())
        except Exception as error:
            self._fail(name, _named(name, member, error))
            return
        self.states[name].step, self.states[name].report = report["step"], report
        self.observer.report(report, 0)

    def add_evaluations(self, data: Mapping[str, Handle]) -> None:
        """The opened datasets of the evaluations, by title."""
        self.evaluations.update(data)

    def evaluate(self) -> None:
        """Every task that has not failed measures itself."""
        for name, member in self.members.items():
            for number, title in enumerate(self.job.evaluation.data):
                if self.states[name].error is None:
                    samples = NUM_SAMPLES if number == 0 else 0
                    try:
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
    return TrainingError(name, member.trainer.step, f"{type(error).__name__}: {error}")


@contextmanager
def between_steps() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block has ended: a step is taken by all tasks or by
    none, or they would be out of step for ever."""
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
