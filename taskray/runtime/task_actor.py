"""The processes of a collective that have a network: a task, its forward server. Every call is
short, so the driver can always reach the actor."""

from __future__ import annotations

import os
from typing import Any

import ray
import torch

from taskray.exchange.messages import Made, Publication
from taskray.exchange.transport import ByValue
from taskray.job.config import parse_job
from taskray.loop.assembly import build_model, build_task
from taskray.loop.evaluation import Evaluation
from taskray.loop.metric_key import PUBLISHES_DROPPED
from taskray.loop.network import Network
from taskray.loop.report import ChunkReport
from taskray.loop.wiring import Wiring
from taskray.runtime.answering import Answering, Request
from taskray.runtime.cache_link import CALL_TIMEOUT
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import Member, choose_device
from taskray.runtime.peers import CachePeers
from taskray.runtime.process import keep_freed_memory, use_threads
from taskray.runtime.reports import SetupReport, StandByReport
from taskray.runtime.stale_copy import StaleCopy


class TaskActor:
    """One task: its model, optimizer, hyperparameters, data and loop, in one process.

    The constructor does nothing that can fail: :meth:`setup` does, as a call with an answer, so
    that an error of the job can be told apart from a lost process.
    """

    def __init__(self, job: dict[str, Any], name: str, threads: int) -> None:
        use_threads(threads)
        keep_freed_memory()
        self.job, self.name = parse_job(job, "job"), name
        self.member: Member | None = None
        self.peers: CachePeers | None = None
        self.server: Any = None
        self.answering: Answering | None = None
        self.failure: Exception | None = None

    def setup(
        self, wiring: Wiring, data: dict[str, Any], checkpoints: str, cache: Any, server: Any = None
    ) -> SetupReport:
        """Build everything, go on from the latest checkpoint, join the collective.

        Raises InputError for what the job has wrong.
        """
        store, self.server = CheckpointStore(checkpoints, self.job.checkpoint.keep), server
        if wiring.roles[self.name].tied:
            self.peers = CachePeers(self.job, self.name, wiring, cache)
        device = choose_device(self.job.tasks[self.name].gpus)
        synchronous = self.job.staleness.synchronous
        self.member = Member(
            self.job, self.name, wiring, data, store, self.peers, device, synchronous
        )
        step = self.member.resume()
        if self.peers is not None:
            self._join(self.peers, self.member, step)
        self.member.trainer.start_clock()
        return SetupReport(step, os.getpid())

    def _join(self, peers: CachePeers, member: Member, step: int) -> None:
        trainer = member.trainer
        if self.server is not None:
            copy = StaleCopy(self.server, trainer.network.module, self.job, peers.link)
            peers.on_step = copy.stepped
            copy.refresh(step)
        if member.finished:  # it comes back to answer, or is frozen
            self._answer_on_demand()
            return
        mediator = trainer.mediator
        window = peers.link.announce(step, mediator.position() if mediator else None, self.server)
        if mediator is not None:
            mediator.follow(window)

    def _answer_on_demand(self) -> None:
        """The task does not train any more: predict when a peer asks."""
        assert self.peers is not None
        trainer, peers = self._member.trainer, self.peers
        trainer.network.module.eval()  # for good
        dtype = self.job.cache.dtype
        self.answering = Answering(
            self.name,
            trainer.network,
            trainer.published,
            dtype,
            peers.link.publish,
        )
        # not its forward server: that has the weights of an earlier step
        handle = ray.get_runtime_context().current_actor
        peers.link.retire(trainer.steps_made, handle)

    def add_evaluations(self, data: dict[str, Any]) -> None:
        """The opened datasets of the evaluations, by title; they may come late."""
        self._member.evaluations.update(data)

    def train(self, num_steps: int) -> ChunkReport:
        """One chunk of steps."""
        member = self._member
        report = member.after_steps(member.trainer.train(num_steps))
        if self.peers is not None:
            report.values[PUBLISHES_DROPPED] = float(self.peers.link.dropped_publishes)
            if member.finished and self.answering is None:
                self._answer_on_demand()
        return report

    def stand_by(self) -> StandByReport:
        """After the last step, while peers still train: raises what went wrong in
        :meth:`predict_for`."""
        if self.failure is not None:
            raise self.failure
        if self.peers is not None:
            self.peers.link.announce_again()  # a restarted cache has forgotten the task
        return StandByReport(self._member.trainer.steps_made, self.peers is not None)

    def predict_for(self, request: Request, inputs: dict[str, Any]) -> str | None:
        """Predict on a batch that a peer asks about; see :meth:`Answering.predict_for`."""
        if self.answering is None:
            return "the task is still training"
        try:
            step = self._member.trainer.steps_made
            return self.answering.predict_for(request, inputs, step)
        except Exception as error:
            self.failure = error
            raise

    def save(self) -> ChunkReport:
        """Write a checkpoint now; returns the report of the steps since the last one."""
        report = self._member.trainer.report()  # raises where a loss was not finite: do not keep it
        self._member.save()
        return report

    def evaluate(self, title: str, num_samples: int = 0) -> Evaluation:
        """One evaluation of the job, see :func:`taskray.loop.evaluation.evaluate`."""
        return self._member.evaluate(title, num_samples)

    @property
    def _member(self) -> Member:
        if self.member is None:
            raise RuntimeError("setup was not called")
        return self.member


class ForwardServer:
    """A stale copy of one task's network that predicts on demand (the paper's Figure 4)."""

    def __init__(
        self, job: dict[str, Any], name: str, threads: int, wiring: Wiring, cache: Any
    ) -> None:
        use_threads(threads)
        keep_freed_memory()
        self.job, self.cache = parse_job(job, "job"), cache
        task, config = build_task(self.job, name), self.job.tasks[name]
        model = build_model(self.job, name, task)
        network = Network(task, model, config, choose_device(config.gpus))
        self.step: int | None = None
        self.answering = Answering(
            name,
            network,
            wiring.roles[name].publishes,
            self.job.cache.dtype,
            self._publish,
            self.job.forward_server.reuse,
        )

    def version(self) -> int | None:
        """Step of the trainer whose weights this copy has; None before the first refresh."""
        return self.step

    def statistics(self) -> dict[str, int]:
        """``forward_passes`` so far."""
        return {"forward_passes": self.answering.forward_passes}

    def refresh(self, step: int, weights: dict[str, Any]) -> None:
        """Take the trainer's weights."""
        module = self.answering.network.module
        module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()})
        self.step = step

    def predict_for(self, request: Request, inputs: dict[str, Any]) -> str | None:
        """Predict on a batch that a peer asks about; see :meth:`Answering.predict_for`."""
        if self.step is None:
            return "no weights yet"
        return self.answering.predict_for(request, inputs, self.step)

    def _publish(self, new: Made) -> str | None:
        task, token = self.answering.task, ByValue(dict(new.arrays))
        publication = Publication(task, new.batch, new.place, new.step, token, new.produced_at)
        refused: str | None = ray.get(self.cache.publish.remote(publication), timeout=CALL_TIMEOUT)
        return refused
