"""Detections of sweeps and the flow between them: a box, moved, is the box found there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from taskray.config import Fraction
from taskray.consistency.relation import Relation
from taskray.errors import InputError
from taskray.geometry.grid import Grid
from taskray.tasks.anchors import HEADINGS, wrap

PAPER_GRID = Grid()
SIZES = slice(2, 6)
"""Channels of ``detection`` that do not change along a track: z, log l w h."""
THETA, LOGIT = 6, 7


class MotionConsistency(Relation):
    """Class and box agree at both ends of the flow, Taskology 3.2.2 (the terms of L_con PC in
    time, which have no numbers there).

    An anchor at (x, y, theta) of the current frame, the last, goes with its flow to the nearest
    anchor (x', y', theta') of each frame before. There

        L_class = (logit - logit')^2
        L_residual = sum over x, y, theta of (d' - d - (flow - (i' - i)))^2
                     + sum over z and log l w h of (d' - d)^2

    with d the difference *box minus anchor* of ``schema``, in metres and radians. The paper
    prints + before the remainder flow - (i' - i): that holds where d is anchor minus box. Which
    anchor is the nearest is a step function of the flow and carries no gradient; the remainder
    does, and makes up exactly for the step. Differences of theta are wrapped to (-pi, pi].

    Anchors count whose confidence in the current frame is at least ``min_confidence``, and whose
    flow stays on the grid: flow is supervised where there are boxes alone (3.2.2), so what it
    says elsewhere ties nothing to anything. Both terms are averaged over the anchors that count
    and the frames; where none does they are 0, with a gradient of zeros.

    Args:
        grid: that of the tasks.
        frames: n_f; of three the current frame is the third.
        min_confidence: in [0, 1]; at 0 every anchor counts.
        class_weight: factor on L_class, whose logits are larger than metres; 1 in the paper.
    """

    def __init__(
        self,
        grid: Grid = PAPER_GRID,
        frames: Literal[2, 3] = 3,
        min_confidence: Fraction = 0.1,
        class_weight: Annotated[float, Field(ge=0)] = 1.0,
    ) -> None:
        self.grid, self.min_confidence, self.class_weight = grid, min_confidence, class_weight
        self.current = f"_{frames}"
        self.past = ("_2", "")[3 - frames :]
        suffixes = (self.current, *self.past)
        self.flow = f"box_flow{self.current}"
        self.quantities = (*(f"detection{suffix}" for suffix in suffixes), self.flow)

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        here = predictions[f"detection{self.current}"]
        if here.shape[-2:] != self.grid.shape:
            raise InputError(
                f"grid: the relation's has {self.grid.shape} cells, "
                f"the tasks' {tuple(here.shape[-2:])}"
            )
        flows = predictions[self.flow].chunk(len(self.past), dim=2)
        sure = here.detach()[:, :, LOGIT].sigmoid() >= self.min_confidence
        total_class = total_residual = count = here.new_zeros(())
        for suffix, flow in zip(self.past, flows, strict=True):
            there, step, on_grid = self._follow(flow, predictions[f"detection{suffix}"])
            counts = sure & on_grid
            terms = (_class_term(here, there), _residual_term(here, there, flow, step))
            class_term, residual = (torch.where(counts, term, 0.0).sum() for term in terms)
            total_class, total_residual = total_class + class_term, total_residual + residual
            count = count + counts.sum()
        count = count.clamp(min=1)
        return {
            "class": self.class_weight * total_class / count,
            "residual": total_residual / count,
        }

    def _follow(self, flow: Tensor, detection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The prediction at the anchor that each flow leads to ``[B, A, 8, Y, X]``, the step from
        anchor to anchor ``[B, A, 3, Y, X]`` in metres and radians, and whether it stays on the
        grid ``[B, A, Y, X]``."""
        batch, anchors, _, rows, columns = detection.shape
        cells = torch.round(flow.detach()[:, :, :2] / self.grid.cell).long()
        place = [torch.arange(n, device=flow.device) for n in (batch, anchors, rows, columns)]
        sample, anchor, y, x = torch.meshgrid(*place, indexing="ij")
        new_x, new_y = x + cells[:, :, 0], y + cells[:, :, 1]
        on_grid = (new_x >= 0) & (new_x < columns) & (new_y >= 0) & (new_y < rows)
        new_anchor, turn = _nearest_heading(anchor, flow.detach()[:, :, 2])
        there = detection.movedim(2, -1)[
            sample, new_anchor, new_y.clamp(0, rows - 1), new_x.clamp(0, columns - 1)
        ]
        step = torch.cat([cells.to(flow.dtype) * self.grid.cell, turn[:, :, None]], dim=2)
        return there.movedim(-1, 2), step, on_grid


def _nearest_heading(anchor: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """The anchor of the same class that lies nearest after the turn, and the step there in
    radians. Anchors are rectangles: turned by half a circle they are the same."""
    headings = turn.new_tensor(HEADINGS)
    before = headings[anchor % 2]
    away = [wrap(2 * (before + turn - heading)).abs() for heading in headings]
    nearest = torch.stack(away).argmin(dim=0)
    return anchor - anchor % 2 + nearest, headings[nearest] - before


def _class_term(here: Tensor, there: Tensor) -> Tensor:
    return (there[:, :, LOGIT] - here[:, :, LOGIT]).square()


def _residual_term(here: Tensor, there: Tensor, flow: Tensor, step: Tensor) -> Tensor:
    remainder = flow - step
    shift = (there - here)[:, :, :2] - remainder[:, :, :2]
    turn = wrap(there[:, :, THETA] - here[:, :, THETA] - remainder[:, :, 2])
    sizes = (there - here)[:, :, SIZES]
    return shift.square().sum(dim=2) + turn.square() + sizes.square().sum(dim=2)
