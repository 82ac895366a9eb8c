"""Edges of things, from one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from taskray.schema import IGNORE
from taskray.tasks.constant import Constant, MeanMap
from taskray.tasks.losses import masked_mean
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.tasks.edge_metrics import EdgeMetrics


class Edges(Task):
    """Whether each pixel is on an edge, from one image: a probability ``[B, 1, H, W]``, learnt by
    weighted cross entropy, sum(w c) / sum(w) over the labelled pixels (DenseMTL).

    Args:
        edge_weight: the weight w of an edge pixel; any other has ``1 - edge_weight``. Edges are
            few: without it, no pixel would be called one. With it, probabilities are higher than
            the frequency of edges.
    """

    quantities = ("edges",)
    labels = ("edges",)
    out_channels: Mapping[str, int] = {"edges": 1}

    def __init__(self, edge_weight: Annotated[float, Field(gt=0, lt=1)] = 0.95) -> None:
        self.edge_weight = edge_weight

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return {"edges": output.sigmoid()}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        edge, valid = self._read(batch)
        weight = torch.where(edge == 1, self.edge_weight, 1 - self.edge_weight)
        entropy = functional.binary_cross_entropy(prediction["edges"], edge, reduction="none")
        mean_weight = masked_mean(weight, valid)
        safe = torch.where(mean_weight > 0, mean_weight, 1.0)  # no label: the loss is 0
        return {"cross_entropy": masked_mean(weight * entropy, valid) / safe}

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        label = batch["edges"]
        return [LabelValues("edges", label, label != IGNORE, "0 or 1")]

    def constant(self) -> Constant:
        """At each pixel the probability that the loss is least for: the frequency of edges there,
        weighted as in the loss."""
        return MeanMap("edges", self._read, self._weighted)

    def _read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The labels as 0.0 or 1.0, and where they are valid."""
        label = batch["edges"]
        return (label == 1).float(), label != IGNORE

    def _weighted(self, frequency: Tensor) -> Tensor:
        edge = self.edge_weight * frequency
        return edge / (edge + (1 - self.edge_weight) * (1 - frequency))

    def metric(self) -> EdgeMetrics:
        from taskray.tasks.edge_metrics import EdgeMetrics  # torchmetrics is slow to import

        return EdgeMetrics()
