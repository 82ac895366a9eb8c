"""Surface normals from one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from taskray.geometry.normals import has_direction, unit
from taskray.job import plugins
from taskray.tasks.constant import Constant, MeanMap
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.tasks.metrics import NormalsMetrics


class Normals(Task):
    """Surface normals from one image: unit vectors in camera axes.

    The network's three channels are scaled to length 1. Normals that face the camera are learnt
    from the labels, not enforced.

    Args:
        loss: ``cosine``, ``l1``, ``mse`` or the import path of ``loss(prediction, label, valid)``.
    """

    quantities = ("normals",)
    labels = ("normals",)
    out_channels: Mapping[str, int] = {"normals": 3}

    def __init__(self, loss: str = "cosine") -> None:
        self._loss_name = loss
        self._loss = plugins.resolve("loss", loss, "loss")

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return {"normals": unit(output)}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        label = batch["normals"]
        return {self._loss_name: self._loss(prediction["normals"], label, has_direction(label))}

    def constant(self) -> Constant:
        """The mean direction of the labels at each pixel."""
        return MeanMap("normals", lambda b: (b["normals"], has_direction(b["normals"])), unit)

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        label = batch["normals"]
        length = label.norm(dim=1, keepdim=True)
        return [LabelValues("normals", length, has_direction(label), "vectors of length 1")]

    def metric(self) -> NormalsMetrics:
        from taskray.tasks.metrics import NormalsMetrics  # torchmetrics is slow to import

        return NormalsMetrics()
