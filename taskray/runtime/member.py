"""One task of a running collective: its trainer, its checkpoints and its evaluations.

The Ray actor and the inline backend are both made of it; it knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from taskray.data.storage.source import Handle
from taskray.data.streams.batch import Batch
from taskray.data.streams.stream import DedicatedStream, MediatorStream, plain_batches
from taskray.errors import InputError
from taskray.job.config import Job
from taskray.loop.assembly import (
    asked_columns,
    build_relations,
    build_task,
    build_trainer,
    mediator_columns,
    published_quantities,
    seed_of,
    wanted_quantities,
)
from taskray.loop.evaluation import Evaluation, evaluate
from taskray.loop.interfaces import Peers
from taskray.runtime.checkpoints import CheckpointStore, find_checkpoint, load_into, serialize

NUM_SAMPLES = 4
"""Frames of the main evaluation that are kept to look at."""


class Member:
    """Builds everything one task needs, from the job and the opened datasets. ``asked`` are the
    tasks that it may ask to predict."""

    def __init__(
        self,
        job: Job,
        name: str,
        data: Mapping[str, Handle],
        checkpoints: CheckpointStore,
        make_peers: Callable[[tuple[str, ...], dict[str, int]], Peers],
        device: str = "cpu",
        asked: Collection[str] = (),
    ) -> None:
        self.job, self.name, self.checkpoints = job, name, checkpoints
        self.evaluations: dict[str, Handle] = {}
        task = build_task(job, name)
        relations = build_relations(job, name, task)
        config = job.tasks[name]
        labels = job.labels_of(name)
        dedicated = mediator = None
        if labels is not None:
            dedicated = DedicatedStream(
                data[labels].open(),
                batch_size=config.batch_size,
                seed=seed_of(job, name),
                columns=(*task.inputs, *task.labels),
            )
        if relations and job.mediator is not None and not config.frozen:
            mediator = MediatorStream(
                data[job.mediator.data].open(),
                batch_size=job.mediator.batch_size,
                window=job.mediator.window,
                visits=job.mediator.visits,
                shuffle=job.mediator.shuffle,
                seed=job.seed,
                columns=sorted({*mediator_columns(task, relations), *asked_columns(job, asked)}),
            )
        published = published_quantities(task, relations)
        wanted = {} if config.frozen else wanted_quantities(task, relations)
        self.peers = make_peers(published, wanted) if relations else None
        self.trainer = build_trainer(
            job,
            name,
            task,
            dedicated=dedicated,
            mediator=mediator,
            relations=relations,
            peers=self.peers,
            device=device,
        )
        self.saved_step = self.evaluated_step = -1

    def resume(self) -> int:
        """Go on from the latest checkpoint, where there is one, or from the weights that the job
        begins with; returns the step."""
        checkpoint = self.checkpoints.latest(self.name)
        if checkpoint is not None:
            load_into(self.trainer.model, checkpoint)
            self.trainer.load_state_dict(checkpoint.state)
            self.saved_step = self.evaluated_step = checkpoint.step
        else:
            load_initial(self.job, self.name, self.trainer.model)
        return self.trainer.step

    @property
    def finished(self) -> bool:
        return self.trainer.step >= self.trainer.total_steps

    def after_steps(self, report: dict[str, Any]) -> dict[str, Any]:
        """Whatever is due after a chunk: an evaluation for the curves, a checkpoint."""
        step = self.trainer.step
        every = self.job.evaluation.every
        if every and step // every > max(0, self.evaluated_step) // every and not self.finished:
            self.evaluated_step = step
            for title in self.evaluations:
                for metric, value in self.evaluate(title).metrics.items():
                    report["values"][f"eval/{title}/{metric}"] = value
        if self.finished or step // self.job.checkpoint.every > max(0, self.saved_step) // (
            self.job.checkpoint.every
        ):
            self.save()
        if step in (self.evaluated_step, self.saved_step):
            self.trainer.ask_again()
        self.trainer.start_clock()
        return report

    def save(self) -> str | None:
        """Write a checkpoint of the present step, unless it is there already."""
        step = self.trainer.step
        if step == self.saved_step:
            return None
        state = self.trainer.state_dict()
        location = self.checkpoints.write(self.name, step, *serialize(self.trainer.model, state))
        self.saved_step = step
        return location

    def evaluate(self, title: str, num_samples: int = 0) -> Evaluation:
        """Measure on one of the job's evaluations. A dataset without this task's labels gives no
        metric."""
        data = self.evaluations[title]
        task = self.trainer.task
        wanted = tuple(dict.fromkeys((*task.inputs, *task.labels)))
        if not set(wanted) <= set(data.info.layout):
            return Evaluation({})
        return evaluate(self.trainer, self._batches(data, wanted), num_samples)

    def _batches(self, data: Handle, columns: Sequence[str]) -> Iterator[Batch]:
        return plain_batches(data.open(), self.job.evaluation.batch_size, columns)

    def close(self) -> None:
        self.trainer.close()


def load_initial(job: Job, name: str, model: nn.Module) -> None:
    """Give a network the weights that ``tasks.<name>.checkpoint`` names, where it names some;
    InputError where they are not there or are those of another model."""
    location = job.tasks[name].checkpoint
    if location is None:
        return
    try:
        load_into(model, find_checkpoint(location, name))
    except InputError as error:
        raise InputError(f"tasks.{name}.checkpoint: {error}") from None


def choose_device(gpus: float) -> str:
    """CUDA where the job reserves a GPU for the task, else the CPU."""
    return "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
