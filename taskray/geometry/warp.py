"""From one frame to the other: depth to points, rigid and object motion, projection, sampling.

Taskology, eq. 9: ``z' p' = K R K^-1 z p + K (m delta + T)``, with p a pixel of frame 1, z its
depth, R and T the camera's motion 1 -> 2, delta the object motion in axes of camera 2, and m
the mask of what can move; p' is where the point stands in frame 2 and z' its depth there.

Shape legend as in :mod:`taskray.geometry.camera`. Everything is differentiable in depth,
motions, mask and sampled values; validity is boolean and carries no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.camera import backproject, project, transform


class Warp(NamedTuple):
    """Where the points of frame 1 stand in frame 2; all fields lie on the pixels of frame 1."""

    pixels_b2hw: Tensor
    """p': column and row in frame 2."""
    depth_b1hw: Tensor
    """z' in metres."""
    valid_b1hw: Tensor
    """bool: depth was measured, z' > 0, and p' lies within frame 2. A point hidden in frame 2 is
    still valid: compare ``depth_b1hw`` with the other depth sampled at ``pixels_b2hw``."""


def warp(
    depth_b1hw: Tensor,
    intrinsics_b33: Tensor,
    motion_b44: Tensor,
    object_motion_b3hw: Tensor | None = None,
    mask_b1hw: Tensor | None = None,
) -> Warp:
    """Move every pixel of frame 1 to frame 2 (Taskology eq. 9).

    ``motion_b44`` is ``camera_motion`` 1 -> 2; ``object_motion_b3hw`` is in metres in axes of
    camera 2, and without ``mask_b1hw`` (m in [0, 1]) it counts everywhere.
    """
    points = transform(motion_b44, backproject(depth_b1hw, intrinsics_b33))
    if object_motion_b3hw is not None:
        moved = object_motion_b3hw if mask_b1hw is None else mask_b1hw * object_motion_b3hw
        points = points + moved
    pixels, depth = project(points, intrinsics_b33)
    height, width = depth_b1hw.shape[-2:]
    valid = (depth_b1hw > 0) & (depth > 0) & in_bounds(pixels, height, width)
    return Warp(pixels, depth, valid)


def in_bounds(pixels_b2hw: Tensor, height: int, width: int) -> Tensor:
    """bool ``[b, 1, h, w]``: the pixel lies between the outermost pixel centres of the frame, up
    to a thousandth of a pixel, so that rounding does not void the border of a frame at rest."""
    size = pixels_b2hw.new_tensor([width, height])[:, None, None]
    inside = (pixels_b2hw >= -1e-3) & (pixels_b2hw <= size - 1 + 1e-3)
    return inside.all(dim=1, keepdim=True)


def sample(values_bchw: Tensor, pixels_b2hw: Tensor, mode: str = "bilinear") -> Tensor:
    """Values ``[b, c, h, w]`` of frame 2 at pixels (column, row), ``[b, c, h', w']``.

    ``mode`` is ``bilinear`` or ``nearest``. Outside the frame the border's value is repeated:
    mask with :func:`in_bounds`.
    """
    height, width = values_bchw.shape[-2:]
    size = pixels_b2hw.new_tensor([width, height])[:, None, None]
    grid = (2 * pixels_b2hw + 1) / size - 1
    return functional.grid_sample(
        values_bchw, grid.movedim(1, -1), mode=mode, padding_mode="border", align_corners=False
    )


def invert(motion_b44: Tensor) -> Tensor:
    """The rigid motion back, ``[b, 4, 4]``: ``[R^T, -R^T T]``."""
    rotation_t = motion_b44[:, :3, :3].transpose(1, 2)
    translation = -(rotation_t * motion_b44[:, None, :3, 3]).sum(dim=2, keepdim=True)
    return torch.cat([torch.cat([rotation_t, translation], dim=2), motion_b44[:, 3:]], dim=1)
