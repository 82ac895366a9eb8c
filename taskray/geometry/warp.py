"""Warping between frames: depth to points, rigid and object motion, projection, sampling.

Taskology, eq. 9: ``z' p' = K R K^-1 z p + K (m delta + T)``, with p a pixel of frame 1, z its
depth, R and T the camera's motion 1 -> 2, delta the object motion in axes of camera 2, and m
the mask of movable pixels; p' is the pixel of the point in frame 2 and z' its depth there.

Shape legend as in :mod:`taskray.geometry.camera`. Everything is differentiable in depth,
motions and sampled values; validity is boolean and carries no gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.camera import pixel_grid

NEAREST = 1e-3
"""Metres. Points nearer than this to the camera's plane, or behind it, are invalid; they are
projected from this depth, which keeps gradients finite."""


class Warp(NamedTuple):
    """The points of frame 1 in frame 2; all fields are on the pixels of frame 1."""

    pixels_b2hw: Tensor
    """p': column and row in frame 2."""
    depth_b1hw: Tensor
    """z' in metres."""
    valid_b1hw: Tensor
    """bool: depth was measured, z' is positive, and p' is inside frame 2. A point occluded there is
    still valid: compare ``depth_b1hw`` with the other depth sampled at ``pixels_b2hw``."""


def warp(
    depth_b1hw: Tensor,
    intrinsics_b33: Tensor,
    motion_b44: Tensor,
    object_motion_b3hw: Tensor | None = None,
) -> Warp:
    """Move every pixel of frame 1 to frame 2 (Taskology eq. 9).

    ``motion_b44`` is ``camera_motion`` 1 -> 2; ``object_motion_b3hw`` is m delta, in metres in
    axes of camera 2. The intrinsics must be invertible.
    """
    height, width = depth_b1hw.shape[-2:]
    turn = intrinsics_b33 @ motion_b44[:, :3, :3] @ invert_intrinsics(intrinsics_b33)
    turned = turn @ _homogeneous_pixels(height, width, depth_b1hw.dtype, depth_b1hw.device)
    shift = (intrinsics_b33 @ motion_b44[:, :3, 3:])[..., None]
    if object_motion_b3hw is not None:
        moved = intrinsics_b33 @ object_motion_b3hw.flatten(2)
        shift = shift + moved.view_as(object_motion_b3hw)
    projected = torch.addcmul(shift, depth_b1hw, turned.view(-1, 3, height, width))
    depth = projected[:, 2:]
    pixels = projected[:, :2] / depth.clamp(min=NEAREST)
    valid = (depth_b1hw > 0) & (depth > NEAREST) & in_bounds(pixels, height, width)
    return Warp(pixels, depth, valid)


def invert_intrinsics(intrinsics_b33: Tensor) -> Tensor:
    """``K^-1`` of upper triangular camera matrices ``[b, 3, 3]`` whose last row is (0, 0, 1)."""
    fx, fy = intrinsics_b33[:, 0, 0], intrinsics_b33[:, 1, 1]
    skew, x0, y0 = intrinsics_b33[:, 0, 1], intrinsics_b33[:, 0, 2], intrinsics_b33[:, 1, 2]
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    rows = [1 / fx, -skew / (fx * fy), (skew * y0 - fy * x0) / (fx * fy)]
    rows += [zero, 1 / fy, -y0 / fy, zero, zero, one]
    return torch.stack(rows, dim=1).view(-1, 3, 3)


@lru_cache(maxsize=8)
def _homogeneous_pixels(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``(j, i, 1)`` of every pixel, ``[3, h * w]``; cached, because frame sizes repeat."""
    grid = pixel_grid(height, width, torch.empty(0, dtype=dtype, device=device))
    return torch.cat([grid, torch.ones_like(grid[:1])]).flatten(1)


def in_bounds(pixels_b2hw: Tensor, height: int, width: int) -> Tensor:
    """bool ``[b, 1, h, w]``: the pixel is between the outermost pixel centres of the frame, up to
    a thousandth of a pixel, so that rounding does not exclude the border without motion."""
    column, row = pixels_b2hw[:, :1], pixels_b2hw[:, 1:]
    inside = (column >= -1e-3) & (column <= width - 1 + 1e-3)
    return inside & (row >= -1e-3) & (row <= height - 1 + 1e-3)


def sample(values_bchw: Tensor, pixels_b2hw: Tensor) -> Tensor:
    """Values ``[b, c, h, w]`` of frame 2 at pixels (column, row), bilinear, ``[b, c, h', w']``.

    Outside the frame the border's value is used: mask with :func:`in_bounds`.
    """
    height, width = values_bchw.shape[-2:]
    size = pixels_b2hw.new_tensor([width, height])[:, None, None]
    grid = torch.addcmul(1 / size - 1, pixels_b2hw, 2 / size)
    return functional.grid_sample(
        values_bchw, grid.movedim(1, -1), padding_mode="border", align_corners=False
    )


def invert(motion_b44: Tensor) -> Tensor:
    """The inverse rigid motion, ``[b, 4, 4]``: ``[R^T, -R^T T]``."""
    rotation_t = motion_b44[:, :3, :3].transpose(1, 2)
    translation = -(rotation_t * motion_b44[:, None, :3, 3]).sum(dim=2, keepdim=True)
    return torch.cat([torch.cat([rotation_t, translation], dim=2), motion_b44[:, 3:]], dim=1)
