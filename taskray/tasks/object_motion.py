"""The motion of things relative to the scene, between two frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taskray.schema import IGNORE
from taskray.tasks.constant import Constant, MeanMap, Several
from taskray.tasks.ego_motion import FRAMES, Scale, stacked
from taskray.tasks.losses import l1
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.tasks.motion_metrics import ObjectMotionMetrics

OBJECT_QUANTITIES = ("object_motion", "object_motion_back_2")
OBJECT_LABELS = (*OBJECT_QUANTITIES, "motion_mask", "motion_mask_2")


class ObjectMotion(Task):
    """How far the point at each pixel moves relative to the scene, there and back, in metres, from
    the two frames stacked on channels, in both orders.

    The field is free at every pixel; a relation multiplies it by the mask of what can move.

    Args:
        scale: metres for one unit of the network's output.
    """

    quantities = OBJECT_QUANTITIES
    per_frame = False
    passes = 2
    inputs = FRAMES
    labels = OBJECT_LABELS
    in_channels = 6
    out_channels: Mapping[str, int] = {"object_motion": 3}

    def __init__(self, scale: Scale = 0.01) -> None:
        self.scale = scale

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        return stacked(batch, reverse=True)

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        there, back = (self.scale * output).chunk(2)
        return {"object_motion": there, "object_motion_back_2": back}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Mean absolute difference in metres, separately over moving and over still pixels: most
        pixels are still, and would outweigh the others in one mean."""
        predicted = torch.cat([prediction[q] for q in OBJECT_QUANTITIES])
        label = torch.cat([batch[q] for q in OBJECT_QUANTITIES])
        mask = torch.cat([batch["motion_mask"], batch["motion_mask_2"]])
        still = (mask != 1) & (mask != IGNORE)
        return {"moving": l1(predicted, label, mask == 1), "still": l1(predicted, label, still)}

    def constant(self) -> Constant:
        """The mean field of the labels, there and back."""
        masks = ("motion_mask", "motion_mask_2")
        return Several(*map(_mean_field, OBJECT_QUANTITIES, masks))

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        masks = ("motion_mask", "motion_mask_2")
        return [LabelValues(m, batch[m], batch[m] != IGNORE, "0 (still) or 1") for m in masks]

    def metric(self) -> ObjectMotionMetrics:
        from taskray.tasks.motion_metrics import (
            ObjectMotionMetrics,
        )  # torchmetrics is slow to import

        return ObjectMotionMetrics()


def _mean_field(quantity: str, mask: str) -> tuple[Constant, tuple[str, ...]]:
    mean = MeanMap(quantity, lambda batch: (batch[quantity], batch[mask] != IGNORE))
    return mean, (quantity, mask)
