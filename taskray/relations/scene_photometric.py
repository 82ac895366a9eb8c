"""Depth, camera motion, object motion and segmentation: a point keeps its colour when it is moved
into the other frame of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from taskray.errors import InputError
from taskray.geometry.motion import squared_length
from taskray.geometry.photometric import (
    CONTRAST,
    edge_aware_smoothness,
    field_smoothness,
    weighted_dissimilarity,
)
from taskray.geometry.warp import sample
from taskray.relations.relation import Relation
from taskray.relations.two_views import (
    CLASSES,
    SCENE,
    Average,
    Direction,
    View,
    both_directions,
    check_classes,
    counted,
    movable_indices,
)
from taskray.tasks.object_motion import OBJECT_QUANTITIES
from taskray.tasks.task import Task

Weight = Annotated[float, Field(ge=0)]

LEAST_DEPTH_VARIANCE = 1e-4
"""Square metres, added to the mean squared depth difference that SSIM's weights are relative to."""
LEAST_MOTION = 1e-8
"""Square metres, and squared entries of a rotation: keeps the cycle terms finite for cameras at
rest."""


class ScenePhotometric(Relation):
    """Photometric consistency of two frames (Taskology eq. 3 and 9, supplement 6.2), with the
    loss terms of Gordon et al. (ICCV 2019, arXiv 1904.04998), summed over both directions.

    The pixels p of frame 1 are moved to ``z' p' = K R K^-1 z p + K (m delta + T)``; frame 2 is
    sampled there. A point is *visible* where p' is in frame 2 and z' is at most frame 2's depth
    there. Points that are not visible do not count: a point that is hidden only because of wrong
    depth counts in the other direction. Each argument below weights one term; 0 leaves the term
    out. On the truth, and without noise in the frames, ``rgb``, ``ssim``, ``depth`` and the cycles
    are 0 up to occlusion borders; smoothness is a prior and is not.

    It differs from the published loss in one point: terms on pixels are means over the visible
    points, where the published ones are means over all pixels. There a point that is not visible
    costs nothing, and in noisy frames of the embedded world a motion that hides half of the points
    has the lower loss: in 5 of 10 pairs of ``real`` rooms at 256x384 the inverse of the true motion
    or none. ``average: all`` is the published loss.

    The gradient reaches depth, camera motion and object motion, of either frame. The mask m is a
    step function: a segmentation learns nothing here.

    Args:
        segmentation: things of a movable class can move (m of eq. 7); if false, everything can.
        object_motion: things move relative to the scene; if false, the scene is static (delta = 0,
            and no segmentation is needed).
        movable: classes that can move: their indices, or the segmentation's class map (a name or a
            YAML file).
        rgb: |I1' - I1| where visible, mean over pixels and channels.
        ssim: 1/2 of (1 - SSIM)/2 of windows of 3x3 pixels, weighted by how well the depths
            agree: s / (dz^2 + s), s the mean of dz^2 over visible pixels (no gradient).
        depth: |z' - z2(p')| in metres where visible, mean over pixels.
        smoothness: slope of normalised disparity, exempt at image edges.
        rotation_cycle: |R21 R12 - I|^2 / (|R12 - I|^2 + |R21 - I|^2).
        translation_cycle: |R21 t12 + t21(p')|^2 / (|t12|^2 + |t21(p')|^2) where visible, with
            t = m delta + T; no gradient through p'.
        motion_smoothness: slope of delta between pixels that can both move, relative to the root
            mean square of m delta + T.
        average: ``visible``: rgb, depth and the translation cycle are means over the visible
            points, ssim is relative to the mean weight; ``all``: means over all pixels.
        contrast: c2 of SSIM, 9e-6 as published. At some times the squared noise of the frames (in
            [0, 1]; 1e-3 for a deviation of 0.02) noise no longer counts as structure.
    """

    constant = CLASSES
    inputs = ("image", "image_2", "intrinsics")

    def __init__(
        self,
        segmentation: bool = True,
        object_motion: bool = True,
        movable: str | list[int] = "world",
        rgb: Weight = 0.85,
        ssim: Weight = 3.0,
        depth: Weight = 1e-2,
        smoothness: Weight = 1e-2,
        rotation_cycle: Weight = 1e-3,
        translation_cycle: Weight = 1e-2,
        motion_smoothness: Weight = 1e-3,
        average: Average = "visible",
        contrast: Annotated[float, Field(gt=0)] = CONTRAST,
    ) -> None:
        weights = {
            "rgb": rgb,
            "ssim": ssim,
            "depth": depth,
            "smoothness": smoothness,
            "rotation_cycle": rotation_cycle,
            "translation_cycle": translation_cycle,
            "motion_smoothness": motion_smoothness if object_motion else 0.0,
        }
        self.weights = {term: weight for term, weight in weights.items() if weight}
        if not self.weights:
            raise InputError("rgb", "all terms have weight 0, expected at least one above 0")
        self.average, self.contrast = average, contrast
        self.object_motion = object_motion
        masked = segmentation and object_motion
        self.named, self.movable = movable, movable_indices(movable) if masked else None
        self.quantities = (
            *SCENE,
            *(OBJECT_QUANTITIES if object_motion else ()),
            *(CLASSES if masked else ()),
        )

    def check_tasks(self, tasks: Mapping[str, Task]) -> None:
        if self.movable is not None:
            check_classes(self.named, tasks)

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        there, back = (
            self._terms(direction, batch)
            for direction in both_directions(predictions, batch, self.object_motion, self.movable)
        )
        return {t: weight * (there[t] + back[t]) for t, weight in self.weights.items()}

    def _terms(self, direction: Direction, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every term of one direction, unweighted."""
        here, there = direction.here, direction.there
        image, image_there = (batch["image" + v.frame].to(here.depth) for v in (here, there))
        sampled = direction.sample(torch.cat([image_there, there.depth], dim=1))
        image_there, depth_there = sampled[:, :3], sampled[:, 3:]
        visible = direction.visible(depth_there)
        difference = depth_there - direction.warped.depth_b1hw
        share = counted(visible.to(difference.dtype), self.average)
        terms = {}
        if "rgb" in self.weights:
            terms["rgb"] = ((image_there - image) * visible).abs().mean() / share
        if "ssim" in self.weights:
            weight = agreement(difference.detach(), visible) * direction.warped.valid_b1hw
            ssim = weighted_dissimilarity(image_there, image, weight, self.contrast)
            terms["ssim"] = 0.5 * ssim / counted(weight, self.average)
        if "depth" in self.weights:
            terms["depth"] = (difference * visible).abs().mean() / share
        if "smoothness" in self.weights:
            terms["smoothness"] = edge_aware_smoothness(here.depth, image)
        if "rotation_cycle" in self.weights:
            terms["rotation_cycle"] = rotation_cycle(here.motion, there.motion)
        if "translation_cycle" in self.weights:
            terms["translation_cycle"] = translation_cycle(direction, visible) / share
        if "motion_smoothness" in self.weights:
            terms["motion_smoothness"] = motion_smoothness(here)
        return terms


def agreement(difference_b1hw: Tensor, visible_b1hw: Tensor) -> Tensor:
    """The agreement of depths, in (0, 1]: 1 where they are equal, 1/2 where they differ by the root
    mean square over the frame's visible pixels."""
    squared = difference_b1hw.square()
    total = torch.where(visible_b1hw, squared, 0.0).sum(dim=(1, 2, 3), keepdim=True)
    mean = total / visible_b1hw.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    scale = mean + LEAST_DEPTH_VARIANCE
    return scale / (squared + scale)


def rotation_cycle(there_b44: Tensor, back_b44: Tensor) -> Tensor:
    """The difference of two rotations, one after the other, from the identity, relative to their
    size."""
    there, back = there_b44[:, :3, :3], back_b44[:, :3, :3]
    identity = torch.eye(3, dtype=there.dtype, device=there.device)

    def size(change: Tensor) -> Tensor:
        return (change - identity).square().sum(dim=(1, 2))

    return (size(back @ there) / (size(there) + size(back) + LEAST_MOTION)).mean()


def translation_cycle(direction: Direction, visible_b1hw: Tensor) -> Tensor:
    """The distance by which each visible point misses its start after both motions, relative to
    their lengths."""
    here, there = direction.here, direction.there
    back = there.camera_translation
    if there.field is not None:
        back = sample(there.field, direction.warped.pixels_b2hw.detach()) + back
    moved = torch.baddbmm(back.flatten(2), there.motion[:, :3, :3], here.translation.flatten(2))
    sizes = here.distance_squared + squared_length(back) + LEAST_MOTION
    return (squared_length(moved.view_as(back)) / sizes * visible_b1hw).mean()


def motion_smoothness(view: View) -> Tensor:
    """Slope of the object motion, relative to the whole motion of the points."""
    assert view.object_motion is not None
    slope = field_smoothness(view.object_motion, view.mask)
    return (slope * (view.distance_squared.mean(dim=(1, 2, 3)) + LEAST_MOTION).rsqrt()).mean()
