"""Consistency energy: how far a prediction is from what relations make of other predictions.

A *path* gives a quantity a second time: directly, by the network that predicts it, and transferred,
by a relation from another prediction. The energy of a pixel is the mean over its paths of their
disagreement, each standardised by its mean and deviation on held-out data of the training domain
(XTConsistency, Zamir et al. 2020). It needs no labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.normals import unit
from taskray.schema import INVALID, has_logits, quantity_of

SHORTEST_DEPTH = 1e-3
"""Metres; keeps the logarithm finite."""
SMALLEST_DEVIATION = 1e-12


def disagreement(quantity: str, one: Tensor, other: Tensor) -> Tensor:
    """``[B, 1, H, W]``, 0 where two predictions ``[B, C, H, W]`` are equal: of depth the difference
    of logarithms, of normals the angle in radians, of classes half the sum of the differences of
    their probabilities, of any other quantity the mean absolute difference of channels."""
    base = quantity_of(quantity)
    if base == "depth":
        one, other = (d.clamp(min=SHORTEST_DEPTH).log() for d in (one, other))
    elif base == "normals":
        one, other = unit(one), unit(other)
        sine = torch.linalg.cross(one, other, dim=1).norm(dim=1, keepdim=True)
        return torch.atan2(sine, (one * other).sum(dim=1, keepdim=True))
    elif has_logits(base):
        one, other = (logits.softmax(dim=1) for logits in (one, other))
        return (one - other).abs().sum(dim=1, keepdim=True) / 2
    return (one - other).abs().mean(dim=1, keepdim=True)


def true_error(quantity: str, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The disagreement of a prediction with its label, and where the label is valid, both
    ``[B, 1, H, W]``."""
    base = quantity_of(quantity)
    valid = (label != INVALID[base]).any(dim=1, keepdim=True) & label.isfinite().all(1, True)
    if not has_logits(base):
        return disagreement(base, prediction, label.to(prediction.dtype)), valid
    index = torch.where(valid, label, 0)[:, 0].long()
    certain = functional.one_hot(index, prediction.shape[1]).movedim(-1, 1)
    return (prediction.softmax(1) - certain).abs().sum(dim=1, keepdim=True) / 2, valid


@dataclass
class Standard:
    """The mean and the deviation of a path's disagreement, over the valid pixels added so far."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor, valid: Tensor) -> None:
        chosen = values[valid].double()
        self.count += chosen.numel()
        self.total += float(chosen.sum())
        self.squares += float(chosen.square().sum())

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def deviation(self) -> float:
        variance = self.squares / max(self.count, 1) - self.mean**2
        return math.sqrt(max(variance, 0.0))

    def standardised(self, values: Tensor) -> Tensor:
        """The values in deviations above the mean."""
        return (values - self.mean) / max(self.deviation, SMALLEST_DEVIATION)


def energy(paths: Sequence[tuple[Tensor, Tensor, Standard]]) -> Tensor:
    """``[B, 1, H, W]``: the mean over the paths that are valid at a pixel of their standardised
    disagreement; NaN where none is. Of each path: disagreement, valid pixels, standard."""
    valid = torch.stack([where for _, where, _ in paths])
    values = torch.stack([standard.standardised(values) for values, _, standard in paths])
    mean: Tensor = torch.where(valid, values, 0.0).sum(0) / valid.sum(0)  # 0 / 0 is NaN
    return mean


def pearson(one: Tensor, other: Tensor) -> float:
    """The correlation of two vectors; NaN where one is constant."""
    one, other = (v.double() - v.double().mean() for v in (one, other))
    return float((one * other).sum() / (one.norm() * other.norm()))


def spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of the ranks of two vectors."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: Tensor) -> Tensor:
    """Equal values have the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]
    return ranks
