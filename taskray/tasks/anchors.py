"""Anchors: which of them are matched with which box, and the difference of the two.

Every cell of the grid has two anchors for each class, with heading 0 and pi/2 (n_a = 2 in
Taskology 3.2.2). The prediction for an anchor is *box minus anchor*, as ``schema`` defines it
under ``detection``: one convention for losses, decoding and relations. Map legend: ``a`` anchors
of a cell (class-major), ``y`` rows, ``x`` columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from taskray.errors import InputError
from taskray.geometry.grid import Grid
from taskray.job.config import Fraction, NonNegative, Settings
from taskray.tasks.task import LabelValues

Metres = Annotated[float, Field(gt=0)]
HEADINGS = (0.0, math.pi / 2)
BACKGROUND, IGNORED = -1, -2
"""Anchors without a box: those that must predict none, and those that do not count."""


class Anchor(Settings):
    """The anchors of one class, and the overlap with a box that they, and detections, must have.

    The defaults are PointPillars' for cars.
    """

    label: NonNegative = 0
    """Class index in ``boxes``."""
    l: Metres = 3.9  # noqa: E741 - the field has this name in every format of boxes
    """Length in metres, along the heading."""
    w: Metres = 1.6
    """Width in metres."""
    h: Metres = 1.56
    """Height in metres."""
    z: float = -1.0
    """Height of its centre above the sensor in metres."""
    matched: Fraction = 0.6
    """An anchor that overlaps a box by at least this much is matched with it."""
    unmatched: Fraction = 0.45
    """An anchor that overlaps every box by less than this must predict that there is none."""
    iou: Fraction = 0.7
    """A detection that overlaps a box by at least this much is right, in evaluation."""

    @model_validator(mode="after")
    def _in_order(self) -> Anchor:
        if self.unmatched > self.matched:
            raise ValueError(
                f"unmatched: got {self.unmatched:g}, expected at most matched, {self.matched:g}"
            )
        return self


def wrap(angle: Tensor, turn: float = 2 * math.pi) -> Tensor:
    """The angle modulo whole turns, in (-turn / 2, turn / 2]; the gradient passes unchanged."""
    return angle - turn * torch.ceil(angle.detach() / turn - 0.5)


@dataclass(frozen=True)
class Anchors:
    """All anchors of a grid; InputError where two classes have the same label."""

    grid: Grid
    classes: Sequence[Anchor]

    def __post_init__(self) -> None:
        if len({c.label for c in self.classes}) < len(self.classes):
            labels = [c.label for c in self.classes]
            raise InputError("classes", f"got the labels {labels}, expected each one once")

    @property
    def per_cell(self) -> int:
        return len(HEADINGS) * len(self.classes)

    def sizes(self, like: Tensor) -> Tensor:
        """l w h z and heading of a cell's anchors, ``[a, 5]``."""
        rows = [[c.l, c.w, c.h, c.z, heading] for c in self.classes for heading in HEADINGS]
        return like.new_tensor(rows)

    def diagonals(self, like: Tensor) -> Tensor:
        """Diagonals of a cell's anchors seen from above in metres, ``[a]``: what x and y are
        divided by in losses."""
        length, width = self.sizes(like)[:, :2].unbind(dim=1)
        return torch.hypot(length, width)

    # ---- boxes and their differences ------------------------------------------------------

    def boxes_at(self, where: Sequence[Tensor], like: Tensor) -> Tensor:
        """The anchors at ``where`` = (a, y, x), ``[n, 7]``: x y z l w h theta."""
        anchor, row, column = where
        x, y = self.grid.centres(like)
        length, width, height, z, theta = self.sizes(like)[anchor].unbind(dim=1)
        return torch.stack([x[column], y[row], z, length, width, height, theta], dim=1)

    def encode(self, boxes_n7: Tensor, where: Sequence[Tensor]) -> Tensor:
        """Box minus anchor, ``[n, 7]``, of boxes and the anchors at ``where``; then 1 where the box
        points along its axis, -1 where it points against it: ``[n, 8]``."""
        anchor = self.boxes_at(where, boxes_n7)
        shift = boxes_n7[:, :3] - anchor[:, :3]
        size = (boxes_n7[:, 3:6] / anchor[:, 3:6]).log()
        turn = wrap(boxes_n7[:, 6:7] - anchor[:, 6:7])
        axis = wrap(turn, math.pi)
        along = torch.where((turn - axis).abs() < 1, 1.0, -1.0)  # they differ by 0 or pi
        return torch.cat([shift, size, axis, along], dim=1)

    def decode(self, residuals_n8: Tensor, where: Sequence[Tensor]) -> Tensor:
        """The boxes ``[n, 7]`` from their differences to the anchors at ``where`` and the logit of
        the direction."""
        anchor = self.boxes_at(where, residuals_n8)
        centre = anchor[:, :3] + residuals_n8[:, :3]
        size = anchor[:, 3:6] * residuals_n8[:, 3:6].exp()
        turned = torch.where(residuals_n8[:, 7:8] < 0, math.pi, 0.0)
        return torch.cat([centre, size, wrap(anchor[:, 6:7] + residuals_n8[:, 6:7] + turned)], 1)

    def label_values(self, column: str, batch: Mapping[str, Tensor]) -> LabelValues:
        """The boxes of a batch; valid are those of a known class whose centre is on the grid."""
        boxes = batch[column].flatten(0, 1)
        labels = boxes.new_tensor([c.label for c in self.classes])
        valid = self.grid.holds(boxes) & torch.isin(boxes[:, 7], labels)
        numbers = ", ".join(str(c.label) for c in self.classes)
        return LabelValues(column, boxes[:, 7], valid, f"boxes of class {numbers} on the grid")

    # ---- matching ------------------------------------------------------------------------

    def assign(self, boxes_bm9: Tensor) -> Tensor:
        """The row of the box that each anchor is matched with, ``[B, a, y, x]``; ``BACKGROUND`` or
        ``IGNORED`` where there is none.

        Overlap is that of upright rectangles: each box counts as turned to the nearer axis
        (PointPillars, section 3). An anchor is matched with the box of its class that it overlaps
        most, if the overlap is at least ``matched``; the anchors that overlap a box most are
        matched with it in any case. Rows of NaN, and boxes whose centre is off the grid, are left
        out.
        """
        rows, columns = self.grid.shape
        shape = (len(boxes_bm9), self.per_cell, rows, columns)
        assigned = torch.full(shape, BACKGROUND, device=boxes_bm9.device)
        for sample, boxes in enumerate(boxes_bm9):
            on_grid = self.grid.holds(boxes)
            for number, kind in enumerate(self.classes):
                (own,) = torch.where(on_grid & (boxes[:, 7] == kind.label))
                if len(own):
                    first = number * len(HEADINGS)
                    assigned[sample, first : first + len(HEADINGS)] = _match(
                        self._overlaps(kind, boxes[own]), kind, own
                    )
        return assigned

    def _overlaps(self, kind: Anchor, boxes: Tensor) -> Tensor:
        """Overlap over union ``[m, 2, y, x]`` of boxes and the anchors of a class."""
        lies_across = (wrap(boxes[:, 6], math.pi).abs() > math.pi / 4)[:, None]
        extent = torch.where(lies_across, boxes[:, [4, 3]], boxes[:, [3, 4]])
        x, y = self.grid.centres(boxes)
        both = []
        for size in ((kind.l, kind.w), (kind.w, kind.l)):
            along = _shared(boxes[:, 0], extent[:, 0], x, size[0])
            across = _shared(boxes[:, 1], extent[:, 1], y, size[1])
            both.append(across[:, :, None] * along[:, None, :])
        shared = torch.stack(both, dim=1)
        area = extent.prod(dim=1)[:, None, None, None]
        return shared / (area + kind.l * kind.w - shared)


def _shared(centres: Tensor, extents: Tensor, anchors: Tensor, size: float) -> Tensor:
    """Metres ``[m, n]`` that m intervals share with n anchors' along one axis."""
    low = (centres - extents / 2)[:, None].clamp(min=anchors[None] - size / 2)
    high = (centres + extents / 2)[:, None].clamp(max=anchors[None] + size / 2)
    return (high - low).clamp(min=0)


def _match(overlaps: Tensor, kind: Anchor, rows: Tensor) -> Tensor:
    """The box, as its entry in ``rows``, that each anchor is matched with, ``[2, y, x]``."""
    best, which = overlaps.max(dim=0)
    matched = rows[which]
    matched[best < kind.matched] = IGNORED
    matched[best < kind.unmatched] = BACKGROUND
    nearest = overlaps.flatten(1).amax(dim=1)[:, None, None, None]
    own = (overlaps == nearest) & (nearest > 0)
    return torch.where(own.any(dim=0), rows[own.int().argmax(dim=0)], matched)
