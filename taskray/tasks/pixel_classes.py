"""The base of tasks that predict a class per pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from taskray.data.readers.class_map import outside
from taskray.errors import InputError, TaskrayError
from taskray.schema import IGNORE
from taskray.tasks.constant import Constant, MeanMap
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.tasks.segmentation_metrics import SegmentationMetrics

ClassWeights = Mapping[str, Annotated[float, Field(ge=0)]]
"""Factor on the loss of the pixels of a class, by its name."""


class PixelClasses(Task):
    """A class per pixel: logits ``[B, C, H, W]`` of its one quantity, learnt by cross entropy over
    the pixels whose label is not ignored.

    Args:
        classes: names, in the order of their indices.
        measured: the classes of the metrics; None: all of them.
        class_weights: 1 for classes that are not named.
    """

    def __init__(
        self,
        classes: Sequence[str],
        measured: Sequence[str] | None = None,
        class_weights: ClassWeights | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.measured = self.classes if measured is None else tuple(measured)
        self.out_channels = {self.quantity: len(self.classes)}
        self._class_weights = _weights(self.classes, class_weights) if class_weights else None

    @property
    def quantity(self) -> str:
        """The quantity that it predicts."""
        return self.quantities[0]

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        label = batch[self.quantity]
        highest = int(torch.where(label == IGNORE, 0, label).max())
        if highest >= len(self.classes):
            raise TaskrayError(outside(highest, len(self.classes)))

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        label = batch[self.quantity]
        expected = f"classes 0 to {len(self.classes) - 1}"
        return [LabelValues(self.quantity, label, label != IGNORE, expected)]

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return {self.quantity: output}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        label, logits = batch[self.quantity][:, 0].long(), prediction[self.quantity]
        valid, weights = label != IGNORE, self._class_weights
        if weights is None:
            count = valid.sum().clamp(min=1)
        else:
            weights = weights.to(logits.device)
            of_pixels = weights[torch.where(valid, label, 0)]
            count = torch.where(valid, of_pixels, 0).sum().clamp(min=1e-6)
        total = functional.cross_entropy(
            logits, label, weights, ignore_index=IGNORE, reduction="sum"
        )
        return {"cross_entropy": total / count}

    def constant(self) -> Constant:
        """The most frequent class at each pixel: logits are logarithms of the frequencies."""
        return MeanMap(self.quantity, self._one_hot, lambda mean: mean.clamp(min=1e-6).log())

    def _one_hot(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        label = batch[self.quantity]
        valid = label != IGNORE
        index = torch.where(valid, label, 0)[:, 0].long()
        return functional.one_hot(index, len(self.classes)).movedim(-1, 1), valid

    def metric(self) -> SegmentationMetrics:
        from taskray.tasks.segmentation_metrics import SegmentationMetrics  # torchmetrics is slow

        return SegmentationMetrics(self.classes, self.measured, self.quantity)


def _weights(classes: Sequence[str], by_name: Mapping[str, float]) -> Tensor:
    """A weight for each class, ``[C]``."""
    for name in by_name:
        if name not in classes:
            raise InputError("class_weights", f"got {name!r}, expected one of {', '.join(classes)}")
    return torch.tensor([by_name.get(name, 1.0) for name in classes])
