"""Tasks as one would train them by hand: the bare side of ``step_overhead``."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from _common import PATIENCE, local_data
from _running import Stamp
from torch import Tensor, nn

from taskray.data.streams.augment import augment
from taskray.data.streams.batch import Batch
from taskray.job.config import Job, parse_job
from taskray.loop.interfaces import NoPeers
from taskray.loop.meters import Totals
from taskray.loop.network import FIRST, frames_of
from taskray.loop.trainer import Trainer
from taskray.loop.wiring import wire
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import Member


class BareLoop:
    """One task as one would write it by hand, with its batches in memory.

    Network, optimizer, losses, relations and batches are those that a task actor would have; the
    loop around them is not.
    """

    def __init__(self, job: Job, name: str, num_batches: int = 32) -> None:
        data, nowhere = local_data(job), CheckpointStore(tempfile.gettempdir())
        self.config = job.tasks[name]
        torch.set_num_threads(self.config.threads or 1)
        trainer = _trainer(job, name, data, nowhere)
        self.task, self.network = trainer.task, trainer.network
        self.optimizer = trainer.optimization.optimizer
        self.frames = frames_of(trainer.task, trainer.published)
        self.parameters = list(trainer.learned.parameters())
        self.relations = [(r.relation, r.weight(job.steps)) for r in trainer.relations]
        self.random = torch.Generator().manual_seed(0)
        assert trainer.mediator is not None
        (labels,) = trainer.supervised.streams
        self.labelled = [labels.next() for _ in range(num_batches)]
        self.unlabelled = [trainer.mediator.next() for _ in range(num_batches)]
        trainer.close()
        others = [_trainer(job, other, data, nowhere) for other in job.tasks if other != name]
        self.peers = [
            {
                quantity: prediction
                for other in others
                for quantity, prediction in other.network.infer(
                    batch, frames_of(other.task, other.published)
                ).items()
            }
            for batch in self.unlabelled
        ]
        self.step = 0

    def predict(self, batch: Batch, frames: Sequence[str] = FIRST) -> dict[str, Tensor]:
        return self.network.predict(batch, frames)

    def supervised(self) -> Tensor:
        batch = self.labelled[self.step % len(self.labelled)]
        batch = augment(batch, self.config.augment, self.random, labelled=True)
        return torch.stack(list(self.task.loss(self.predict(batch), batch.tensors).values())).sum()

    def consistency(self) -> Tensor:
        number = self.step // 2 % len(self.unlabelled)
        batch = self.unlabelled[number]
        own = augment(batch, self.config.augment, self.random, labelled=False)
        known = {**self.peers[number], **self.predict(own, self.frames)}
        terms = [
            weight * torch.stack(list(relation(known, batch.tensors).values())).sum()
            for relation, weight in self.relations
        ]
        return torch.stack(terms).sum()

    def steps(self, mode: str, count: int) -> None:
        for _ in range(count):
            tied = mode == "exchange" and self.step % 2 == 1
            loss = self.consistency() if tied else self.supervised()
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            if self.config.optimizer.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
            self.optimizer.step()
            self.step += 1


def _trainer(job: Job, name: str, data: Mapping[str, Any], nowhere: CheckpointStore) -> Trainer:
    return Member(job, name, wire(job), data, nowhere, NoPeers()).trainer


def bare_process(
    job: dict[str, Any], name: str, nice: int, pipe: Connection, barrier: Any, chunk: int
) -> None:
    """Serves ``(mode, seconds)`` with the stamps of a window, until it is terminated."""
    os.nice(nice - os.nice(0))
    loop = BareLoop(parse_job(job, "job"), name)
    pipe.send(os.getpid())
    while True:
        mode, seconds = pipe.recv()
        barrier.wait(PATIENCE)
        stamps = [(time.monotonic(), loop.step)]
        until = stamps[0][0] + seconds
        while time.monotonic() < until:
            loop.steps(mode, chunk)
            stamps.append((time.monotonic(), loop.step))
        pipe.send(stamps)


class BareLoops:
    """All tasks of a job as bare loops, each in a process of its own."""

    def __init__(self, job: Job, nice: int, chunk: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.barrier = spawn.Barrier(len(job.tasks))
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        for name in job.tasks:
            self.pipes[name], theirs = spawn.Pipe()
            given = (job.model_dump(mode="json"), name, nice, theirs, self.barrier, chunk)
            process = spawn.Process(target=bare_process, args=given, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)

    def wait_until_ready(self) -> None:
        self.pids: dict[str, int] = {n: self._receive(pipe) for n, pipe in self.pipes.items()}

    def run_for(self, mode: str, seconds: float) -> dict[str, list[Stamp]]:
        for pipe in self.pipes.values():
            pipe.send((mode, seconds))
        return {
            name: [Stamp(at, step, Totals()) for at, step in self._receive(pipe)]
            for name, pipe in self.pipes.items()
        }

    def _receive(self, pipe: Connection) -> Any:
        if not pipe.poll(PATIENCE):
            raise SystemExit("a bare loop does not answer")
        return pipe.recv()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join(10.0)
