"""Both directions of a batch of frame pairs: what the relations of scenes in motion share.

Taskology 3.2.1 sums every loss over "1 and 2 swapped everywhere". Here the two directions lie
one after the other along the batch: rows [0, B) stand on frame 1 and look into frame 2, rows
[B, 2B) the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taskray.data.classes import class_map
from taskray.errors import InputError
from taskray.geometry.warp import sample, warp

SCENE = ("depth", "depth_2", "camera_motion", "camera_motion_back_2")
OBJECTS = ("object_motion", "object_motion_back_2")
CLASSES = ("segmentation", "segmentation_2")


class TwoViews:
    """The pixels of both frames of each pair, moved into the other frame (Taskology eq. 9).

    Args:
        predictions: ``SCENE``, and where ``movable`` is given ``CLASSES``, as in ``schema``.
        batch: with ``intrinsics``.
        object_motion: whether ``OBJECTS`` are there too; without, the scene is static.
        movable: indices of the classes that can move (M of eq. 7); None: everything can.

    Raises InputError where the intrinsics cannot be inverted.
    """

    def __init__(
        self,
        predictions: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        object_motion: bool,
        movable: tuple[int, ...] | None,
    ) -> None:
        self.depth = both(predictions, "depth", "depth_2")
        self.motion = both(predictions, "camera_motion", "camera_motion_back_2")
        self.intrinsics = checked_intrinsics(batch).to(self.depth.dtype).repeat(2, 1, 1)
        self.mask: Tensor | None = None
        self.field: Tensor | None = None
        """m delta, ``[2B, 3, h, w]``."""
        if object_motion:
            self.field = self.object_motion = both(predictions, *OBJECTS)
            if movable is not None:
                self.mask = movable_mask(both(predictions, *CLASSES), movable)
                self.field = self.mask * self.object_motion
        self.warped = warp(self.depth, self.intrinsics, self.motion, self.field)

    @property
    def motion_back(self) -> Tensor:
        """The camera motion of the other direction, ``[2B, 4, 4]``."""
        return swapped(self.motion)

    def sample(self, values: Tensor) -> Tensor:
        """Values on the pixels of both frames, taken from where these stand in the other."""
        return sample(swapped(values), self.warped.pixels_b2hw)

    def visible(self, depth_there: Tensor) -> Tensor:
        """bool ``[2B, 1, h, w]``: the point stands within the other frame, and nothing before it
        there: z' is no more than that frame's depth, sampled at p'."""
        return self.warped.valid_b1hw & (self.warped.depth_b1hw <= depth_there)


def both(columns: Mapping[str, Tensor], first: str, second: str) -> Tensor:
    """A quantity of both frames, ``[2B, ...]``."""
    return torch.cat([columns[first], columns[second]])


def swapped(values: Tensor) -> Tensor:
    """The same ``[2B, ...]`` with the frames of each pair exchanged."""
    first, second = values.chunk(2)
    return torch.cat([second, first])


def movable_mask(logits_bchw: Tensor, movable: tuple[int, ...]) -> Tensor:
    """m: 1 where the most likely class is one that can move, else 0; ``[b, 1, h, w]`` (Taskology
    eq. 7). It is a step function: where the logits are live, their gradient is zeros."""
    num_classes = logits_bchw.shape[1]
    others = [c for c in range(num_classes) if c not in movable]
    if movable[-1] >= num_classes or not others:
        raise InputError(
            f"movable: classes {', '.join(map(str, movable))} can move, but the segmentation has "
            f"{num_classes} classes; expected some of them, not all"
        )
    logits = logits_bchw.detach()
    moving = logits[:, list(movable)].amax(dim=1, keepdim=True)
    mask = (moving > logits[:, others].amax(dim=1, keepdim=True)).to(logits.dtype)
    return mask + 0 * logits_bchw[:, :1] if logits_bchw.requires_grad else mask


def movable_indices(movable: str | list[int]) -> tuple[int, ...]:
    """Class indices, ascending, from themselves or from a class map (a name or a YAML file)."""
    indices = class_map(movable).movable_indices if isinstance(movable, str) else set(movable)
    if not indices or min(indices) < 0:
        raise InputError(f"movable: expected at least one class, each 0 or more, got {movable!r}")
    return tuple(sorted(indices))


def checked_intrinsics(batch: Mapping[str, Tensor]) -> Tensor:
    """The camera matrices of a batch; InputError unless they are there and can be inverted."""
    if "intrinsics" not in batch:
        raise InputError("intrinsics: the mediator's rows have none, expected a 3x3 camera matrix")
    intrinsics = batch["intrinsics"]
    focal = intrinsics[:, [0, 1], [0, 1]]
    if not bool(((focal > 0) & torch.isfinite(intrinsics).all(dim=(1, 2))[:, None]).all()):
        raise InputError("intrinsics: not invertible, expected positive focal lengths in pixels")
    return intrinsics
