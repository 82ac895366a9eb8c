"""Depth and surface normals: the normals of a depth map are the surface's normals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from taskray.geometry.normals import normals_from_depth, unit
from taskray.relations.relation import Path, Relation

SHORTEST_NORMAL = 1e-3
"""A predicted vector shorter than this has no direction and is left out."""


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("expected an odd number of pixels")
    return value


class DepthNormals(Relation):
    """Cosine distance between predicted normals and those computed from predicted depth.

    ``L = mean over valid pixels of 1 - n_depth . n_predicted`` (0 for equal, 1 for
    perpendicular, 2 for opposite normals), Taskology eq. 6 and supplement eq. 18.

    Pixels count where the depth has a normal (:func:`geometry.normals.normals_from_depth`) and
    the predicted normal has a direction. The mask is a step function and carries no gradient. A
    batch without one such pixel gives 0 with a gradient of zeros.

    Args:
        beta: depth changes of this fraction of the depth, over two pixels, are discontinuities.
        window: side in pixels of the window over which derivatives are averaged; odd.
        bend: a pixel whose inverse depth differs by this fraction of itself from the straight line
            between its two neighbours is a discontinuity, too; null: no such test (the paper).
        max_angle: degrees. Pixels where the two normals differ by more do not count: such a
            difference comes from an object that only one of the tasks has found, and the mean of
            the two would be wrong for both; null: all count (the paper).
    """

    quantities = ("depth", "normals")
    inputs = ("intrinsics",)

    def __init__(
        self,
        beta: Annotated[float, Field(gt=0)] = 0.1,
        window: Annotated[int, Field(ge=1), AfterValidator(_odd)] = 3,
        bend: Annotated[float, Field(gt=0)] | None = None,
        max_angle: Annotated[float, Field(gt=0, le=180)] | None = None,
    ) -> None:
        self.beta = beta
        self.window = window
        self.bend = bend
        self.max_distance = 1 - math.cos(math.radians(max_angle)) if max_angle else math.inf

    def paths(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Path]:
        """Normals, computed from depth."""
        computed = normals_from_depth(
            predictions["depth"], batch["intrinsics"], self.beta, self.window, self.bend
        )
        return {"normals": Path(*computed)}

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        computed, valid = normals_from_depth(
            predictions["depth"], batch["intrinsics"], self.beta, self.window, self.bend
        )
        predicted = predictions["normals"]
        length_squared = predicted.detach().square().sum(dim=1, keepdim=True)
        valid = valid & (length_squared > SHORTEST_NORMAL**2)
        distance = 1 - (computed * unit(predicted, SHORTEST_NORMAL)).sum(dim=1, keepdim=True)
        valid = valid & (distance.detach() <= self.max_distance)
        total = torch.where(valid, distance, 0.0).sum()
        return {"cosine": total / valid.sum().clamp(min=1)}
