"""Rigid motions from the outputs of networks: axis-angle rotations and translations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotation_matrix(axis_angle_b3: Tensor) -> Tensor:
    """Rotations ``[b, 3, 3]`` by the angle ``|v|`` in radians about the axis ``v / |v|``.

    Rodrigues' formula, with factors whose value and gradient are exact also at the identity.
    """
    x, y, z = axis_angle_b3.unbind(dim=1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(-1, 3, 3)
    angle_squared = axis_angle_b3.square().sum(dim=1)[:, None, None]
    first, half = _sinc(angle_squared), _sinc(angle_squared / 4)
    identity = torch.eye(3, dtype=cross.dtype, device=cross.device)
    return identity + first * cross + 0.5 * half.square() * (cross @ cross)


def _sinc(squared: Tensor) -> Tensor:
    """sin x / x from x², differentiable at 0."""
    is_small = squared < 1e-4
    x = torch.where(is_small, 1.0, squared).sqrt()
    series = 1 - squared / 6 * (1 - squared / 20)
    return torch.where(is_small, series, x.sin() / x)


def rigid_motion(axis_angle_b3: Tensor, translation_b3: Tensor) -> Tensor:
    """``[[R, T], [0, 1]]``, ``[b, 4, 4]``, from a rotation in radians and a translation in
    metres."""
    top = torch.cat([rotation_matrix(axis_angle_b3), translation_b3[:, :, None]], dim=2)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(top), 1, 4)
    return torch.cat([top, bottom], dim=1)


def rotation_angle(rotation_b33: Tensor) -> Tensor:
    """The angle of rotations, ``[b]`` in radians in [0, pi]; exact near 0, unlike acos."""
    r = rotation_b33
    axis = torch.stack(
        [r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]], dim=1
    )
    trace = r.diagonal(dim1=1, dim2=2).sum(dim=1)
    return torch.atan2(axis.norm(dim=1), trace - 1)


def squared_length(vectors_b3hw: Tensor) -> Tensor:
    """``|v|^2`` of vector fields, ``[b, 1, h, w]``; in half the time that autograd takes."""
    result: Tensor = _SquaredLength.apply(vectors_b3hw)  # type: ignore[no-untyped-call]
    return result


class _SquaredLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(vectors)
        x, y, z = torch.split(vectors, 1, dim=1)
        return (x * x).addcmul_(y, y).addcmul_(z, z)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (vectors,) = ctx.saved_tensors
        gradient: Tensor = vectors * (2 * upstream[0])
        return gradient
