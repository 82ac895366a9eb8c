"""Segmentation of two frames: a point keeps its class when it is moved into the other frame."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taskray.relations.relation import Relation
from taskray.relations.two_views import (
    CLASSES,
    SCENE,
    Average,
    both_directions,
    check_classes,
    counted,
    movable_indices,
)
from taskray.tasks.object_motion import OBJECT_QUANTITIES
from taskray.tasks.task import Task


class SegmentationWarp(Relation):
    """Squared difference of segmentation logits after warping (Taskology eq. 4), both directions.

    The pixels of frame 1 are moved to frame 2 as in :class:`ScenePhotometric` (eq. 9); frame 2's
    logits are sampled there and compared with those of frame 1. Points count where they are
    visible; the loss is a mean over them and the classes, as the photometric one is.

    The gradient reaches both frames' logits, and depth and motion through the sampled position;
    none passes through the mask of what can move.

    Args:
        object_motion: things of a movable class move relative to the scene; if false, the scene is
            static.
        movable: those classes: their indices, or the segmentation's class map (a name or a YAML
            file).
    """

    inputs = ("intrinsics",)

    def __init__(
        self,
        object_motion: bool = True,
        movable: str | list[int] = "world",
        average: Average = "visible",
    ) -> None:
        self.object_motion, self.average = object_motion, average
        self.named, self.movable = movable, movable_indices(movable)
        self.quantities = (*SCENE, *(OBJECT_QUANTITIES if object_motion else ()), *CLASSES)

    def check_tasks(self, tasks: Mapping[str, Task]) -> None:
        if self.object_motion:
            check_classes(self.named, tasks)

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        total = torch.zeros(())
        for direction in both_directions(predictions, batch, self.object_motion, self.movable):
            here, there = (
                predictions["segmentation" + v.frame] for v in (direction.here, direction.there)
            )
            with torch.no_grad():
                visible = direction.visible(direction.sample(direction.there.depth))
            difference = (direction.sample(there) - here) * visible
            share = counted(visible.to(difference.dtype), self.average)
            total = total + difference.square().mean() / share
        return {"logits": total}
