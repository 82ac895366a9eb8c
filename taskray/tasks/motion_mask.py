"""Which pixels show something that moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from taskray.tasks.ego_motion import FRAMES, stacked
from taskray.tasks.pixel_classes import ClassWeights, PixelClasses


class MotionMask(PixelClasses):
    """Whether the point at each pixel moves relative to the scene (the motion task of MultiNet++,
    CVPR workshops 2019): logits ``[B, 2, H, W]`` of ``still`` and ``moving``, learnt by cross
    entropy.

    Args:
        frames: 2: from the two frames stacked on channels. 1: from the first frame alone, in which
            only what things usually do can be seen.
        class_weights: factor on the loss of the pixels of ``still`` and ``moving``. Without it, as
            published, a network may find nothing that moves where a hundredth of the pixels do.
    """

    quantities = ("motion_mask",)
    labels = ("motion_mask",)

    def __init__(
        self, frames: Literal[1, 2] = 2, class_weights: ClassWeights | None = None
    ) -> None:
        super().__init__(("still", "moving"), class_weights=class_weights)
        self.inputs = FRAMES[:frames]
        self.in_channels = 3 * frames
        self.per_frame = frames == 1

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["image"] if self.per_frame else stacked(batch, reverse=False)
