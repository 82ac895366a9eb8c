"""All motion between two frames from one network: the camera's, and that of things."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from taskray.tasks.ego_motion import DirectionBack, EgoMotion, Scale
from taskray.tasks.multi import Multi
from taskray.tasks.object_motion import ObjectMotion


class Motion(Multi):
    """Camera motion and object motion, there and back, from one network (Gordon et al., ICCV
    2019), which gets the two frames in both orders: the heads ``camera`` (:class:`EgoMotion`, 6
    channels) and ``objects`` (:class:`ObjectMotion`, 3 channels).

    Args:
        direction_back: of the camera's motion, as in :class:`EgoMotion`. The field back is always
            predicted: it is defined on the pixels of the other frame.
        rotation_scale: radians for one unit of the network's output.
        translation_scale: metres for one unit of the network's output, of the camera.
        object_scale: the same, of the field.
        rotation_weight: factor on the supervised loss of the rotation.
        snippet: frames of a trajectory in the metric ``ate``.
        object_labels: whether datasets label the motion of things; if not, only the camera's is
            learnt from labels and measured.
    """

    def __init__(
        self,
        direction_back: DirectionBack = "predicted",
        rotation_scale: Scale = 0.01,
        translation_scale: Scale = 0.01,
        object_scale: Scale = 0.01,
        rotation_weight: Annotated[float, Field(ge=0)] = 1.0,
        snippet: Annotated[int, Field(ge=2)] = 5,
        object_labels: bool = True,
    ) -> None:
        camera = EgoMotion(
            direction_back, rotation_scale, translation_scale, rotation_weight, snippet
        )
        heads = {"camera": camera, "objects": ObjectMotion(object_scale)}
        super().__init__(heads, unlabelled=() if object_labels else ("objects",))
