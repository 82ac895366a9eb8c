"""How alike two frames look, and how smooth a map is where a frame is.

From "Depth from Videos in the Wild" (Gordon et al., ICCV 2019), whose photometric loss Taskology
takes over. Shape legend as in :mod:`taskray.geometry.camera`; images lie in [0, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.warp import NEAREST

CONTRAST = 9e-6
"""c2 of SSIM. c1 is infinite: means do not count, only contrast and structure do."""
LEAST_WEIGHT = 0.01
"""Added to every pixel's weight, so that no window is without any."""
LEAST_DISPARITY = 1e-3
"""Per metre. What a frame's mean disparity is at least, so that it can be divided by."""


class _BoxSum(torch.autograd.Function):
    """Sum over 3x3 pixels, valid ones only, ``[..., h - 2, w - 2]``.

    Five times as fast as pooling on a CPU; so is its gradient, the sum over the same windows.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _box_sum(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _box_sum(functional.pad(gradients[0], (2, 2, 2, 2)))


def _box_sum(values: Tensor) -> Tensor:
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]


def weighted_dissimilarity(
    x_bchw: Tensor, y_bchw: Tensor, weight_b1hw: Tensor
) -> tuple[Tensor, Tensor]:
    """(1 - SSIM) / 2 of windows of 3x3 pixels, ``[b, c, h - 2, w - 2]`` in [0, 1], and each
    window's mean weight ``[b, 1, h - 2, w - 2]``.

    Pixels count in the windows' moments by ``weight`` in [0, 1]. SSIM is its contrast-structure
    term alone, ``(2 s_xy + c2) / (s_xx + s_yy + c2)``.
    """
    weight = weight_b1hw + LEAST_WEIGHT
    weights = _box_sum(weight)
    x_weighted, y_weighted = x_bchw * weight, y_bchw * weight
    of_x = torch.cat([x_weighted, x_weighted * x_bchw, x_weighted * y_bchw], dim=1)
    of_y = torch.cat([y_weighted, y_weighted * y_bchw], dim=1)
    x, xx, xy = (_BoxSum.apply(of_x) / weights).chunk(3, dim=1)  # type: ignore[no-untyped-call]
    y, yy = (_BoxSum.apply(of_y) / weights).chunk(2, dim=1)  # type: ignore[no-untyped-call]
    covariance = xy - x * y
    variances = (xx - x.square()) + (yy - y.square())
    similarity = (2 * covariance + CONTRAST) / (variances + CONTRAST)
    return ((1 - similarity) / 2).clamp(0, 1), weights / 9 - LEAST_WEIGHT


def edge_aware_smoothness(depth_b1hw: Tensor, image_b3hw: Tensor) -> Tensor:
    """Mean slope of disparity, divided by the mean disparity of its frame, where the image has
    no edge: ``|dx d| exp(-|dx I|) + |dy d| exp(-|dy I|)``, a scalar.

    Where depth is 0 (sky, or not measured) disparity is 0.
    """
    disparity = torch.where(depth_b1hw > 0, 1 / depth_b1hw.clamp(min=NEAREST), 0.0)
    mean = disparity.mean(dim=(1, 2, 3), keepdim=True).clamp(min=LEAST_DISPARITY)
    disparity = disparity / mean
    along_x = (disparity[..., 1:] - disparity[..., :-1]).abs()
    along_y = (disparity[..., 1:, :] - disparity[..., :-1, :]).abs()
    edge_x = (image_b3hw[..., 1:] - image_b3hw[..., :-1]).abs().mean(dim=1, keepdim=True)
    edge_y = (image_b3hw[..., 1:, :] - image_b3hw[..., :-1, :]).abs().mean(dim=1, keepdim=True)
    return (along_x * (-edge_x).exp()).mean() + (along_y * (-edge_y).exp()).mean()


def field_smoothness(field_b3hw: Tensor, weight_b1hw: Tensor | None = None) -> Tensor:
    """Mean ``|dx f| + |dy f|`` of a vector field, a scalar in the field's units. With a weight
    (in [0, 1]) a slope counts by the product of the weights at its two ends."""
    along_x = (field_b3hw[..., 1:] - field_b3hw[..., :-1]).abs()
    along_y = (field_b3hw[..., 1:, :] - field_b3hw[..., :-1, :]).abs()
    if weight_b1hw is not None:
        along_x = along_x * (weight_b1hw[..., 1:] * weight_b1hw[..., :-1])
        along_y = along_y * (weight_b1hw[..., 1:, :] * weight_b1hw[..., :-1, :])
    return along_x.mean() + along_y.mean()
