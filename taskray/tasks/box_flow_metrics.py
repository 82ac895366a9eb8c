"""The error of the flow of boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from taskray.tasks.anchors import wrap

Columns = Mapping[str, Tensor]
AtBoxes = Callable[[Columns, Columns], tuple[tuple[Tensor, ...], Tensor, Tensor]]


class BoxFlowMetrics(Metric):  # type: ignore[misc]
    """``flow_error`` in metres and ``turn_deg`` in degrees: mean distance and angle between
    predicted and true flow, over the anchors that are matched with a box and the past frames that
    contain it; and ``still_error``, the distance for a flow of zero. NaN without one such box.

    Args:
        at_boxes: see :meth:`taskray.tasks.box_flow.BoxFlow.at_boxes`.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    NAMES = ("flow_error", "turn_deg", "still_error")

    def __init__(self, at_boxes: AtBoxes) -> None:
        super().__init__()
        self.at_boxes = at_boxes
        zeros = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        _, flow, true = self.at_boxes(prediction, batch)
        known = ~true.isnan().any(dim=-1)
        flow, true = flow[known].double(), true[known].double()
        distance = (flow - true)[:, :2].norm(dim=1)
        turn = torch.rad2deg(wrap(flow[:, 2] - true[:, 2]).abs())
        still = true[:, :2].norm(dim=1)
        self.sums += torch.stack([distance.sum(), turn.sum(), still.sum()])
        self.count += len(true)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.NAMES, (self.sums / self.count).float(), strict=True))
