"""What runs in a task's own process. It answers short calls, so the driver always has its ear."""

from __future__ import annotations

import os
import time
from typing import Any

import ray
import torch
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.exchange.messages import Publication
from taskray.job.config import parse_job
from taskray.loop.assembly import build_model, build_relations, build_task, published_quantities
from taskray.loop.evaluation import Evaluation
from taskray.loop.predicting import frames_of, predict
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import Member, choose_device
from taskray.runtime.peers import CachePeers
from taskray.runtime.process import keep_freed_memory, use_threads

PEERS = "peers"
"""What answers peers runs in this concurrency group, so that the driver's calls stay in order."""


class TaskActor:
    """One task: its model, optimizer, hyperparameters, data and loop, in one process.

    The constructor does nothing that can fail: :meth:`setup` does, as a call with an answer, so
    that an error of the job is told from a lost process.
    """

    def __init__(self, job: dict[str, Any], name: str, threads: int) -> None:
        use_threads(threads)
        keep_freed_memory()
        self.job, self.name = parse_job(job, "job"), name
        self.member: Member | None = None
        self.peers: CachePeers | None = None

    def setup(
        self, data: dict[str, Any], checkpoints: str, cache: Any, server: Any = None
    ) -> dict[str, Any]:
        """Build everything, go on from the latest checkpoint, join the collective.

        Returns ``step`` and the process id. Raises InputError for what the job has wrong.
        """
        store = CheckpointStore(checkpoints, self.job.checkpoint.keep)

        def make_peers(published: tuple[str, ...], wanted: dict[str, int]) -> CachePeers:
            self.peers = CachePeers(self.job, self.name, published, wanted, cache, server)
            return self.peers

        device = choose_device(self.job.tasks[self.name].gpus)
        asked = self.job.tasks if self.job.uses_forward_servers else self.job.frozen
        self.member = Member(self.job, self.name, data, store, make_peers, device, asked)
        step = self.member.resume()
        if self.peers is not None:
            self.peers.announce(step, self.member.trainer.model)
            if self.member.finished:  # it comes back to serve, or is frozen: nobody waits for it
                self.peers.retire()
        self.member.trainer.start_clock()
        return {"step": step, "pid": os.getpid()}

    def add_evaluations(self, data: dict[str, Any]) -> None:
        """The opened datasets of the evaluations, by title; they may come late."""
        self._member.evaluations.update(data)

    def train(self, num_steps: int) -> dict[str, Any]:
        """One chunk; see :meth:`taskray.loop.trainer.Trainer.report`. Also the process id."""
        member = self._member
        report = member.after_steps(member.trainer.train(num_steps))
        report["pid"] = os.getpid()
        if self.peers is not None:
            report["values"]["publishes_dropped"] = float(self.peers.dropped_publishes)
            if member.finished:
                self.peers.retire()
        return report

    def serve(self, seconds: float) -> dict[str, Any]:
        """After the last step: predict for the peers for a while; see ``Trainer.serve``."""
        trainer = self._member.trainer
        trainer.serve(seconds)
        return {"step": trainer.step, "served": self.peers is not None}

    def save(self) -> dict[str, Any]:
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


RECENT = 4
"""Predictions that a frozen task remembers: peers come to a batch together, and all ask."""


class FrozenActor(TaskActor):
    """A task that never trains: it predicts when a peer asks, beside what the driver calls."""

    def __init__(self, job: dict[str, Any], name: str, threads: int) -> None:
        super().__init__(job, name, threads)
        self.failure: Exception | None = None
        self.recent: dict[int, dict[str, Tensor]] = {}  # by mediator batch, oldest first

    def setup(
        self, data: dict[str, Any], checkpoints: str, cache: Any, server: Any = None
    ) -> dict[str, Any]:
        """As of any task; it is its own forward server, for a copy would never differ from it."""
        return super().setup(data, checkpoints, cache, ray.get_runtime_context().current_actor)

    def serve(self, seconds: float) -> dict[str, Any]:
        """Say that it is alive: :meth:`fill` serves meanwhile. Raises what went wrong there."""
        if self.failure is not None:
            raise self.failure
        trainer = self._member.trainer
        if self.peers is not None:
            self.peers.announce(trainer.step, trainer.model)  # a restarted cache has forgotten it
            time.sleep(seconds)
        return {"step": trainer.step, "served": self.peers is not None}

    @ray.method(concurrency_group=PEERS)  # type: ignore[untyped-decorator]
    def fill(
        self, batch: int, inputs: dict[str, Any], cached: int | None, window: int
    ) -> str | None:
        """Predict on a batch that a peer asks about; see :meth:`ForwardServer.fill`."""
        trainer = self._member.trainer
        asked = Batch({k: torch.from_numpy(v.copy()) for k, v in inputs.items()}, batch, window)
        prediction = self.recent.get(batch)
        if prediction is None:
            try:
                prediction = self.recent[batch] = trainer.answer(asked)
            except Exception as error:
                self.failure = error
                raise
            if len(self.recent) > RECENT:
                del self.recent[next(iter(self.recent))]
        assert self.peers is not None
        new = Publication.of(self.name, asked, trainer.step, prediction, self.job.cache.dtype)
        refused: str | None = ray.get(self.peers.cache.publish.remote(new))
        return refused


class ForwardServer:
    """A stale copy of one task's model that predicts on demand (the paper's Figure 4)."""

    def __init__(self, job: dict[str, Any], name: str, threads: int, cache: Any) -> None:
        use_threads(threads)
        keep_freed_memory()
        self.job, self.name, self.cache = parse_job(job, "job"), name, cache
        self.task = build_task(self.job, name)
        relations = build_relations(self.job, name, self.task)
        self.published = published_quantities(self.task, relations)
        self.device = choose_device(self.job.tasks[name].gpus)
        self.model = build_model(self.job, name, self.task).to(self.device).eval()
        self.step: int | None = None
        self.forward_passes = 0

    async def version(self) -> int | None:
        """Step of the trainer whose weights this copy has; None before the first refresh."""
        return self.step

    async def statistics(self) -> dict[str, int]:
        return {"forward_passes": self.forward_passes}

    async def refresh(self, step: int, weights: dict[str, Any]) -> None:
        """Take the trainer's weights."""
        self.model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()})
        self.step = step

    async def fill(
        self, batch: int, inputs: dict[str, Any], cached: int | None, window: int
    ) -> str | None:
        """Predict on a batch and put the prediction into the cache, unless the one that is
        ``cached`` comes from weights as new as these. Returns why not, where it could not."""
        if self.step is None:
            return "no weights yet"
        if self.job.forward_server.reuse and cached is not None and cached >= self.step:
            return None
        tensors = {k: torch.from_numpy(v.copy()).to(self.device) for k, v in inputs.items()}
        with torch.inference_mode():
            prediction = predict(
                self.task, self.model, tensors, frames_of(self.task, self.published)
            )
        self.forward_passes += 1
        published = {q: prediction[q] for q in self.published}
        asked = Batch(tensors, batch, window)
        new = Publication.of(self.name, asked, self.step, published, self.job.cache.dtype)
        refused: str | None = await self.cache.publish.remote(new)
        return refused
