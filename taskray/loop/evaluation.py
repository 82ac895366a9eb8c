"""Measuring one task on data that no training step has seen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.loop.network import Network
from taskray.schema import QUANTITIES, quantity_of
from taskray.tasks.constant import Constant
from taskray.tasks.task import Task

if TYPE_CHECKING:  # slow to import, see tasks.task
    from torchmetrics import Metric


@dataclass
class Evaluation:
    """Metric values, and a few samples to look at (``<quantity>/truth`` and ``/prediction``)."""

    metrics: dict[str, float]
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    constant: dict[str, float] = field(default_factory=dict)
    """The same metrics of the task's constant predictor, which looks at no input."""
    rows: int = 0
    """Rows on which the network predicted; 0 where the dataset has no labels of the task."""


def measured_columns(task: Task, there: Collection[str]) -> tuple[str, ...]:
    """What to read of a dataset to measure a task on it: inputs, and the labels of the heads whose
    labels are ``there``. Empty where nothing can be measured."""
    labels = [c for head in task.heads.values() if {*head.labels} <= {*there} for c in head.labels]
    if not labels or not {*task.inputs} <= {*there}:
        return ()
    return tuple(dict.fromkeys((*task.inputs, *labels)))


def learn_constant(task: Task, batches: Iterable[Batch]) -> Constant | None:
    """The task's constant predictor, from batches of its labels; None where it has none."""
    constant = task.constant()
    if constant is not None:
        for batch in batches:
            constant.update(batch.tensors)
    return constant


def evaluate(
    network: Network,
    batches: Iterable[Batch],
    num_samples: int = 0,
    constant: Constant | None = None,
) -> Evaluation:
    """Run the network over all batches, in evaluation mode; metrics are pooled over the whole set.

    The first ``num_samples`` frames are kept with truth and prediction: ``image`` [N, H, W, 3]
    uint8, the rest [N, C, H, W] float32 (a segmentation as class indices), and the network's own
    pictures. ``constant`` is measured
    on the same batches.
    """
    metric = network.task.metric().to(network.device)
    yardstick = network.task.metric()
    kept: dict[str, list[Tensor]] = {}
    have = rows = 0
    for batch in batches:
        rows += len(next(iter(batch.tensors.values())))
        prediction = network.infer(batch)
        labels = {k: v.to(network.device) for k, v in batch.tensors.items()}
        metric.update(prediction, labels)
        if constant is not None:
            _measure_constant(network.task, constant, yardstick, batch.tensors)
        pictures = labels.get("image")
        take = 0 if pictures is None else min(num_samples - have, len(pictures))
        if take > 0:
            have += take
            _keep(kept, network, prediction, labels, take)
    samples = {name: torch.cat(parts).cpu().numpy() for name, parts in kept.items()}
    return Evaluation(_finite(metric), samples, _finite(yardstick), rows)


def _measure_constant(
    task: Task, constant: Constant, metric: Metric, batch: Mapping[str, Tensor]
) -> None:
    """Without the heads that the constant does not predict: those learnt from no label."""
    prediction = constant.predict(batch)
    heads = [head for head in task.heads.values() if {*head.quantities} <= prediction.keys()]
    if heads:
        columns = {c for head in heads for c in (*head.inputs, *head.labels)}
        metric.update(prediction, {k: v for k, v in batch.items() if k in columns})


def _finite(metric: Metric) -> dict[str, float]:
    if not metric.update_called:
        return {}
    values = {name: float(value) for name, value in metric.compute().items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _keep(
    kept: dict[str, list[Tensor]],
    network: Network,
    prediction: dict[str, Tensor],
    labels: dict[str, Tensor],
    take: int,
) -> None:
    drawn = network.pictures({name: values[:take] for name, values in labels.items()})
    for title, picture in drawn.items():
        kept.setdefault(f"{title}/prediction", []).append(picture.float())
    pictures = (labels["image"][:take] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    kept.setdefault("image", []).append(pictures)
    for quantity in network.task.quantities:
        if quantity not in labels or "H" not in QUANTITIES[quantity_of(quantity)].shape:
            continue
        predicted = prediction[quantity][:take]
        if predicted.shape[1] != labels[quantity].shape[1]:  # logits against indices
            predicted = predicted.argmax(dim=1, keepdim=True)
        kept.setdefault(f"{quantity}/truth", []).append(labels[quantity][:take].float())
        kept.setdefault(f"{quantity}/prediction", []).append(predicted.float())


def measured_nothing(name: str, evaluations: Mapping[str, Evaluation]) -> list[str]:
    """A warning for each evaluation of a task, by title, that gave no metric although the dataset
    has its labels; or one, if no evaluation has them."""
    if evaluations and not any(e.rows for e in evaluations.values()):
        return [f"task {name!r} was not measured: no evaluation has its labels"]
    return [
        f"evaluation {title!r} measured nothing of task {name!r}: no metric is finite on its "
        f"{evaluation.rows} rows"
        for title, evaluation in evaluations.items()
        if evaluation.rows and not evaluation.metrics
    ]


def panels(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, np.ndarray]:
    """The frames that the evaluations kept, under the names of ``panels.npz``."""
    return {
        f"{task}/{title}/{name}": array
        for task, found in evaluations.items()
        for title, evaluation in found.items()
        for name, array in evaluation.samples.items()
    }
