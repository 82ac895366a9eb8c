"""The consistency energy of a run's tasks on its evaluations (``evaluation.energy``).

It needs the predictions of several tasks on the same batch, so it is measured when all have ended,
in the driver, from their latest checkpoints.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taskray.data.storage.source import Handle
from taskray.data.streams.batch import Batch
from taskray.data.streams.stream import plain_batches
from taskray.job.config import Job
from taskray.loop.assembly import build_learned, build_tasks, relations_of
from taskray.loop.evaluation import Evaluation
from taskray.loop.network import Network
from taskray.relations.energy import (
    Standard,
    disagreement,
    energy,
    pearson,
    spearman,
    true_error,
)
from taskray.relations.relation import Path, Relation
from taskray.runtime.checkpoints import CheckpointStore, load_into
from taskray.schema import INVALID
from taskray.tasks.task import Task

NAMES = ("energy_mean", "energy_pearson", "energy_spearman")
"""The metrics: the mean energy of the labelled pixels, and its correlations with their error."""
MOST_MAPS = 16
"""Batches of which maps are kept; more than the samples of an evaluation need."""
PIXELS_PER_FRAME = 1024
"""Pixels of each frame that the correlations use, evenly spaced."""


@dataclass
class Predictors:
    """The networks of a run and the relations between their predictions."""

    tasks: dict[str, Task]
    networks: dict[str, Network]
    relations: dict[str, Relation]

    @classmethod
    def load(cls, job: Job, store: CheckpointStore) -> Predictors:
        """From the latest checkpoints. A task without one is left out."""
        tasks = build_tasks(job)
        networks: dict[str, Network] = {}
        relations: dict[str, Relation] = {}
        for name, task in tasks.items():
            checkpoint = store.latest(name)
            if checkpoint is None:
                continue
            own = relations_of(job, name, task)
            learned = build_learned(job, name, task, own)
            load_into(learned, checkpoint)
            learned.eval()
            networks[name] = Network(task, learned.network, job.tasks[name], "cpu")
            for weighted in own:  # a learned relation belongs to the task that learns it
                if weighted.scale > 0 or not isinstance(weighted.relation, torch.nn.Module):
                    relations.setdefault(weighted.name, weighted.relation)
        return cls(tasks, networks, relations)

    def columns(self, there: Mapping[str, object]) -> list[str]:
        """What to read of a dataset that has these columns."""
        read = {c for task in self.tasks.values() for c in (*task.inputs, *task.labels)}
        read |= {c for relation in self.relations.values() for c in relation.inputs}
        return [column for column in there if column in read]

    @torch.no_grad()
    def paths(self, batch: Batch) -> tuple[dict[str, Tensor], dict[tuple[str, str], Path]]:
        """The direct predictions on a batch, and those transferred, by quantity and relation."""
        known: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            if {*self.tasks[name].inputs} <= batch.tensors.keys():
                known = {**network.infer(batch), **known}
        found = {
            (quantity, name): path
            for name, relation in self.relations.items()
            if {*relation.quantities} <= known.keys() and {*relation.inputs} <= batch.tensors.keys()
            for quantity, path in relation.paths(known, batch.tensors).items()
        }
        return known, found


@dataclass
class Measured:
    """The energy of one quantity on one evaluation."""

    energies: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor, error: Tensor, valid: Tensor) -> None:
        step = max(1, values[0].numel() // PIXELS_PER_FRAME)
        flat = [tensor.flatten(1)[:, ::step] for tensor in (values, error, valid)]
        chosen = flat[2] & flat[0].isfinite()
        self.energies.append(flat[0][chosen])
        self.errors.append(flat[1][chosen])

    def metrics(self) -> dict[str, float]:
        values, errors = torch.cat(self.energies), torch.cat(self.errors)
        if len(values) < 2:
            return {}
        found = float(values.double().mean()), pearson(values, errors), spearman(values, errors)
        return {n: v for n, v in zip(NAMES, found, strict=True) if math.isfinite(v)}


def add_energies(
    job: Job,
    store: CheckpointStore,
    data: Mapping[str, Handle],
    evaluations: Mapping[str, MutableMapping[str, Evaluation]],
) -> None:
    """Add the energies to the evaluations of the tasks (task -> title -> evaluation), whose
    datasets are ``data``: metrics, and for each sample that was kept its map ``[N, 1, H, W]``."""
    if job.evaluation.energy is None:
        return
    predictors = Predictors.load(job, store)
    standards: dict[tuple[str, str], Standard] = defaultdict(Standard)
    for batch in _batches(job, predictors, data[job.evaluation.energy]):
        known, paths = predictors.paths(batch)
        for key, path in paths.items():
            standards[key].add(disagreement(key[0], known[key[0]], path.prediction), path.valid)
    for title, handle in data.items():
        for quantity, measured in _measure(job, predictors, handle, standards).items():
            task = next(n for n, t in predictors.tasks.items() if quantity in t.quantities)
            evaluation = evaluations.get(task, {}).get(title)
            if evaluation is None:
                continue
            prefix = _prefix(predictors.tasks[task], quantity)
            evaluation.metrics |= {prefix + n: v for n, v in measured.metrics().items()}
            kept = len(evaluation.samples.get(f"{quantity}/prediction", ()))
            if kept:
                maps = torch.cat(measured.maps)[:kept]
                evaluation.samples[f"{quantity}/energy"] = maps.float().numpy()


def energy_names(job: Job, task: Task) -> list[str]:
    """The names that the energies of a task may have in its evaluations."""
    quantities = task.quantities if job.evaluation.energy is not None else ()
    return [_prefix(task, quantity) + name for quantity in quantities for name in NAMES]


def _prefix(task: Task, quantity: str) -> str:
    return f"{quantity}/" if len(task.quantities) > 1 else ""


def _batches(job: Job, predictors: Predictors, handle: Handle) -> Iterator[Batch]:
    columns = predictors.columns(handle.info.layout)
    return plain_batches(handle.open(), job.evaluation.batch_size, columns)


def _measure(
    job: Job,
    predictors: Predictors,
    handle: Handle,
    standards: Mapping[tuple[str, str], Standard],
) -> dict[str, Measured]:
    """The energies on one dataset, by quantity."""
    found: dict[str, Measured] = defaultdict(Measured)
    for batch in _batches(job, predictors, handle):
        known, paths = predictors.paths(batch)
        for quantity in dict.fromkeys(key[0] for key in paths):
            values = energy(
                [
                    (disagreement(quantity, known[quantity], p.prediction), p.valid, standards[key])
                    for key, p in paths.items()
                    if key[0] == quantity and key in standards
                ]
            )
            measured = found[quantity]
            if len(measured.maps) < MOST_MAPS:
                measured.maps.append(values)
            label = batch.tensors.get(quantity)
            if label is not None and quantity in INVALID:
                measured.add(values, *true_error(quantity, known[quantity], label))
    return found
