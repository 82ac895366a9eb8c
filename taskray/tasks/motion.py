"""All motion between two frames from one network: the camera's, and that of things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import Tensor

from taskray.tasks.ego_motion import FRAMES, DirectionBack, EgoMotion, Scale, part, stacked
from taskray.tasks.object_motion import OBJECT_LABELS, OBJECT_QUANTITIES, ObjectMotion
from taskray.tasks.task import Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class Motion(Task):
    """Camera motion and object motion, there and back, from one network (Gordon et al., ICCV
    2019), which sees the two frames in both orders.

    See :class:`EgoMotion` and :class:`ObjectMotion`; a network that gives one map has nine
    channels, the camera's six before the field's three.

    Args:
        direction_back: of the camera's motion, as in :class:`EgoMotion`. The field back is always
            predicted: it lies on the pixels of the other frame.
        rotation_scale: radians that one unit of the network's output stands for.
        translation_scale: metres that one unit of the network's output stands for, of the camera.
        object_scale: the same, of the field.
        rotation_weight: factor on the supervised loss of the rotation.
        snippet: frames of a trajectory in the metric ``ate``.
        object_labels: whether datasets label the motion of things; without, only the camera's is
            learnt from labels and measured.
    """

    quantities = (*EgoMotion.quantities, *OBJECT_QUANTITIES)
    per_frame = False
    inputs = FRAMES
    in_channels = 6
    out_channels = 9

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
        self.camera = EgoMotion(
            direction_back, rotation_scale, translation_scale, rotation_weight, snippet
        )
        self.objects = ObjectMotion(object_scale)
        self.labels = (*self.camera.labels, *(OBJECT_LABELS if object_labels else ()))
        self.object_labels = object_labels

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        return stacked(batch, reverse=True)

    def predict(self, output: Any) -> dict[str, Tensor]:
        camera = part(output, "camera", 0, 6)
        if self.camera.direction_back == "inverted":
            camera = camera.chunk(2)[0]
        field = part(output, "field", 6, 3)
        return {
            **self.camera.predict({"camera": camera}),
            **self.objects.predict({"field": field}),
        }

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        terms = self.camera.loss(prediction, batch)
        return terms | self.objects.loss(prediction, batch) if self.object_labels else terms

    def metric(self) -> Metric:
        from taskray.tasks.motion_metrics import MotionMetrics  # see Task: slow to import

        return MotionMetrics(self.camera.snippet, self.object_labels)
