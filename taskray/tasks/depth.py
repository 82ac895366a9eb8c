"""Depth from one image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from taskray.errors import InputError
from taskray.job import plugins
from taskray.tasks.constant import Constant, MeanMap
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.tasks.metrics import DepthMetrics

SHARPNESS = 10.0
"""Of the softplus of inverse depth, which is linear for points nearer than about 5 m."""

Metres = Annotated[float, Field(gt=0)]


class Depth(Task):
    """Depth along z in metres, from one image.

    Args:
        loss: ``mse``, ``log_mse``, ``l1``, ``huber`` (MultiNet++), ``berhu`` or an import path of
            ``loss(prediction, label, valid)``.
        output: what the network's one channel o means. ``log``: depth is
            ``min_depth * (max_depth / min_depth) ** sigmoid(o)``, so a change of o scales depth
            instead of adding metres to it, and depth is between the bounds from the first step
            on. ``inverse``: 1 / depth is ``1 / max_depth + softplus(o)``; the inverse depth of a
            plane is linear in the pixel, so a network that is linear there predicts planes.
            ``metres``: o is depth, clamped to the bounds (published metric networks).
        min_depth: nearest depth in metres that is predicted; nearer labels do not count.
        max_depth: farthest depth in metres that is predicted; farther labels do not count.
        loss_on: what the loss compares: ``depth`` in metres, or ``inverse`` depth,
            ``max_depth / depth``, in which near things count (DenseMTL, with ``berhu``).
        median_scaling: scale each predicted map by the ratio of medians (label to prediction)
            before measuring, for training whose scale is unknown. Mention it with the numbers.
    """

    quantities = ("depth",)
    labels = ("depth",)
    out_channels: Mapping[str, int] = {"depth": 1}

    def __init__(
        self,
        loss: str = "mse",
        output: Literal["log", "inverse", "metres"] = "log",
        min_depth: Metres = 0.1,
        max_depth: Metres = 80.0,
        median_scaling: bool = False,
        loss_on: Literal["depth", "inverse"] = "depth",
    ) -> None:
        if min_depth >= max_depth:
            raise InputError(
                "max_depth", f"got {max_depth:g}, expected more than min_depth, {min_depth:g}"
            )
        self.output = output
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.median_scaling = median_scaling
        self.loss_on = loss_on
        self._loss_name = loss
        self._loss = plugins.resolve("loss", loss, "loss")

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        if self.output == "metres":
            return {"depth": output.clamp(self.min_depth, self.max_depth)}
        if self.output == "inverse":
            inverse = 1 / self.max_depth + functional.softplus(output, beta=SHARPNESS)
            return {"depth": 1 / inverse.clamp(max=1 / self.min_depth)}
        span = math.log(self.max_depth / self.min_depth)
        return {"depth": self.min_depth * torch.exp(span * torch.sigmoid(output))}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        depth, label = prediction["depth"], batch["depth"]
        valid = self._valid(label)
        if self.loss_on == "inverse":
            depth, label = (self.max_depth / d.clamp(min=self.min_depth) for d in (depth, label))
        return {self._loss_name: self._loss(depth, label, valid)}

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        label, expected = batch["depth"], f"{self.min_depth:g} to {self.max_depth:g} m"
        return [LabelValues("depth", label, self._valid(label), expected)]

    def _valid(self, label: Tensor) -> Tensor:
        return (label >= self.min_depth) & (label <= self.max_depth)

    def constant(self) -> Constant:
        """The geometric mean of the labels at each pixel."""
        return MeanMap("depth", self._log_of_labels, torch.exp)

    def _log_of_labels(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        label = batch["depth"]
        return label.clamp(min=self.min_depth).log(), self._valid(label)

    def metric(self) -> DepthMetrics:
        from taskray.tasks.metrics import DepthMetrics  # torchmetrics is slow to import

        return DepthMetrics(self.min_depth, self.max_depth, self.median_scaling)
