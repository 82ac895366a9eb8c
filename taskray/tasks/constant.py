"""Constant predictors: one prediction for every input, made from labels alone.

The yardstick of a task. A network that is not clearly better has learnt no more than where things
usually are: a street has its ground below and its sky above, whatever the picture shows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.warp import invert

Columns = Mapping[str, Tensor]


class Constant(ABC):
    """Sees batches of labels, then predicts."""

    @abstractmethod
    def update(self, batch: Columns) -> None:
        """Take the labels of a batch in."""

    @abstractmethod
    def predict(self, batch: Columns) -> dict[str, Tensor]:
        """The same prediction for each row of a batch, shaped as a network's; empty before the
        first label. Of the batch only the number of rows and the size of frames is read."""


class MeanMap(Constant):
    """The mean of a quantity at each pixel, over the rows that have a valid label there; where no
    row has one, the mean of all pixels.

    Args:
        quantity: its name.
        read: the values ``[B, C, H, W]`` to average and where they are valid ``[B, 1, H, W]``, from
            the columns of a batch.
        finish: the quantity from a mean ``[1, C, H, W]``.
    """

    def __init__(
        self,
        quantity: str,
        read: Callable[[Columns], tuple[Tensor, Tensor]],
        finish: Callable[[Tensor], Tensor] = lambda mean: mean,
    ) -> None:
        self.quantity, self.read, self.finish = quantity, read, finish
        self.total: Tensor | None = None
        self.count = torch.zeros(())

    def update(self, batch: Columns) -> None:
        values, valid = self.read(batch)
        total = torch.where(valid, values, 0).double().sum(dim=0, keepdim=True)
        count = valid.double().sum(dim=0, keepdim=True)
        if self.total is None:
            self.total, self.count = total, count
        else:
            self.total, self.count = self.total + total, self.count + count

    def predict(self, batch: Columns) -> dict[str, Tensor]:
        if self.total is None or not self.count.any():
            return {}
        everywhere = self.total.sum(dim=(2, 3), keepdim=True) / self.count.sum()
        mean = torch.where(self.count > 0, self.total / self.count.clamp(min=1), everywhere)
        rows, size = _rows_of(batch), _size_of(batch)
        if size is not None and mean.shape[2:] != size:
            mean = functional.interpolate(mean, size, mode="bilinear", antialias=True)
        finished = self.finish(mean.float())
        return {self.quantity: finished.expand(rows, *finished.shape[1:])}


class MeanMotion(Constant):
    """The mean of rigid motions ``[B, 4, 4]``: the mean translation, and the rotation nearest to
    the mean matrix. Predicted with its inverse.

    Args:
        quantity: the motion.
        back: the name of its inverse.
    """

    def __init__(self, quantity: str, back: str) -> None:
        self.quantity, self.back = quantity, back
        self.total, self.count = torch.zeros(4, 4, dtype=torch.float64), 0

    def update(self, batch: Columns) -> None:
        self.total = self.total + batch[self.quantity].double().sum(dim=0)
        self.count += len(batch[self.quantity])

    def predict(self, batch: Columns) -> dict[str, Tensor]:
        if not self.count:
            return {}
        motion = self.total / self.count
        left, _, right = torch.linalg.svd(motion[:3, :3])
        signs = torch.ones(3, dtype=torch.float64)
        signs[2] = torch.det(left @ right).sign()
        motion[:3, :3] = left @ signs.diag() @ right
        there = motion.float().expand(_rows_of(batch), 4, 4)
        return {self.quantity: there, self.back: invert(there)}


class Fixed(Constant):
    """A prediction that needs no labels, as that of no detection at all.

    Args:
        prediction: of one row, by quantity, ``[1, ...]``.
    """

    def __init__(self, prediction: Columns) -> None:
        self.prediction = dict(prediction)

    def update(self, batch: Columns) -> None:
        pass

    def predict(self, batch: Columns) -> dict[str, Tensor]:
        rows = _rows_of(batch)
        return {q: values.expand(rows, *values.shape[1:]) for q, values in self.prediction.items()}


class Several(Constant):
    """The constants of several quantities, each updated by batches that have its labels.

    Args:
        parts: each with the label columns that it reads.
    """

    def __init__(self, *parts: tuple[Constant, tuple[str, ...]]) -> None:
        self.parts = parts

    def update(self, batch: Columns) -> None:
        for part, columns in self.parts:
            if all(column in batch for column in columns):
                part.update(batch)

    def predict(self, batch: Columns) -> dict[str, Tensor]:
        return {q: values for part, _ in self.parts for q, values in part.predict(batch).items()}


def _rows_of(batch: Columns) -> int:
    return len(next(iter(batch.values())))


def _size_of(batch: Columns) -> tuple[int, int] | None:
    image = batch.get("image")
    return None if image is None else (image.shape[-2], image.shape[-1])
