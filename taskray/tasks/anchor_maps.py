"""Maps of values for each anchor: what the tasks on anchors (detection, box flow) and their metrics
have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from taskray.errors import TaskrayError
from taskray.geometry.grid import Grid
from taskray.tasks.anchors import Anchor, Anchors

PAPER_GRID, CAR = Grid(), Anchor()
FARTHEST, LARGEST_TURN = 100.0, 4.0
"""Bounds of predicted metres and radians: finite in float16, and beyond any true value."""
SHARPNESS = 1 / 9
"""Errors below this are squared in the smooth L1 loss."""


@dataclass(frozen=True)
class Detections:
    """Boxes found in one sweep, best first: ``boxes`` [n, 7], ``scores`` [n] in [0, 1] and class
    indices ``labels`` [n]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def as_map(output: Tensor, anchors: Anchors, channels: int) -> Tensor:
    """The network's output ``[B, a * channels, y, x]`` as ``[B, a, channels, y, x]``;
    TaskrayError if it has another shape."""
    rows, columns = anchors.grid.shape
    expected = (anchors.per_cell * channels, rows, columns)
    if output.shape[1:] != expected:
        raise TaskrayError(
            f"the network returns {'x'.join(map(str, output.shape[1:]))}, expected "
            f"{'x'.join(map(str, expected))}, from the task's grid"
        )
    return output.reshape(len(output), anchors.per_cell, channels, rows, columns)


def smooth_l1(error: Tensor) -> Tensor:
    """Sum of the smooth L1 loss of these errors."""
    zeros = torch.zeros_like(error)
    return functional.smooth_l1_loss(error, zeros, reduction="sum", beta=SHARPNESS)
