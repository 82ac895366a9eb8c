"""Surface normals computed from a depth map, and unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.camera import backproject

SHORTEST_DEPTH = 1e-3
"""Metres. Keeps inverse depth finite where depth was not measured."""
SMALLEST_CROSS = 1e-12
"""Square metres. A cross product shorter than this has no direction in float32."""


def normals_from_depth(
    depth_b1hw: Tensor,
    intrinsics_b33: Tensor,
    beta: float = 0.1,
    window: int = 3,
    bend: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Normals of the surface of a depth map, and the mask of the pixels that have one.

    The points are differentiated over two pixels, differences across depth discontinuities are
    dropped, the others are summed over ``window`` x ``window`` pixels, and the cross product is
    taken. The result is exact on planes. The gradient reaches the depth through the normals,
    never through the mask.

    Args:
        depth_b1hw: metres along z; 0 where not measured.
        intrinsics_b33: camera matrices in pixels of this depth map.
        beta: a pixel is dropped if depth changes by ``beta`` of itself or more between its two
            neighbours, towards the camera or away from it.
        window: side of the averaging window in pixels; odd.
        bend: a pixel is also dropped if inverse depth differs by ``bend`` of itself or more from
            the straight line between its two neighbours. The inverse depth of a plane is linear
            in the pixel, at any slope, so this drops the blur of a network around near objects
            and keeps the ground. None: the paper's test alone.

    Returns:
        ``normals_b3hw``: unit vectors in camera axes that face the camera, 0 if invalid.
        ``valid_b1hw``: bool. False for the outermost pixels, for pixels whose depth was not
        measured, and if no difference in the window is usable.

    Taskology, supplement 7, eq. 11-17. Eq. 13 is printed without the absolute values, eq. 17
    without the pixels that have no valid neighbour; the 1/N^2 of eq. 15 cancels in eq. 17.
    """
    points = backproject(depth_b1hw, intrinsics_b33)
    along_x = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
    along_y = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    usable = _is_continuous(depth_b1hw.detach(), along_x.detach(), along_y.detach(), beta)
    if bend is not None:
        usable &= _is_straight(depth_b1hw.detach(), bend)

    along_x = _box_sum(torch.where(usable, along_x, 0.0), window)
    along_y = _box_sum(torch.where(usable, along_y, 0.0), window)
    cross = _cross(along_y, along_x)  # this order faces the camera

    valid = _box_sum(usable.to(cross.dtype), window) > 0
    valid &= depth_b1hw.detach()[..., 1:-1, 1:-1] > 0
    valid &= cross.detach().square().sum(dim=1, keepdim=True) > SMALLEST_CROSS**2
    normals = torch.where(valid, unit(cross, SMALLEST_CROSS), 0.0)
    return functional.pad(normals, (1, 1, 1, 1)), functional.pad(valid, (1, 1, 1, 1))


def unit(vectors_bchw: Tensor, shortest: float = 1e-6) -> Tensor:
    """Vectors of length 1 along channels. Vectors shorter than ``shortest`` are divided by it, so
    that the zero vector stays zero and its gradient finite.

    Ten times as fast as ``torch.nn.functional.normalize``, whose norm over a short inner
    dimension is slow on CPUs.
    """
    length_squared = vectors_bchw.square().sum(dim=1, keepdim=True)
    return vectors_bchw * length_squared.clamp(min=shortest**2).rsqrt()


def _is_continuous(depth: Tensor, along_x: Tensor, along_y: Tensor, beta: float) -> Tensor:
    """Eq. 12-13 for the inner pixels: both differences exist and cross no discontinuity."""
    measured = depth > 0
    limit = beta * depth[..., 1:-1, 1:-1]
    continuous = (along_x[:, 2:].abs() < limit) & (along_y[:, 2:].abs() < limit)
    horizontal = measured[..., 1:-1, 2:] & measured[..., 1:-1, :-2]
    vertical = measured[..., 2:, 1:-1] & measured[..., :-2, 1:-1]
    return continuous & horizontal & vertical


def _is_straight(depth: Tensor, bend: float) -> Tensor:
    """Whether inverse depth is linear over three pixels, along rows and columns, for the inner
    pixels; undefined where depth was not measured."""
    inverse = depth.clamp(min=SHORTEST_DEPTH).reciprocal()
    twice = 2 * inverse[..., 1:-1, 1:-1]
    limit = bend * twice  # the sum of both neighbours is compared with twice the pixel
    along_x = inverse[..., 1:-1, 2:] + inverse[..., 1:-1, :-2] - twice
    along_y = inverse[..., 2:, 1:-1] + inverse[..., :-2, 1:-1] - twice
    return (along_x.abs() < limit) & (along_y.abs() < limit)


def _box_sum(values: Tensor, window: int) -> Tensor:
    """Sum over the window around each pixel; pixels outside the image are zero."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window: got {window}, expected an odd number of pixels")
    height, width = values.shape[-2:]
    padded = functional.pad(values, (window // 2,) * 4)
    rows = padded[..., :height, :]
    for shift in range(1, window):
        rows = rows + padded[..., shift : shift + height, :]
    box = rows[..., :width]
    for shift in range(1, window):
        box = box + rows[..., shift : shift + width]
    return box


def _cross(a_b3hw: Tensor, b_b3hw: Tensor) -> Tensor:
    """Cross product along channels (``torch.linalg.cross`` is seven times slower here)."""
    ax, ay, az = a_b3hw.unbind(dim=1)
    bx, by, bz = b_b3hw.unbind(dim=1)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=1)


def has_direction(normals_b3hw: Tensor) -> Tensor:
    """Whether a normal label is valid, ``[B, 1, H, W]`` bool: its length is 1, or 0 if invalid."""
    return normals_b3hw.square().sum(dim=1, keepdim=True) > 0.25
