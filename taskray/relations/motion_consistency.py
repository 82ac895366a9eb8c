"""Detections of sweeps and the flow between them: a box, moved by its flow, is the box detected in
the other sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from taskray.errors import InputError
from taskray.geometry.grid import Grid
from taskray.job.config import Fraction
from taskray.relations.relation import Relation
from taskray.tasks.anchors import HEADINGS, wrap
from taskray.tasks.box_flow import BoxFlow
from taskray.tasks.detection import DIRECTION, LOGIT, Detection
from taskray.tasks.task import Task

Weight = Annotated[float, Field(ge=0)]
PAPER_GRID = Grid()
SHIFT, SIZES = slice(0, 2), slice(2, 6)
"""Channels of ``detection``: x y; and what does not change along a track: z, log l w h."""
THETA = 6


class MotionConsistency(Relation):
    """Class and box agree at both ends of the flow, Taskology 3.2.2 (the terms of L_con PC in
    time, which have no numbers there).

    The flow of an anchor at (x, y, theta) of the current frame, the last, leads to the nearest
    anchor (x', y', theta') of each frame before. There

        L_class = (logit - logit')^2
        L_residual = sum over x, y, theta of (d' - d - (flow - (i' - i)))^2
                     + sum over z and log l w h of (d' - d)^2
        L_direction = (logit of direction - logit' of direction)^2

    with d the difference *box minus anchor* of ``schema``, in metres and radians. The paper
    prints + before the remainder flow - (i' - i): that is right where d is anchor minus box. The
    choice of the nearest anchor is a step function of the flow and carries no gradient; the
    remainder does, and compensates the step exactly.

    Theta is the axis of a box, as defined in ``schema``, so its difference is wrapped to half
    turns; each half turn that is removed changes the sign of the direction at one end. L_direction
    is not in the paper, which does not define theta; without it the direction of a box would not
    be tied to that of the same box half a second before.

    Anchors count whose confidence in the current frame is at least ``min_confidence``, and whose
    flow leads to a cell of the grid: flow is supervised only at boxes (3.2.2), so elsewhere its
    value is arbitrary. All terms are averaged over the anchors that count and the frames; without
    one such anchor they are 0, with a gradient of zeros.

    Args:
        grid: that of the tasks.
        frames: n_f; of three the current frame is the third.
        min_confidence: in [0, 1]; at 0 every anchor counts.
        class_weight: factor on L_class, whose logits are larger than metres; 1 in the paper.
        direction_weight: factor on L_direction; 0 is the paper's loss.
    """

    def __init__(
        self,
        grid: Grid = PAPER_GRID,
        frames: Literal[2, 3] = 3,
        min_confidence: Fraction = 0.1,
        class_weight: Weight = 1.0,
        direction_weight: Weight = 1.0,
    ) -> None:
        self.grid, self.min_confidence = grid, min_confidence
        self.weights = {
            "class": class_weight,
            "residual": 1.0,
            "direction": direction_weight,
        }
        self.current = f"_{frames}"
        self.past = ("_2", "")[3 - frames :]
        suffixes = (self.current, *self.past)
        self.flow = f"box_flow{self.current}"
        self.quantities = (*(f"detection{suffix}" for suffix in suffixes), self.flow)

    def check_tasks(self, tasks: Mapping[str, Task]) -> None:
        known = {n: t.anchors for n, t in tasks.items() if isinstance(t, (Detection, BoxFlow))}
        for name, anchors in known.items():
            if anchors.grid != self.grid:
                raise InputError("grid", f"got {self.grid}, expected that of task {name!r}")
            if anchors.classes != next(iter(known.values())).classes:
                names = ", ".join(map(repr, known))
                raise InputError("classes", f"tasks {names} differ in them, expected the same")

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        here = predictions[f"detection{self.current}"]
        if here.shape[-2:] != self.grid.shape:
            raise InputError(
                "grid", f"got {self.grid.shape} cells, expected the tasks' {tuple(here.shape[-2:])}"
            )
        flows = predictions[self.flow].chunk(len(self.past), dim=2)
        sure = torch.where(here.detach()[:, :, LOGIT].sigmoid() >= self.min_confidence)
        here = _at(here, sure)
        totals, count = here.new_zeros(len(self.weights)), here.new_zeros(())
        for suffix, maps in zip(self.past, flows, strict=True):
            flow = _at(maps, sure)
            there, step, on_grid = self._follow(flow, sure, predictions[f"detection{suffix}"])
            terms = torch.stack(_terms(here, there, flow - step))
            totals = totals + torch.where(on_grid, terms, 0.0).sum(dim=1)
            count = count + on_grid.sum()
        means = totals / count.clamp(min=1)
        return {
            name: weight * mean
            for (name, weight), mean in zip(self.weights.items(), means, strict=True)
        }

    def _follow(
        self, flow: Tensor, where: Sequence[Tensor], detection: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prediction ``[n, 9]`` at the anchor that the flow ``[n, 3]`` of each anchor leads to,
        the step from anchor to anchor ``[n, 3]`` in metres and radians, and whether it ends on the
        grid ``[n]``."""
        sample, anchor, y, x = where
        rows, columns = detection.shape[-2:]
        cells = torch.round(flow.detach()[:, :2] / self.grid.cell).long()
        new_x, new_y = x + cells[:, 0], y + cells[:, 1]
        on_grid = (new_x >= 0) & (new_x < columns) & (new_y >= 0) & (new_y < rows)
        new_anchor, turn = _nearest_heading(anchor, flow.detach()[:, 2])
        place = (sample, new_anchor, new_y.clamp(0, rows - 1), new_x.clamp(0, columns - 1))
        step = torch.cat([cells.to(flow.dtype) * self.grid.cell, turn[:, None]], dim=1)
        return _at(detection, place), step, on_grid


def _at(maps: Tensor, where: Sequence[Tensor]) -> Tensor:
    """The channels ``[n, C]`` of maps ``[B, A, C, Y, X]`` at anchors (sample, a, y, x)."""
    return maps.movedim(2, -1)[tuple(where)]


def _nearest_heading(anchor: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """The anchor of the same class whose heading is nearest after the turn, and the step to it in
    radians. Anchors are rectangles: turned by half a circle they are the same."""
    headings = turn.new_tensor(HEADINGS)
    before = headings[anchor % len(HEADINGS)]
    away = [wrap(before + turn - heading, math.pi).abs() for heading in headings]
    nearest = torch.stack(away).argmin(dim=0)
    return anchor - anchor % len(HEADINGS) + nearest, headings[nearest] - before


def _terms(here: Tensor, there: Tensor, remainder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L_class, L_residual and L_direction of each anchor, ``[n]``; ``remainder`` is the part of the
    flow beyond the step."""
    difference = there - here
    turn = difference[:, THETA] - remainder[:, 2]
    axis = wrap(turn, math.pi)
    # an odd number of half turns between the axes: one box points along, the other against
    sign = (turn - axis).detach().cos().sign()
    along = there[:, DIRECTION] - sign * here[:, DIRECTION]
    shift = difference[:, SHIFT] - remainder[:, :2]
    sizes = difference[:, SIZES]
    residual = shift.square().sum(dim=1) + axis.square() + sizes.square().sum(dim=1)
    return difference[:, LOGIT].square(), residual, along.square()
