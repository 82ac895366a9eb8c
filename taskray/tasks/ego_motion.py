"""The camera's motion between two frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from taskray.geometry.motion import rigid_motion
from taskray.geometry.warp import invert
from taskray.tasks.constant import Constant, MeanMotion
from taskray.tasks.task import Task

if TYPE_CHECKING:
    from taskray.tasks.motion_metrics import EgoMotionMetrics

DirectionBack = Literal["predicted", "inverted"]
Scale = Annotated[float, Field(gt=0)]
FRAMES = ("image", "image_2")


class EgoMotion(Task):
    """Rotation and translation of the camera, 1 -> 2 and back, from the two frames stacked on
    channels.

    The network returns six numbers for each pair (of a map ``[B, 6, H, W]`` the means are used):
    the axis of the rotation times its angle, and the translation. Without labels the translation
    has the scale of depth, which is then arbitrary.

    Args:
        direction_back: ``predicted``: the network also gets the frames in reverse order, and
            predicts that motion separately; only a relation's cycle terms tie the two.
            ``inverted``: the motion back is the exact inverse of the motion there.
        rotation_scale: radians for one unit of the network's output.
        translation_scale: metres for one unit of the network's output.
        rotation_weight: factor on the supervised loss of the rotation.
        snippet: frames of a trajectory in the metric ``ate``.
    """

    quantities = ("camera_motion", "camera_motion_back_2")
    per_frame = False
    inputs = FRAMES
    labels = ("camera_motion",)
    in_channels = 6
    out_channels: Mapping[str, int] = {"camera_motion": 6}

    def __init__(
        self,
        direction_back: DirectionBack = "predicted",
        rotation_scale: Scale = 0.01,
        translation_scale: Scale = 0.01,
        rotation_weight: Annotated[float, Field(ge=0)] = 1.0,
        snippet: Annotated[int, Field(ge=2)] = 5,
    ) -> None:
        self.direction_back = direction_back
        self.passes = 2 if direction_back == "predicted" else 1
        self.rotation_scale, self.translation_scale = rotation_scale, translation_scale
        self.rotation_weight = rotation_weight
        self.snippet = snippet

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """``[B, 6, H, W]``; where both directions are predicted, ``[2B, 6, H, W]`` with the
        reversed pairs after the others."""
        return stacked(batch, reverse=self.passes == 2)

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        """From ``[passes * B, 6]`` or ``[passes * B, 6, H, W]``."""
        numbers = output.mean(dim=(2, 3)) if output.dim() == 4 else output
        motion = rigid_motion(
            self.rotation_scale * numbers[:, :3], self.translation_scale * numbers[:, 3:]
        )
        if self.direction_back == "inverted":
            back = invert(motion)
        else:
            motion, back = motion.chunk(2)
        return {"camera_motion": motion, "camera_motion_back_2": back}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Absolute differences of rotation matrices and of translations (metres), each summed
        over entries and averaged over the batch, of the predicted directions."""
        pairs = [(prediction["camera_motion"], batch["camera_motion"])]
        if self.direction_back == "predicted":
            pairs.append((prediction["camera_motion_back_2"], invert(batch["camera_motion"])))
        apart = torch.cat([(p - label).abs() for p, label in pairs])
        return {
            "rotation": self.rotation_weight * apart[:, :3, :3].sum(dim=(1, 2)).mean(),
            "translation": apart[:, :3, 3].sum(dim=1).mean(),
        }

    def constant(self) -> Constant:
        """The mean motion of the labels."""
        return MeanMotion(*self.quantities)

    def metric(self) -> EgoMotionMetrics:
        from taskray.tasks.motion_metrics import EgoMotionMetrics  # torchmetrics is slow to import

        return EgoMotionMetrics(self.snippet)


def stacked(batch: Mapping[str, Tensor], reverse: bool) -> Tensor:
    """The two frames stacked on channels, ``[B, 6, H, W]``; with ``reverse`` followed by the pairs
    in the other order, ``[2B, 6, H, W]``."""
    first, second = (batch[frame] for frame in FRAMES)
    pairs = [torch.cat([first, second], dim=1)]
    if reverse:
        pairs.append(torch.cat([second, first], dim=1))
    return torch.cat(pairs)
