"""The motion of what moves by itself, between two frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taskray.schema import IGNORE
from taskray.tasks.ego_motion import FRAMES, Scale, part, stacked
from taskray.tasks.losses import l1
from taskray.tasks.task import Task

if TYPE_CHECKING:
    from taskray.tasks.motion_metrics import ObjectMotionMetrics

OBJECT_QUANTITIES = ("object_motion", "object_motion_back_2")
OBJECT_LABELS = (*OBJECT_QUANTITIES, "motion_mask", "motion_mask_2")


class ObjectMotion(Task):
    """How far the point at each pixel moves relative to the scene, there and back, in metres, from
    the two frames stacked on channels, in both orders.

    The field is free at every pixel; a relation multiplies it by the mask of what can move.

    Args:
        scale: metres that one unit of the network's output stands for.
    """

    quantities = OBJECT_QUANTITIES
    per_frame = False
    inputs = FRAMES
    labels = OBJECT_LABELS
    in_channels = 6
    out_channels = 3

    def __init__(self, scale: Scale = 0.01) -> None:
        self.scale = scale

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        return stacked(batch, reverse=True)

    def predict(self, output: Any) -> dict[str, Tensor]:
        there, back = (self.scale * part(output, "field", 0, 3)).chunk(2)
        return {"object_motion": there, "object_motion_back_2": back}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Mean absolute difference in metres, over what moves and over what stands still apart:
        most pixels stand still, and would drown the others."""
        predicted = torch.cat([prediction[q] for q in OBJECT_QUANTITIES])
        label = torch.cat([batch[q] for q in OBJECT_QUANTITIES])
        mask = torch.cat([batch["motion_mask"], batch["motion_mask_2"]])
        still = (mask != 1) & (mask != IGNORE)
        return {"moving": l1(predicted, label, mask == 1), "still": l1(predicted, label, still)}

    def metric(self) -> ObjectMotionMetrics:
        from taskray.tasks.motion_metrics import ObjectMotionMetrics  # see Task: slow to import

        return ObjectMotionMetrics()
