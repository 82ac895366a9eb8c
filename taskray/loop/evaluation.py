"""Measuring one task on data that no training step has seen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.loop.network import Network
from taskray.schema import QUANTITIES, quantity_of
from taskray.tasks.task import Task


@dataclass
class Evaluation:
    """Metric values, and a few samples to look at (``<quantity>/truth`` and ``/prediction``)."""

    metrics: dict[str, float]
    samples: dict[str, np.ndarray] = field(default_factory=dict)


def measured_columns(task: Task, there: Collection[str]) -> tuple[str, ...]:
    """What to read of a dataset to measure a task on it: inputs, and the labels of the heads whose
    labels are ``there``. Empty where nothing can be measured."""
    labels = [c for head in task.heads.values() if {*head.labels} <= {*there} for c in head.labels]
    if not labels or not {*task.inputs} <= {*there}:
        return ()
    return tuple(dict.fromkeys((*task.inputs, *labels)))


def evaluate(network: Network, batches: Iterable[Batch], num_samples: int = 0) -> Evaluation:
    """Run the network over all batches, in evaluation mode; metrics are pooled over the whole set.

    The first ``num_samples`` frames are kept with truth and prediction: ``image`` [N, H, W, 3]
    uint8, the rest [N, C, H, W] float32 (a segmentation as class indices).
    """
    metric = network.task.metric().to(network.device)
    kept: dict[str, list[Tensor]] = {}
    have = 0
    for batch in batches:
        prediction = network.infer(batch)
        labels = {k: v.to(network.device) for k, v in batch.tensors.items()}
        metric.update(prediction, labels)
        pictures = labels.get("image")
        take = 0 if pictures is None else min(num_samples - have, len(pictures))
        if take > 0:
            have += take
            _keep(kept, network, prediction, labels, take)
    values = {name: float(value) for name, value in metric.compute().items()}
    samples = {name: torch.cat(parts).cpu().numpy() for name, parts in kept.items()}
    return Evaluation({k: v for k, v in values.items() if math.isfinite(v)}, samples)


def _keep(
    kept: dict[str, list[Tensor]],
    network: Network,
    prediction: dict[str, Tensor],
    labels: dict[str, Tensor],
    take: int,
) -> None:
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


def panels(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, np.ndarray]:
    """The frames that the evaluations kept, under the names of ``panels.npz``."""
    return {
        f"{task}/{title}/{name}": array
        for task, found in evaluations.items()
        for title, evaluation in found.items()
        for name, array in evaluation.samples.items()
    }
