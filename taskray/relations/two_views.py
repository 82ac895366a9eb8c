"""The two directions between the frames of a pair, for the relations of scenes in motion.

Taskology 3.2.1 sums every loss over "1 and 2 swapped everywhere": a loss is written for one
direction, from the frame *here* into the frame *there*, and called on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, reduce
from typing import Literal

import torch
from torch import Tensor

from taskray.data.readers.class_map import class_map
from taskray.errors import InputError
from taskray.geometry.motion import squared_length
from taskray.geometry.warp import sample, warp
from taskray.tasks.segmentation import Segmentation
from taskray.tasks.task import Task

SCENE = ("depth", "depth_2", "camera_motion", "camera_motion_back_2")
CLASSES = ("segmentation", "segmentation_2")
FRAMES = ("", "_2")
"""Suffixes of the two frames; the motions of the second go back to the first."""
Average = Literal["visible", "all"]
"""What a term on pixels is averaged over: see :func:`counted`."""


class View:
    """One frame of a pair, with the motion from it to the other: all ``[B, ...]``.

    ``mask`` is m of Taskology eq. 7 (None: everything can move), ``field`` m delta (None: the
    scene is static).
    """

    def __init__(
        self,
        predictions: Mapping[str, Tensor],
        frame: str,
        object_motion: bool,
        movable: tuple[int, ...] | None,
    ) -> None:
        back = "_back_2" if frame else ""
        self.frame = frame
        self.depth = predictions["depth" + frame]
        self.motion = predictions["camera_motion" + back]
        self.mask: Tensor | None = None
        self.object_motion: Tensor | None = None
        self.field: Tensor | None = None
        if object_motion:
            self.field = self.object_motion = predictions["object_motion" + back]
            if movable is not None:
                self.mask = movable_mask(predictions["segmentation" + frame], movable)
                self.field = self.mask * self.object_motion

    @property
    def camera_translation(self) -> Tensor:
        """T, ``[B, 3, 1, 1]``."""
        return self.motion[:, :3, 3:, None]

    @cached_property
    def translation(self) -> Tensor:
        """m delta + T, ``[B, 3, h, w]``, or ``[B, 3, 1, 1]`` where the scene is static."""
        camera = self.camera_translation
        return camera if self.field is None else self.field + camera

    @cached_property
    def distance_squared(self) -> Tensor:
        """Squared length of :attr:`translation`, one channel."""
        return squared_length(self.translation)


class Direction:
    """The pixels of the frame here, moved into the frame there (Taskology eq. 9)."""

    def __init__(self, here: View, there: View, intrinsics_b33: Tensor) -> None:
        self.here, self.there = here, there
        self.warped = warp(here.depth, intrinsics_b33, here.motion, here.field)

    def sample(self, values_there: Tensor) -> Tensor:
        """Values of the frame there, at the positions of the pixels of the frame here."""
        return sample(values_there, self.warped.pixels_b2hw)

    def visible(self, depth_there: Tensor) -> Tensor:
        """bool ``[B, 1, h, w]``: the point is within the frame there and not occluded: z' is at
        most that frame's depth, sampled at p'."""
        return self.warped.valid_b1hw & (self.warped.depth_b1hw <= depth_there)


def both_directions(
    predictions: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    object_motion: bool,
    movable: tuple[int, ...] | None,
) -> tuple[Direction, Direction]:
    """From frame 1 into frame 2, and back.

    Args:
        predictions: ``SCENE``, with ``object_motion`` its field in both directions, and with
            ``movable`` ``CLASSES`` too, as in ``schema``.
        batch: with ``intrinsics``; InputError where they cannot be inverted.
        object_motion: whether things move relative to the scene.
        movable: indices of the classes that can move (M of eq. 7); None: all.
    """
    first, second = (View(predictions, f, object_motion, movable) for f in FRAMES)
    intrinsics = checked_intrinsics(batch).to(first.depth.dtype)
    return Direction(first, second, intrinsics), Direction(second, first, intrinsics)


def counted(weight_b1hw: Tensor, average: Average) -> Tensor:
    """What to divide the mean of weighted values over *all* pixels of a batch by, a scalar without
    gradient: for ``visible`` the mean weight, which gives the weighted mean, for ``all`` 1.

    The published losses divide by all pixels, so a pixel that is not visible costs nothing. On
    the truth noise costs something at every visible pixel, and a wrong motion that hides half of
    them could have the lower loss.
    """
    if average == "all":
        return weight_b1hw.new_ones(())
    return weight_b1hw.detach().mean().clamp(min=1 / weight_b1hw.numel())


def movable_mask(logits_bchw: Tensor, movable: tuple[int, ...]) -> Tensor:
    """m: 1 where the most likely class is one that can move, else 0; ``[b, 1, h, w]`` (Taskology
    eq. 7). A step function: no gradient passes."""
    num_classes = logits_bchw.shape[1]
    others = [c for c in range(num_classes) if c not in movable]
    if movable[-1] >= num_classes or not others:
        raise InputError(
            "movable",
            f"got classes {', '.join(map(str, movable))}, expected some but not all of the "
            f"segmentation's {num_classes} classes",
        )
    planes = torch.split(logits_bchw.detach(), 1, dim=1)
    best, best_other = (
        reduce(torch.maximum, [planes[c] for c in classes]) for classes in (movable, others)
    )
    return (best > best_other).to(logits_bchw.dtype)


def movable_indices(movable: str | list[int]) -> tuple[int, ...]:
    """Class indices, ascending, from themselves or from a class map (a name or a YAML file)."""
    indices = class_map(movable).movable_indices if isinstance(movable, str) else set(movable)
    if not indices or min(indices) < 0:
        raise InputError("movable", f"got {movable!r}, expected at least one class, each 0 or more")
    return tuple(sorted(indices))


def check_classes(movable: str | list[int], tasks: Mapping[str, Task]) -> None:
    """Raise InputError for a class map whose classes are not those of a segmentation among the
    tasks: its indices would mean other classes. Indices themselves are not checked."""
    if isinstance(movable, str):
        for name, task in tasks.items():
            if isinstance(task, Segmentation) and task.classes != class_map(movable).classes:
                raise InputError(
                    "movable",
                    f"the classes of {movable!r} are not those of task {name!r}, expected its "
                    "class map, or the indices of the classes that can move",
                )


def checked_intrinsics(batch: Mapping[str, Tensor]) -> Tensor:
    """The camera matrices of a batch; InputError if they are missing or cannot be inverted."""
    if "intrinsics" not in batch:
        raise InputError(
            "intrinsics", "the mediator's rows have none, expected a 3x3 camera matrix"
        )
    intrinsics = batch["intrinsics"]
    focal = intrinsics[:, [0, 1], [0, 1]]
    if not bool(((focal > 0) & torch.isfinite(intrinsics).all(dim=(1, 2))[:, None]).all()):
        raise InputError("intrinsics", "not invertible, expected positive focal lengths in pixels")
    return intrinsics
