"""One task of a running collective: its trainer, its checkpoints and its evaluations.

The Ray actor and the inline backend are both made of it; it knows neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch

from taskray.data.storage.source import Handle
from taskray.data.streams.dedicated import DedicatedStream
from taskray.data.streams.mediator import MediatorStream
from taskray.data.streams.order import MediatorOrder
from taskray.data.streams.stream import plain_batches
from taskray.errors import InputError, one_line
from taskray.job.config import Job
from taskray.loop.assembly import (
    build_inner_relations,
    build_learned,
    build_relations,
    build_task,
    seed_of,
)
from taskray.loop.evaluation import Evaluation, evaluate, learn_constant, measured_columns
from taskray.loop.interfaces import Peers
from taskray.loop.learned import Learned
from taskray.loop.metric_key import Evaluated
from taskray.loop.report import ChunkReport
from taskray.loop.trainer import Trainer
from taskray.loop.wiring import Role, Wiring
from taskray.runtime.checkpoints import CheckpointStore, find_checkpoint, load_into, serialize
from taskray.tasks.constant import Constant

NUM_SAMPLES = 4
"""Frames of the main evaluation that are kept to look at."""

CONSTANT_ROWS = 1024
"""Labelled rows of each dataset that the constant predictor learns from: the first ones."""


class Member:
    """Builds everything one task needs, from the job, the wiring and the opened datasets.

    Args:
        job: of the run.
        name: of the task.
        wiring: of the collective.
        data: the opened datasets, by name.
        checkpoints: where the task's are kept.
        peers: the rest of the collective; None where no relation involves the task.
        device: ``cpu`` or ``cuda``.
        in_lock_step: whether all tasks make the same mediator visits at the same time.
    """

    def __init__(
        self,
        job: Job,
        name: str,
        wiring: Wiring,
        data: Mapping[str, Handle],
        checkpoints: CheckpointStore,
        peers: Peers | None,
        device: str = "cpu",
        in_lock_step: bool = False,
    ) -> None:
        self.job, self.name, self.checkpoints = job, name, checkpoints
        self.evaluations: dict[str, Handle] = {}
        torch.manual_seed(seed_of(job, name))  # dropout and some weightings draw from torch's own
        task, role = build_task(job, name), wiring.roles[name]
        relations = build_relations(job, name, task)
        inner = build_inner_relations(job, name, task)
        self.trainer = Trainer(
            name,
            job,
            task,
            build_learned(job, name, task, [*relations, *inner]),
            seed=seed_of(job, name),
            relations=relations,
            inner_relations=inner,
            published=role.publishes,
            dedicated=_dedicated(job, name, role, data),
            mediator=_mediator(job, name, wiring, data, in_lock_step),
            peers=peers,
            device=device,
        )
        self.saved_step = self.evaluated_step = -1
        self._data, self._role = data, role
        self._constants: dict[str, dict[str, float]] = {}  # evaluation -> metrics

    def resume(self) -> int:
        """Go on from the latest checkpoint, where there is one, or from the weights that the job
        begins with; returns the step."""
        checkpoint = self.checkpoints.latest(self.name)
        if checkpoint is not None:
            load_into(self.trainer.learned, checkpoint)
            try:
                self.trainer.load_state_dict(checkpoint.state)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    checkpoint.location,
                    f"its training state is of another version of taskray ({one_line(error)}); "
                    "expected one of this version, or --resume never",
                ) from error
            self.saved_step = self.evaluated_step = checkpoint.step
        else:
            load_initial(self.job, self.name, self.trainer.learned)
        return self.trainer.steps_made

    @property
    def finished(self) -> bool:
        return self.trainer.steps_made >= self.trainer.total_steps

    def after_steps(self, report: ChunkReport) -> ChunkReport:
        """Do what is due after a chunk: an evaluation for the curves, a checkpoint."""
        step = self.trainer.steps_made
        every = self.job.evaluation.every
        if every and step // every > max(0, self.evaluated_step) // every and not self.finished:
            self.evaluated_step = step
            for title in self.evaluations:
                for metric, value in self.evaluate(title).metrics.items():
                    report.values[str(Evaluated(title, metric))] = value
        if self.finished or step // self.job.checkpoint.every > max(0, self.saved_step) // (
            self.job.checkpoint.every
        ):
            self.save()
        self.trainer.start_clock()
        return report

    def save(self) -> str | None:
        """Write a checkpoint of the present step, unless it is there already."""
        step = self.trainer.steps_made
        if step == self.saved_step:
            return None
        weights, state = self.trainer.learned.weights(), self.trainer.state_dict()
        with self.trainer.naming_errors():
            location = self.checkpoints.write(self.name, step, *serialize(weights, state))
        self.saved_step = step
        return location

    def evaluate(self, title: str, num_samples: int = 0) -> Evaluation:
        """Measure on one of the job's evaluations. A dataset without this task's labels gives no
        metric. The constant predictor beside it is measured once."""
        data, size = self.evaluations[title], self.job.evaluation.batch_size
        columns = measured_columns(self.trainer.task, data.info.layout)
        if not columns:
            return Evaluation({})
        constant = None if title in self._constants else self._constant(title)
        found = evaluate(
            self.trainer.network, plain_batches(data.open(), size, columns), num_samples, constant
        )
        found.constant = self._constants.setdefault(title, found.constant)
        return found

    def _constant(self, title: str) -> Constant | None:
        """The constant predictor, of the labels that this task learns from; of a task without
        labels those of the evaluation itself, a yardstick that is a little too good."""
        labels = [(self._data[dataset], columns) for dataset, columns in self._role.labels.items()]
        if not labels:
            evaluation = self.evaluations[title]
            columns = measured_columns(self.trainer.task, evaluation.info.layout)
            labels = [(evaluation, columns)]
        size = self.job.evaluation.batch_size
        batches = (
            batch
            for data, columns in labels
            for batch in islice(
                plain_batches(data.open(), size, columns), -(-CONSTANT_ROWS // size)
            )
        )
        return learn_constant(self.trainer.task, batches)

    def close(self) -> None:
        self.trainer.close()


def _dedicated(
    job: Job, name: str, role: Role, data: Mapping[str, Handle]
) -> list[DedicatedStream]:
    batch_size, seed = job.tasks[name].batch_size, seed_of(job, name)
    return [
        DedicatedStream(data[dataset].open(), batch_size, seed, columns)
        for dataset, columns in role.labels.items()
    ]


def _mediator(
    job: Job, name: str, wiring: Wiring, data: Mapping[str, Handle], in_lock_step: bool
) -> MediatorStream | None:
    role, mediator = wiring.roles[name], job.mediator
    if mediator is None or not role.tied or role.frozen:
        return None
    source = data[mediator.data].open()
    order = MediatorOrder(
        -(-source.info.num_rows // mediator.batch_size),
        mediator.window,
        mediator.shuffle,
        job.seed,
        mediator.visits if in_lock_step else None,
    )
    return MediatorStream(source, mediator.batch_size, order, wiring.mediator_columns(name))


def load_initial(job: Job, name: str, learned: Learned) -> None:
    """Give a network the weights that ``tasks.<name>.checkpoint`` names, where it names some;
    InputError where they are missing or those of another model."""
    location = job.tasks[name].checkpoint
    if location is None:
        return
    try:
        load_into(learned.network, find_checkpoint(location, name))
    except InputError as error:
        raise InputError(f"tasks.{name}.checkpoint", str(error)) from None


def choose_device(gpus: float) -> str:
    """CUDA where the job reserves a GPU for the task, else the CPU."""
    return "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
