"""How the boxes of a sweep move between it and the sweeps before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from taskray.geometry.grid import Grid
from taskray.schema import at_frame
from taskray.tasks.anchor_maps import (
    CAR,
    FARTHEST,
    LARGEST_TURN,
    PAPER_GRID,
    as_map,
    smooth_l1,
)
from taskray.tasks.anchors import Anchor, Anchors, wrap
from taskray.tasks.constant import Constant
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.tasks.box_flow_metrics import BoxFlowMetrics


class BoxFlow(Task):
    """Movement (x, y, theta) of hypothetical boxes of the current sweep to the sweeps before it
    (Taskology 3.2.2: "of a hypothetical box in the current frame to any n_f - 1 frames in the
    past").

    The current sweep is the *last* of a row, the one that all others precede: of three frames the
    third, so the quantity is ``box_flow_3``, and its channels lead to frame 2, then to frame 1.
    Each box is in the axes of its own frame, as detections are: so the flow contains the movement
    of the sensor as well, and the relation does not need it.

    The loss ``flow`` is the smooth L1 loss, x and y over the anchor's diagonal, averaged over the
    anchors that are matched with a box of the current frame, for each past frame that contains the
    box with its track id; there is no other supervision. Boxes whose centre is off the grid in the
    current frame are left out.

    Args:
        grid: the cells of the map, as of :class:`taskray.tasks.detection.Detection`.
        classes: the anchors of each class, as there.
        frames: n_f, sweeps that the network gets together.
    """

    per_frame = False
    in_channels = 4

    def __init__(
        self,
        grid: Grid = PAPER_GRID,
        classes: Annotated[list[Anchor], Field(min_length=1)] = [CAR],  # noqa: B006
        frames: Literal[2, 3] = 3,
    ) -> None:
        self.anchors, self.frames = Anchors(grid, classes), frames
        suffixes = ("", *(f"_{number}" for number in range(2, frames + 1)))
        self.inputs = tuple(at_frame("points", suffix) for suffix in suffixes)
        self.labels = tuple(at_frame("boxes", suffix) for suffix in suffixes)
        self.quantities = (at_frame("box_flow", suffixes[-1]),)
        self.channels = 3 * (frames - 1)
        self.out_channels = {self.quantities[0]: self.channels * self.anchors.per_cell}
        self.network_arguments = {"grid": grid, "frames": frames}

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        return [self.anchors.label_values(self.labels[-1], batch)]

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Sweeps ``[B, frames, P, 4]`` in the order of time."""
        return torch.stack([batch[column] for column in self.inputs], dim=1)

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        raw = as_map(output, self.anchors, self.channels)
        raw = raw.reshape(*raw.shape[:2], self.frames - 1, 3, *raw.shape[3:])
        shift = raw[:, :, :, :2] * self.anchors.diagonals(raw)[:, None, None, None, None]
        shift = shift.clamp(-FARTHEST, FARTHEST)
        turn = raw[:, :, :, 2:].clamp(-LARGEST_TURN, LARGEST_TURN)
        return {self.quantities[0]: torch.cat([shift, turn], dim=3).flatten(2, 3)}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        where, flow, true = self.at_boxes(prediction, batch)
        diagonal = self.anchors.diagonals(flow)[where[1], None, None]
        error = torch.cat(
            [(flow - true)[..., :2] / diagonal, wrap(flow[..., 2:] - true[..., 2:])], dim=-1
        )
        known = ~true.isnan().any(dim=-1)
        return {"flow": smooth_l1(error[known]) / known.sum().clamp(min=1)}

    def at_boxes(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The anchors that are matched with boxes of the current frame, (sample, a, y, x), and
        their flow, predicted and true: ``[n, frames - 1, 3]``, true NaN where the past frame does
        not contain the box."""
        boxes = batch[self.labels[-1]]
        assigned = self.anchors.assign(boxes)
        where = torch.where(assigned >= 0)
        flow = prediction[self.quantities[0]].movedim(2, -1)[where]
        own = boxes[where[0], assigned[where]]
        past = [batch[column][where[0]] for column in reversed(self.labels[:-1])]
        true = torch.stack([true_flow(own, others) for others in past], dim=1)
        return where, flow.reshape(-1, self.frames - 1, 3), true

    def constant(self) -> Constant:
        """The mean flow of the labelled boxes, at each anchor."""
        return MeanFlow(self)

    def metric(self) -> BoxFlowMetrics:
        from taskray.tasks.box_flow_metrics import BoxFlowMetrics

        return BoxFlowMetrics(self.at_boxes)


class MeanFlow(Constant):
    """The mean of the true flow of all boxes (of theta the mean angle), at each anchor."""

    def __init__(self, task: BoxFlow) -> None:
        self.task = task
        self.total = torch.zeros(task.frames - 1, 3, dtype=torch.float64)
        self.count = torch.zeros(task.frames - 1, 1, dtype=torch.float64)

    def update(self, batch: Mapping[str, Tensor]) -> None:
        rows = len(batch[self.task.labels[-1]])
        nothing = {self.task.quantities[0]: self._map(torch.zeros(self.task.channels), rows)}
        _, _, true = self.task.at_boxes(nothing, batch)
        self.total += true.double().nansum(dim=0)
        self.count += (~true.isnan()).all(dim=2).double().sum(dim=0)[:, None]

    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = (self.total / self.count.clamp(min=1)).float().flatten()
        return {self.task.quantities[0]: self._map(mean, len(next(iter(batch.values()))))}

    def _map(self, values: Tensor, rows: int) -> Tensor:
        anchors = self.task.anchors
        shape = (rows, anchors.per_cell, self.task.channels, *anchors.grid.shape)
        return values[:, None, None].expand(shape)


def true_flow(boxes_n9: Tensor, others_nm9: Tensor) -> Tensor:
    """x y in metres and theta in (-pi, pi] from each box to the one of ``others`` with its track
    id, ``[n, 3]``; NaN where there is none."""
    if not others_nm9.shape[1]:
        return boxes_n9.new_full((len(boxes_n9), 3), torch.nan)
    same = others_nm9[..., 8] == boxes_n9[:, None, 8]
    found = others_nm9[torch.arange(len(same)), same.int().argmax(dim=1)]
    flow = torch.cat(
        [found[:, :2] - boxes_n9[:, :2], wrap(found[:, 6:7] - boxes_n9[:, 6:7])], dim=1
    )
    return torch.where(same.any(dim=1)[:, None], flow, torch.nan)
