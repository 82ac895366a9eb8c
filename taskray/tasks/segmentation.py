"""Semantic segmentation from one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from taskray.data.readers.class_map import ClassMap, outside
from taskray.data.readers.class_map import class_map as find_class_map
from taskray.errors import InputError, TaskrayError
from taskray.schema import IGNORE
from taskray.tasks.constant import Constant, MeanMap
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.tasks.segmentation_metrics import SegmentationMetrics


class Segmentation(Task):
    """A class per pixel, from one image: logits ``[B, C, H, W]``, learnt by cross entropy.

    Args:
        class_map: the classes: a built-in map (``world``, ``taskology``, ``cityscapes_19``,
            ``cityscapes_7``) or a YAML file. The dataset's labels must be indices of it.
        num_classes: the number of classes, without names, instead of a class map.
        metric_classes: ``all``, or ``movable``: measure the map's movable classes alone.
        class_weights: factor on the loss of the pixels of a class, by its name; 1 for classes that
            are not named. Without it a network finds no class that has a hundredth of the pixels.
    """

    quantities = ("segmentation",)
    labels = ("segmentation",)

    def __init__(
        self,
        class_map: str | None = None,
        num_classes: Annotated[int, Field(ge=2, le=IGNORE)] | None = None,
        metric_classes: Literal["all", "movable"] = "all",
        class_weights: Mapping[str, Annotated[float, Field(ge=0)]] | None = None,
    ) -> None:
        if class_map is not None and num_classes is not None:
            raise InputError("num_classes", "got a class_map as well, expected one of the two")
        if num_classes is not None:
            known = ClassMap(classes=tuple(map(str, range(num_classes))))
        else:
            known = find_class_map(class_map or "world")
        self.classes, movable = known.classes, known.movable
        if metric_classes == "movable" and not movable:
            raise InputError("metric_classes", "got movable, expected a map with movable classes")
        self.measured = movable if metric_classes == "movable" else self.classes
        self.out_channels = {"segmentation": len(self.classes)}
        self._class_weights = _weights(self.classes, class_weights) if class_weights else None

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        label = batch["segmentation"]
        highest = int(torch.where(label == IGNORE, 0, label).max())
        if highest >= len(self.classes):
            raise TaskrayError(outside(highest, len(self.classes)))

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        label = batch["segmentation"]
        expected = f"classes 0 to {len(self.classes) - 1}"
        return [LabelValues("segmentation", label, label != IGNORE, expected)]

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return {"segmentation": output}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        label, logits = batch["segmentation"][:, 0], prediction["segmentation"]
        weights = self._class_weights
        valid = label != IGNORE
        if weights is None:
            count = valid.sum().clamp(min=1)
        else:
            weights = weights.to(logits.device)
            count = weights[label[valid].long()].sum().clamp(min=1e-6)
        total = functional.cross_entropy(
            logits, label, weights, ignore_index=IGNORE, reduction="sum"
        )
        return {"cross_entropy": total / count}

    def constant(self) -> Constant:
        """The most frequent class at each pixel: logits are logarithms of the frequencies."""
        return MeanMap("segmentation", self._one_hot, lambda mean: mean.clamp(min=1e-6).log())

    def _one_hot(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        label = batch["segmentation"]
        valid = label != IGNORE
        index = torch.where(valid, label, 0)[:, 0].long()
        return functional.one_hot(index, len(self.classes)).movedim(-1, 1), valid

    def metric(self) -> SegmentationMetrics:
        from taskray.tasks.segmentation_metrics import SegmentationMetrics  # torchmetrics is slow

        return SegmentationMetrics(self.classes, self.measured)


def _weights(classes: Sequence[str], by_name: Mapping[str, float]) -> Tensor:
    """A weight for each class, ``[C]``."""
    for name in by_name:
        if name not in classes:
            raise InputError("class_weights", f"got {name!r}, expected one of {', '.join(classes)}")
    return torch.tensor([by_name.get(name, 1.0) for name in classes])
