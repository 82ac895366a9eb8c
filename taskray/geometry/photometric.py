"""Dissimilarity of two frames, and smoothness of maps.

From "Depth from Videos in the Wild" (Gordon et al., ICCV 2019), whose photometric loss Taskology
uses. Shape legend as in :mod:`taskray.geometry.camera`; images are in [0, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.warp import NEAREST

CONTRAST = 9e-6
"""c2 of SSIM as published. c1 is infinite: only contrast and structure count, not the means."""
LEAST_WEIGHT = 0.01
"""Added to every pixel's weight, so that every window has some weight."""
LEAST_DISPARITY = 1e-3
"""Lower bound of a frame's mean disparity, per metre, before the division by it."""


def weighted_dissimilarity(
    x_bchw: Tensor, y_bchw: Tensor, weight_b1hw: Tensor, contrast: float = CONTRAST
) -> Tensor:
    """(1 - SSIM) / 2 of all windows of 3x3 pixels within the frames, each times its mean weight;
    their mean, a scalar in [0, 1].

    Pixels count in the windows' moments by ``weight`` in [0, 1] plus ``LEAST_WEIGHT``. SSIM is
    its contrast-structure term alone, ``(2 s_xy + c2) / (s_xx + s_yy + c2)``, with c2 =
    ``contrast``. The gradient reaches only x.
    """
    result: Tensor = _WeightedDissimilarity.apply(x_bchw, y_bchw, weight_b1hw, contrast)  # type: ignore[no-untyped-call]
    return result


class _WeightedDissimilarity(torch.autograd.Function):
    """With an explicit gradient, computed in the forward pass, frame by frame on a CPU so that the
    moments of a frame stay in the CPU's cache. Three times as fast as autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, contrast: float) -> Tensor:
        frames = 1 if x.device.type == "cpu" else len(x)
        count = len(x) * x.shape[1] * (x.shape[2] - 2) * (x.shape[3] - 2)
        total, gradients = x.new_zeros(()), []
        parts = (torch.split(values, frames) for values in (x, y, weight))
        for x_part, y_part, weight_part in zip(*parts, strict=True):
            value, gradient = _dissimilarity(
                x_part, y_part, weight_part, contrast, ctx.needs_input_grad[0]
            )
            total = total + value
            gradients.append(gradient)
        ctx.count = count
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients))
        return total / count

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream[0] / ctx.count), None, None, None


def _dissimilarity(
    x: Tensor, y: Tensor, weight: Tensor, contrast: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The sum over all windows, and its gradient to x (if ``with_gradient``).

    With E the weighted mean over a window, A = 2 (E[xy] - E[x] E[y]) + c and D = E[xx] + E[yy] -
    E[x]^2 - E[y]^2 + c, SSIM is S = A / D, and its slopes are 2 / D by E[xy], -S / D by E[xx],
    and 2 (S E[x] - E[y]) / D by E[x].
    """
    # subtracting a common level changes nothing but keeps more digits for the differences
    level = y.mean(dim=(-2, -1), keepdim=True)
    x, y = x - level, y - level
    weight = weight + LEAST_WEIGHT
    weights = _box_sum(weight)
    share = 1 / weights
    x_weighted, y_weighted = x * weight, y * weight
    mean_x, mean_y = _box_sum(x_weighted) * share, _box_sum(y_weighted) * share
    product = _box_sum(x_weighted * y) * share
    squares = _box_sum(torch.addcmul(x_weighted * x, y_weighted, y)) * share
    above = 2 * torch.addcmul(product, mean_x, mean_y, value=-1) + contrast
    below = squares - mean_x.square() - mean_y.square() + contrast
    similarity = above / below
    mean_weight = weights / 9 - LEAST_WEIGHT
    total = ((1 - similarity) / 2).clamp(0, 1).mul_(mean_weight).sum()
    if not with_gradient:
        return total, total
    slope = (share * mean_weight) * (-0.5 * (similarity.abs() <= 1)) / below
    by_square = slope * similarity
    by_mean = 2 * torch.addcmul(by_square * mean_x, slope, mean_y, value=-1)
    gradient = _spread(by_mean)
    gradient.addcmul_(_spread(slope), y, value=2).addcmul_(_spread(by_square), x, value=-2)
    return total, gradient.mul_(weight)


def _box_sum(values: Tensor) -> Tensor:
    """Sum over 3x3 pixels inside the frame: ``[..., h - 2, w - 2]``. By shifts, which on a CPU is
    five times as fast as pooling."""
    rows = values[..., :-2, :] + values[..., 1:-1, :]
    rows += values[..., 2:, :]
    columns = rows[..., :-2] + rows[..., 1:-1]
    columns += rows[..., 2:]
    return columns


def _spread(values: Tensor) -> Tensor:
    """The transpose of :func:`_box_sum`: for each pixel the sum over its windows."""
    return _box_sum(functional.pad(values, (2, 2, 2, 2)))


def edge_aware_smoothness(depth_b1hw: Tensor, image_b3hw: Tensor) -> Tensor:
    """Mean slope of disparity, relative to the mean disparity of the frame and reduced at edges
    of the image: ``|dx d| exp(-|dx I|) + |dy d| exp(-|dy I|)``, a scalar.

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
    """Mean ``|dx f| + |dy f|`` of vector fields, ``[b]`` in the fields' units. With a weight in
    [0, 1], each slope is multiplied by the weights at its two ends."""
    along_x = field_b3hw[..., 1:] - field_b3hw[..., :-1]
    along_y = field_b3hw[..., 1:, :] - field_b3hw[..., :-1, :]
    if weight_b1hw is not None:
        along_x = along_x * (weight_b1hw[..., 1:] * weight_b1hw[..., :-1])
        along_y = along_y * (weight_b1hw[..., 1:, :] * weight_b1hw[..., :-1, :])
    return along_x.abs().mean(dim=(1, 2, 3)) + along_y.abs().mean(dim=(1, 2, 3))
