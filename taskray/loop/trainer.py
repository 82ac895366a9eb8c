"""The training loop of one task: the heart of taskray.

    dedicated ──▶ supervised step:   forward · task loss · backward · update
    mediator  ──▶ consistency step:  forward ──publish──▶ peers
                                        │
                                        ▼
                                     relations(live prediction, peers' stale predictions)
                                        │       ▲
                                        ▼       └──collect── peers   (asked for a step ahead)
                                     backward · update

Gradients never leave the task. The same loop runs inside a Ray actor and in one process: it
knows its data only as *streams* and the other tasks only as *peers*.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taskray.data.streams.augment import augment
from taskray.data.streams.batch import Batch
from taskray.errors import TaskrayError, TrainingError
from taskray.job.config import Job, RelationConfig
from taskray.loop.interfaces import NoPeers, PeerPredictions, Peers, Stream
from taskray.loop.meters import ChunkMeter, Edge, Totals
from taskray.loop.optimization import build_optimizer, learning_rate
from taskray.loop.predicting import FIRST, frames_of, predict, predicted_on
from taskray.loop.shapes import check_prediction
from taskray.relations.relation import Relation
from taskray.tasks.task import Output, Task


@dataclass(frozen=True)
class WeightedRelation:
    """A relation with its weight in the job."""

    name: str
    relation: Relation
    config: RelationConfig
    scale: float = 1.0
    """The consuming task's own factor; 0 where it only teaches."""

    def has_begun(self, step: int) -> bool:
        """Whether the relation ties the tasks of the job yet, whatever this one makes of it."""
        return step >= self.config.start_step

    def weight(self, step: int) -> float:
        """0 before ``start_step``, then rising linearly to the full weight."""
        if not self.has_begun(step):
            return 0.0
        since = step - self.config.start_step
        warmth = min(1.0, (since + 1) / max(1, self.config.warmup_steps))
        return self.scale * self.config.weight * warmth


class NotFinite(TaskrayError):
    """A loss or a gradient that is NaN or infinite; nothing was updated."""


class Trainer:
    """Trains one task. Call :meth:`train`; or :meth:`begin` and :meth:`finish` for half steps: in
    one process, all tasks publish before any of them reads."""

    def __init__(
        self,
        name: str,
        job: Job,
        task: Task,
        model: nn.Module,
        *,
        seed: int,
        relations: list[WeightedRelation] | None = None,
        published: Sequence[str] = (),
        dedicated: Stream | None = None,
        mediator: Stream | None = None,
        peers: Peers | None = None,
        device: str = "cpu",
    ) -> None:
        self.name, self.job, self.task = name, job, task
        self.config = job.tasks[name]
        self.device = torch.device(device)
        self.layout = {
            "contiguous": torch.contiguous_format,
            "channels_last": torch.channels_last,
        }[self.config.memory_format]
        # torch declares no overload of `to` that takes a memory format alone with a device
        self.model: nn.Module = model.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.model.train(not self.config.frozen)
        self.forward: Callable[[Tensor], Output] = (
            torch.compile(self.model) if self.config.compile else self.model
        )
        self.optimizer = build_optimizer(self.model.parameters(), self.config.optimizer)
        self.dedicated, self.mediator = dedicated, mediator
        self.relations = relations or []
        self.published = tuple(published)
        self.peers: Peers = peers or NoPeers()
        self.random = torch.Generator().manual_seed(seed)
        self.step = 0
        self.total_steps = job.steps_of(name)
        self.totals = Totals()
        self.start_clock()
        self._upcoming: Batch | None = None  # the mediator batch that peers are being asked about
        self._mediator_state: dict[str, Any] | None = None  # its position, were it not yet drawn
        self._served: set[tuple[int, int]] = set()  # (window, batch) predicted on after the end
        self._live: tuple[Batch, dict[str, Tensor]] | None = None  # between begin and finish

    # ---- the loop -------------------------------------------------------------------------

    def train(self, num_steps: int) -> dict[str, Any]:
        """Train so many steps, or up to the task's last one; returns :meth:`report`.

        Raises TrainingError with task, step and cause; nothing else leaves the loop.
        """
        end = min(self.total_steps, self.step + num_steps)
        while self.step < end:
            self.begin()
            self.finish()
        return self.report()

    @property
    def _is_tied(self) -> bool:
        return self.mediator is not None and bool(self.relations)

    @property
    def _in_step(self) -> bool:
        """Whether its steps are bound to those of its peers. To go on where they are would be to
        come to each batch at another step than they, for good; they wait until it is there."""
        bound = self.job.staleness
        return bound.on_stale == "wait" and bound.max_steps is not None

    @property
    def _only_teaches(self) -> bool:
        """Whether it predicts for its peers and learns nothing from them."""
        return all(relation.scale == 0 for relation in self.relations)

    def is_consistency_step(self, step: int) -> bool:
        """Whether a step is spent on the mediator dataset, by the job's alternation."""
        alternation = self.job.mediator
        if not self._is_tied or alternation is None:
            return False
        if self.dedicated is None:
            return True
        if self._only_teaches and self.job.runtime.publisher == "forward_server":
            return False  # its server predicts for it
        if not any(relation.has_begun(step) for relation in self.relations):
            return False
        return alternation.has_turn(step)

    def begin(self) -> None:
        """First half of a step: on the mediator, predict and publish. Needs no peer."""
        with self._naming_errors():
            use = self.step if self.is_consistency_step(self.step) else self.step + 1
            if self._upcoming is None and self.is_consistency_step(use):
                self._ask_ahead(use)
            if use != self.step or not self.is_consistency_step(use):
                return
            batch = self._take_upcoming()
            frames = frames_of(self.task, self.published)
            prediction = self.infer(batch, frames) if self._only_teaches else self.predict(batch)
            self._publish(batch, prediction)
            self._live = (self._to_device(batch), prediction)

    def finish(self) -> None:
        """Second half: the loss, its gradient, the update."""
        with self._naming_errors():
            if self._live is None:
                self._supervised_step()
                self.totals.supervised_steps += 1
            else:
                (batch, prediction), self._live = self._live, None
                self._consistency_step(batch, prediction)
                self.totals.consistency_steps += 1
            self.step += 1
            self.peers.stepped(self.step, self.model)

    def _supervised_step(self) -> None:
        if self.dedicated is None:
            raise TaskrayError("no labels and no consistency: nothing to train on")
        waiting = time.perf_counter()
        batch = self.dedicated.next()
        self.meter.wait_seconds += time.perf_counter() - waiting
        self.task.check_batch(batch.tensors)
        batch = self._to_device(augment(batch, self.config.augment, self.random, labelled=True))
        terms = self.task.loss(self._predict(batch), batch.tensors)
        loss = torch.stack(list(terms.values())).sum()
        for term, value in terms.items():
            self.meter.add(f"loss/{term}", value.detach())
        self.meter.add("loss/supervised", loss.detach())
        self._update(loss, checked=self.device.type == "cpu")

    def _consistency_step(self, batch: Batch, prediction: dict[str, Tensor]) -> None:
        waiting = time.perf_counter()
        found = self.peers.collect(batch, self.step)
        self.meter.wait_seconds += time.perf_counter() - waiting
        assert self.mediator is not None
        self.mediator.keep_up(0 if self._in_step else found.front, found.through)
        if self.is_consistency_step(self.step + 1):
            self._ask_ahead(self.step + 1)
        self._count(found)
        stale = {q: self._on_device(p.tensors[q]) for q, p in found.by_quantity.items()}
        known = {**stale, **prediction}  # what this task predicts itself is live
        loss, values = None, {}
        for weighted in self.relations:
            weight = weighted.weight(self.step)
            if weight == 0 or not known.keys() >= set(weighted.relation.quantities):
                continue
            terms = self._evaluate(weighted, known, batch)
            value = torch.stack(list(terms.values())).sum()
            values[weighted.name] = value.detach()
            if len(terms) > 1:
                values |= {f"{weighted.name}/{t}": v.detach() for t, v in terms.items()}
            loss = weight * value if loss is None else loss + weight * value
        if loss is None or not loss.requires_grad:  # nobody to be consistent with, or no way to be
            self.totals.skipped_consistency_steps += 1
            return
        try:
            self._update(loss, checked=True)
        except NotFinite:
            if not all(bool(torch.isfinite(p).all()) for p in prediction.values()):
                raise
            # This task's own prediction is sound: the peer's was absurd. Its bad luck, not ours.
            self.totals.skipped_consistency_steps += 1
            self.totals.misses["unusable"] = self.totals.misses.get("unusable", 0) + 1
            return
        self.meter.add("loss/consistency", loss.detach())
        for name, value in values.items():
            self.meter.add(f"loss/consistency/{name}", value)

    def _evaluate(
        self, weighted: WeightedRelation, known: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The relation's terms; where it fails, the shapes say more than the exception."""
        try:
            return weighted.relation(known, batch.tensors)
        except Exception as error:
            shapes = ", ".join(
                f"{q} {'x'.join(map(str, known[q].shape))}" for q in weighted.relation.quantities
            )
            raise TaskrayError(
                f"relation {weighted.name!r} failed on {shapes}: {type(error).__name__}: {error}"
            ) from error

    def _update(self, loss: Tensor, checked: bool) -> None:
        """Descend. ``checked``: raise NotFinite, with nothing updated, rather than take what is
        not finite. On a CPU that is free. A GPU has to be waited for, which only what peers have
        said is worth: the sums of the other steps are looked at when the chunk ends, before any
        checkpoint is written."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip = self.config.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip or float("inf"))
        if checked and not torch.isfinite(norm):
            what = "its gradient" if torch.isfinite(loss) else "the loss"
            raise NotFinite(f"{what} is not finite (loss {float(loss.detach()):g})")
        self.meter.add("grad_norm", norm.detach())
        rate = learning_rate(self.config.optimizer, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def serve(self, seconds: float) -> None:
        """After the last step: predict for the peers still in training, on the mediator windows
        that they come to, for about so long. Each batch once: the model does not change."""
        end = time.monotonic() + seconds
        with self._naming_errors():
            while self._is_tied and time.monotonic() < end:
                if self._upcoming is None:
                    self._ask_ahead(self.step)
                batch = self._upcoming
                assert batch is not None
                assert batch.id is not None
                assert self.mediator is not None
                front = self.peers.collect(batch, self.step).front
                self.mediator.keep_up(front)
                if batch.window > front:  # nobody has come to it yet
                    time.sleep(0.1)
                    self.peers.request(batch, self.step, self.step)
                    continue
                self._upcoming = None
                if batch.window == front and (front, batch.id) not in self._served:
                    self._served.add((front, batch.id))
                    self._publish(batch, self.infer(batch, frames_of(self.task, self.published)))
            self.start_clock()  # serving is no training

    def answer(self, batch: Batch) -> dict[str, Tensor]:
        """What peers use of the prediction on a mediator batch, because one of them asks for it;
        all that a frozen task does."""
        with self._naming_errors():
            prediction = self.infer(batch, frames_of(self.task, self.published))
            return {q: prediction[q] for q in self.published}

    # ---- prediction -----------------------------------------------------------------------

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """The live prediction on a mediator batch, photometrically augmented for this task."""
        own = augment(batch, self.config.augment, self.random, labelled=False)
        return self._predict(self._to_device(own), frames_of(self.task, self.published))

    def _predict(self, batch: Batch, frames: Sequence[str] = FIRST) -> dict[str, Tensor]:
        prediction = predict(self.task, self._network, batch.tensors, frames, self.layout)
        check_prediction(prediction, batch, predicted_on(self.task, frames))
        return prediction

    def _network(self, inputs: Tensor) -> Output:
        with self._precision():
            return self.forward(inputs)

    def _publish(self, batch: Batch, prediction: Mapping[str, Tensor]) -> None:
        self.peers.publish(batch, self.step, {q: prediction[q].detach() for q in self.published})

    @torch.no_grad()
    def infer(self, batch: Batch, frames: Sequence[str] = FIRST) -> dict[str, Tensor]:
        """The prediction in evaluation mode, without augmentation or gradient."""
        trains = self.model.training
        self.model.eval()
        try:
            return self._predict(self._to_device(batch), frames)
        finally:
            self.model.train(trains)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        tensors = {k: self._on_device(v) for k, v in batch.tensors.items()}
        return replace(batch, tensors=tensors)

    # ---- the mediator, one batch ahead ----------------------------------------------------

    def _ask_ahead(self, use: int) -> None:
        """Draw the next mediator batch and ask for its peers, a step before the one that uses it:
        long enough to hide the way there and back, short enough that they are still fresh."""
        assert self.mediator is not None
        waiting = time.perf_counter()
        self._mediator_state = self.mediator.state_dict()
        self._upcoming = self.mediator.next()
        self.peers.request(self._upcoming, self.step, use)
        self.meter.wait_seconds += time.perf_counter() - waiting

    def ask_again(self) -> None:
        """After a pause between two steps (an evaluation, a checkpoint): its peers have trained
        on meanwhile, and what was found for the step to come may be beyond ``max_steps`` now.

        Where peers wait for each other they have not, and a second question would hold them up.
        """
        if self._upcoming is not None and self.job.staleness.on_stale != "wait":
            self.peers.request(self._upcoming, self.step, self.step)

    def _take_upcoming(self) -> Batch:
        assert self._upcoming is not None
        batch, self._upcoming = self._upcoming, None
        return batch

    # ---- bookkeeping ----------------------------------------------------------------------

    def _count(self, found: PeerPredictions) -> None:
        for prediction in {p.task: p for p in found.by_quantity.values()}.values():
            for edges in (self.meter.edges, self.totals.edges):
                edge = edges.setdefault(prediction.task, Edge())
                edge.hit(prediction.staleness_steps, prediction.age_seconds)
        for peer, reason in found.misses.items():
            self.totals.misses[reason] = self.totals.misses.get(reason, 0) + 1
            for edges in (self.meter.edges, self.totals.edges):
                edges.setdefault(peer, Edge()).lookups += 1

    def report(self) -> dict[str, Any]:
        """What happened since the last report: ``values`` are means over those steps, ``totals``
        counts since the run began. Plain values, so that it travels between processes."""
        seconds = time.perf_counter() - self._since
        values = self.meter.means()
        with self._naming_errors():
            for name, value in values.items():
                if not math.isfinite(value):
                    raise TaskrayError(f"{name} is not finite")
        steps = self.step - self._reported_step
        self.totals.train_seconds += seconds
        self.totals.wait_seconds += self.meter.wait_seconds
        values["steps_per_second"] = steps / seconds if seconds else 0.0
        values["data_wait_fraction"] = self.meter.wait_seconds / seconds if seconds else 0.0
        values["lr"] = learning_rate(self.config.optimizer, self.step, self.total_steps)
        values["skipped_consistency_steps"] = float(self.totals.skipped_consistency_steps)
        self.start_clock()
        return {
            "task": self.name,
            "step": self.step,
            "values": values,
            "totals": self.totals.state_dict(),
            "corrupt_rows": self.corrupt_rows(),
        }

    def start_clock(self) -> None:
        """Begin a chunk: what lies between two chunks is not training time."""
        self.meter = ChunkMeter()
        self._since, self._reported_step = time.perf_counter(), self.step

    def corrupt_rows(self) -> int:
        """Rows that could not be used, each counted once, also where the labels and the mediator
        are one dataset."""
        streams = [s for s in (self.dedicated, self.mediator) if s is not None]
        found = {row for stream in streams for row in stream.corrupt.keys}
        return len(found) + sum({s.corrupt.dataset: s.corrupt.left_out for s in streams}.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on."""
        mediator = self._mediator_state if self._upcoming is not None else None
        if mediator is None and self.mediator is not None:
            mediator = self.mediator.state_dict()
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "totals": self.totals.state_dict(),
            "dedicated": self.dedicated.state_dict() if self.dedicated else None,
            "mediator": mediator,
            "augmentation_random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state (the weights are loaded by whoever read the checkpoint)."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.totals = Totals.from_state(state["totals"])
        if self.dedicated and state["dedicated"]:
            self.dedicated.load_state_dict(state["dedicated"])
        if self.mediator and state["mediator"]:
            self.mediator.load_state_dict(state["mediator"])
        self.random.set_state(state["augmentation_random"])
        torch.set_rng_state(state["torch_random"])
        self._upcoming = self._live = None
        self.start_clock()

    def close(self) -> None:
        """End the threads of the streams."""
        for stream in (self.dedicated, self.mediator):
            if stream is not None:
                stream.close()

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Whatever goes wrong in a step leaves it as one error that names the task and step."""
        try:
            yield
        except TrainingError:
            raise
        except TaskrayError as error:
            raise TrainingError(self.name, self.step, str(error)) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise TrainingError(self.name, self.step, reason) from error
