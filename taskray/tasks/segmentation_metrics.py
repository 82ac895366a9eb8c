"""Metrics of classes per pixel, from one confusion matrix over the whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from taskray.data.readers.class_map import outside
from taskray.errors import TaskrayError
from taskray.schema import IGNORE


class SegmentationMetrics(Metric):  # type: ignore[misc]
    """``miou pixel_accuracy iou/<class>``, pooled over all labelled pixels of the set.

    The IoU of a class is TP / (TP + FP + FN) over the whole set; it is NaN for a class that occurs
    neither in the labels nor in the predictions, and ``miou`` is the mean of the others.

    Args:
        classes: names, in the order of their indices.
        measured: the classes of ``miou``, ``iou/<class>`` and ``pixel_accuracy``. All pixels
            count in the confusion matrix: a wall that is predicted as a car is a false positive.
            ``pixel_accuracy`` is over the pixels whose label is one of these classes.
        quantity: of the labels and of the predicted logits.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        measured: Sequence[str] | None = None,
        quantity: str = "segmentation",
    ) -> None:
        super().__init__()
        self.classes, self.quantity = tuple(classes), quantity
        names = self.classes if measured is None else measured
        self.measured = [self.classes.index(name) for name in names]
        zeros = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        self.add_state("confusion", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        label = batch[self.quantity][:, 0].long()
        predicted = prediction[self.quantity].argmax(dim=1)
        valid = label != IGNORE
        count = len(self.classes)
        if valid.any() and int(label[valid].max()) >= count:
            raise TaskrayError(outside(int(label[valid].max()), count))
        pairs = count * label[valid] + predicted[valid]
        self.confusion += torch.bincount(pairs, minlength=count**2).view(count, count)

    def compute(self) -> dict[str, Tensor]:
        matrix = self.confusion.double()  # rows are labels, columns predictions
        right, labels, predictions = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
        iou = (right / (labels + predictions - right))[self.measured].float()
        accuracy = right[self.measured].sum() / labels[self.measured].sum()
        named = {f"iou/{self.classes[c]}": v for c, v in zip(self.measured, iou, strict=True)}
        return {"miou": iou.nanmean(), "pixel_accuracy": accuracy.float(), **named}
