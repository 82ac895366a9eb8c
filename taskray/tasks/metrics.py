"""Metrics of the tasks: ``update(prediction, batch)``, then ``compute() -> dict[str, Tensor]``.

All are pooled over the valid pixels of the whole set: each pixel has the same weight, and the
values do not depend on how the set was cut into batches. Sums are kept in float64. Without one
valid pixel every value is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from taskray.geometry.normals import has_direction


class DepthMetrics(Metric):  # type: ignore[misc]
    """``abs_rel sq_rel rmse rmse_log delta_1 delta_2 delta_3 abs_err`` of depth in metres.

    ``abs_rel`` is mean |d - d*| / d*, ``delta_k`` the fraction with max(d/d*, d*/d) < 1.25^k.
    Labels outside [``min_depth``, ``max_depth``] do not count (0 is *not measured*), and
    predictions are clamped to it, after median scaling if it is set.
    """

    full_state_update = False
    errors: Tensor
    count: Tensor

    NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "delta_1", "delta_2", "delta_3", "abs_err")

    def __init__(
        self, min_depth: float = 0.1, max_depth: float = 80.0, median_scaling: bool = False
    ) -> None:
        super().__init__()
        self.min_depth, self.max_depth = min_depth, max_depth
        self.median_scaling = median_scaling
        zeros = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self.add_state("errors", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        label = batch["depth"]
        valid = (label >= self.min_depth) & (label <= self.max_depth)
        depth = prediction["depth"].float()
        if self.median_scaling:
            depth = depth * median_ratio(depth, label, valid)
        depth = depth.clamp(self.min_depth, self.max_depth)[valid].double()
        label = label[valid].double()
        difference = depth - label
        ratio = torch.maximum(depth / label, label / depth)
        self.errors += torch.stack(
            [
                (difference.abs() / label).sum(),
                (difference.square() / label).sum(),
                difference.square().sum(),
                ratio.log().square().sum(),
                *((ratio < 1.25**k).sum().double() for k in (1, 2, 3)),
                difference.abs().sum(),
            ]
        )
        self.count += label.numel()

    def compute(self) -> dict[str, Tensor]:
        values = dict(zip(self.NAMES, (self.errors / self.count).float(), strict=True))
        return {n: v.sqrt() if n.startswith("rmse") else v for n, v in values.items()}


def median_ratio(depth: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Median label over median prediction of each image, ``[B, 1, 1, 1]``; 1 without labels."""
    ratios = [
        t[v].median() / d[v].median().clamp(min=1e-9) if v.any() else d.new_ones(())
        for d, t, v in zip(depth, label, valid, strict=True)
    ]
    return torch.stack(ratios)[:, None, None, None]


class NormalsMetrics(Metric):  # type: ignore[misc]
    """``mean_deg median_deg within_11_25 within_22_5 within_30`` of the angle between normals.

    Angles by atan2(|a x b|, a . b), which is precise near 0 where acos is not. A prediction
    without direction counts as 90 degrees. ``median_deg`` comes from a histogram of bins of
    0.01 degrees, which is its precision; the fractions are counted exactly.
    """

    full_state_update = False
    angle_sum: Tensor
    below: Tensor
    histogram: Tensor
    count: Tensor

    THRESHOLDS = (11.25, 22.5, 30.0)
    BINS_PER_DEGREE = 100

    def __init__(self) -> None:
        super().__init__()
        states: dict[str, Any] = {
            "angle_sum": torch.zeros((), dtype=torch.float64),
            "below": torch.zeros(len(self.THRESHOLDS), dtype=torch.int64),
            "histogram": torch.zeros(180 * self.BINS_PER_DEGREE, dtype=torch.int64),
            "count": torch.zeros((), dtype=torch.int64),
        }
        for name, zeros in states.items():
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        label = batch["normals"]
        valid = has_direction(label)[:, 0]
        predicted = prediction["normals"].movedim(1, -1)[valid].double()
        angles = angle_deg(predicted, label.movedim(1, -1)[valid].double())
        self.angle_sum += angles.sum(dtype=torch.float64)
        self.below += torch.stack([(angles < t).sum() for t in self.THRESHOLDS])
        bins = (angles.nan_to_num(180.0) * self.BINS_PER_DEGREE).long()
        bins = bins.clamp(max=self.histogram.numel() - 1)
        self.histogram += torch.bincount(bins, minlength=self.histogram.numel())
        self.count += angles.numel()

    def compute(self) -> dict[str, Tensor]:
        fractions = (self.below / self.count.double()).float()
        return {
            "mean_deg": (self.angle_sum / self.count).float(),
            "median_deg": self._median(),
            "within_11_25": fractions[0],
            "within_22_5": fractions[1],
            "within_30": fractions[2],
        }

    def _median(self) -> Tensor:
        if self.count == 0:
            return torch.full((), torch.nan, device=self.count.device)
        reached = self.histogram.cumsum(0) * 2 >= self.count
        middle = reached.int().argmax() + 0.5  # the first bin that holds half of all angles
        return middle.float() / self.BINS_PER_DEGREE


def angle_deg(a_n3: Tensor, b_n3: Tensor) -> Tensor:
    """Angles ``[N]`` in degrees between vectors of any length; 90 where one of them is zero."""
    sine = torch.linalg.cross(a_n3, b_n3).norm(dim=1)
    cosine = (a_n3 * b_n3).sum(dim=1)
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    return torch.where((sine == 0) & (cosine == 0), 90.0, angle)
