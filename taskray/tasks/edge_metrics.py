"""Metrics of edges, from one histogram of probabilities over the whole set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from taskray.schema import IGNORE


class EdgeMetrics(Metric):  # type: ignore[misc]
    """``f1 mean_f1 ods_f1``, pooled over all labelled pixels of the set; an edge must be at its
    very pixel.

    ``f1`` is of edge pixels where the probability is at least 0.5; ``mean_f1`` is its mean with
    that of the other pixels (what the code of DenseMTL computes); ``ods_f1`` is of edge pixels at
    the best threshold for the whole set, in steps of 0.01, so it does not depend on the weights of
    the loss. NaN where the labels have no edge.
    """

    full_state_update = False
    histogram: Tensor

    BINS = 100

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2, self.BINS, dtype=torch.int64)
        self.add_state("histogram", zeros, dist_reduce_fx="sum")  # rows: no edge, edge

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        label = batch["edges"]
        valid = label != IGNORE
        bins = (prediction["edges"][valid] * self.BINS).long().clamp(0, self.BINS - 1)
        index = self.BINS * label[valid].long() + bins
        self.histogram += torch.bincount(index, minlength=2 * self.BINS).view(2, self.BINS)

    def compute(self) -> dict[str, Tensor]:
        above = self.histogram.double().flip(1).cumsum(1).flip(1)  # probability >= k / BINS
        below = self.histogram.double().sum(1, keepdim=True) - above
        edges = 2 * above[1] / (above[1] + below[1] + above[0] + above[1])
        others = 2 * below[0] / (below[0] + above[0] + below[0] + below[1])
        edges = torch.where(self.histogram[1].any(), edges, torch.nan)
        middle = self.BINS // 2
        return {
            "f1": edges[middle].float(),
            "mean_f1": ((edges + others)[middle] / 2).float(),
            "ods_f1": edges.max().float(),
        }
