"""The pinhole camera: pixels to points and back, and its intrinsics after a resize or a flip.

Shape legend: ``b`` batch, ``1``/``2``/``3`` channels, ``h`` and ``w`` rows and columns of the
frame. Axes, signs and units are those of :mod:`taskray.schema`; pixel centres are at whole
numbers. All functions are differentiable and elementwise, so that autocast does not change the
precision of their input.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Column and row of every pixel, ``[2, h, w]``, in pixels: ``grid[:, i, j] = (j, i)``.

    Device and floating type are those of ``like``.
    """
    rows = torch.arange(height, device=like.device, dtype=like.dtype)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"))


def rays(height: int, width: int, intrinsics_b33: Tensor) -> Tensor:
    """``K^-1 p`` of every pixel, ``[b, 3, h, w]``, with z = 1 (not of unit length)."""
    x, y = pixel_grid(height, width, intrinsics_b33)
    k = intrinsics_b33[..., None, None]
    ray_y = (y - k[:, 1, 2]) / k[:, 1, 1]
    ray_x = (x - k[:, 0, 2] - k[:, 0, 1] * ray_y) / k[:, 0, 0]
    return torch.stack([ray_x, ray_y, torch.ones_like(ray_x)], dim=1)


def backproject(depth_b1hw: Tensor, intrinsics_b33: Tensor) -> Tensor:
    """The points of the pixels, ``K^-1 z p``, ``[b, 3, h, w]`` in metres, camera axes.

    Where depth is 0 (not measured) the point is the origin.
    """
    height, width = depth_b1hw.shape[-2:]
    return depth_b1hw * rays(height, width, intrinsics_b33)


def project(points_b3hw: Tensor, intrinsics_b33: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels ``[b, 2, h, w]`` (column, row) and depths ``[b, 1, h, w]`` in metres of points.

    The pixels of points at or behind the camera (z <= 0) are finite but invalid: check the depth.
    """
    x, y, z = points_b3hw.unbind(dim=1)
    safe_z = z.clamp(min=1e-6)
    k = intrinsics_b33[..., None, None]
    column = (k[:, 0, 0] * x + k[:, 0, 1] * y) / safe_z + k[:, 0, 2]
    row = k[:, 1, 1] * y / safe_z + k[:, 1, 2]
    return torch.stack([column, row], dim=1), z.unsqueeze(1)


def transform(motion_b44: Tensor, points_b3hw: Tensor) -> Tensor:
    """``R X + T`` of points ``[b, 3, h, w]`` under rigid motions ``[b, 4, 4]``, in metres."""
    return rotate(motion_b44, points_b3hw) + motion_b44[:, :3, 3, None, None]


def rotate(motion_b44: Tensor, vectors_b3hw: Tensor) -> Tensor:
    """``R v`` of directions or displacements ``[b, 3, h, w]`` under ``[b, 4, 4]`` or
    ``[b, 3, 3]`` motions."""
    rotation = motion_b44[:, :3, :3, None, None]
    return (rotation * vectors_b3hw.unsqueeze(1)).sum(dim=2)


def resize_intrinsics(
    intrinsics_b33: Tensor, size: tuple[int, int], new_size: tuple[int, int]
) -> Tensor:
    """Intrinsics ``[b, 3, 3]`` of frames resized from ``size`` to ``new_size``, both (h, w).

    The frame's borders stay in place (``align_corners=False``), so a pixel centre x moves to
    ``(x + 1/2) s - 1/2``.
    """
    scale_y, scale_x = new_size[0] / size[0], new_size[1] / size[1]
    change = intrinsics_b33.new_tensor(
        [[scale_x, 0.0, (scale_x - 1) / 2], [0.0, scale_y, (scale_y - 1) / 2], [0.0, 0.0, 1.0]]
    )
    return (change[:, :, None] * intrinsics_b33[:, None]).sum(dim=2)


def flip_intrinsics(intrinsics_b33: Tensor, width: int) -> Tensor:
    """Intrinsics ``[b, 3, 3]`` of frames mirrored left to right: the principal point moves to
    ``w - 1 - x0`` and the skew changes sign.

    A flip also changes the sign of x of normals, points, translations and object motions.
    """
    flipped = intrinsics_b33.clone()
    flipped[:, 0, 1] = -intrinsics_b33[:, 0, 1]
    flipped[:, 0, 2] = width - 1 - intrinsics_b33[:, 0, 2]
    return flipped
