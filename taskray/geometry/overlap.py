"""Overlap of upright boxes, and non-maximum suppression.

Boxes are ``x y z l w h theta`` and further values, as in :mod:`taskray.schema`.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 1e-9
"""Relative growth of one box of each pair, so that no two sides are on one line."""


def ground_overlap(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Shared area ``[n, m]`` of boxes from above, in square metres, float64; 0 for boxes of NaN.
    Not for gradients.
    """
    a, b = a_nd.double(), b_md.double()
    reach = a[:, None, 3:5].norm(dim=-1) / 2 + b[None, :, 3:5].norm(dim=-1) / 2
    near = torch.where((a[:, None, :2] - b[None, :, :2]).norm(dim=-1) < reach)
    area = a.new_zeros(len(a), len(b))
    area[near] = _shared_area(a[near[0]], b[near[1]])
    return area


def ground_iou(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Intersection over union ``[n, m]`` of boxes from above (BEV), in [0, 1], float64."""
    shared = ground_overlap(a_nd, b_md)
    area_a = a_nd[:, 3:5].double().prod(dim=1)[:, None]
    return shared / (area_a + b_md[:, 3:5].double().prod(dim=1) - shared).clamp(min=1e-12)


def height_overlap(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Shared height ``[n, m]`` of boxes, in metres."""
    a, b = a_nd[:, None], b_md[None]
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    return (top - bottom).clamp(min=0)


def non_maximum_suppression(boxes_nd: Tensor, scores_n: Tensor, max_overlap: float) -> Tensor:
    """Indices of the boxes to keep, best first: none overlaps a better kept box by more than
    ``max_overlap`` (:func:`ground_iou`). Of equal scores the first is better."""
    order = scores_n.argsort(descending=True, stable=True)
    rivals = ground_iou(boxes_nd[order], boxes_nd[order]) > max_overlap
    rivals = rivals.cpu()
    left = torch.ones(len(order), dtype=torch.bool)
    kept = []
    while left.any():
        best = int(left.int().argmax())
        kept.append(best)
        left &= ~rivals[best]
        left[best] = False  # a box without area does not overlap itself
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def _shared_area(a: Tensor, b: Tensor) -> Tensor:
    """Shared area ``[k]`` of box i of a and box i of b.

    It is the integral of (x dy - y dx) / 2 along the border of the intersection. That border
    consists of the parts of a's sides in b and of b's sides in a; in the axes of the other box
    such a part is found by clipping at two pairs of parallel lines. All boxes at once, without
    sorting corners.
    """
    half_a, half_b = a[:, None, 3:5] / 2, b[:, None, 3:5] / 2 * (1 + GROWTH)
    begin, end = _sides(a, half_a, of=b)
    swept = begin[..., 0] * end[..., 1] - begin[..., 1] * end[..., 0]
    area = (_fraction_inside(begin, end, half_b) * swept).sum(dim=-1)
    # around b's centre each of b's sides sweeps the same area
    within = _fraction_inside(*_sides(b, half_b, of=a), half_a).sum(dim=-1)
    return ((area + within * 2 * half_b[:, 0].prod(dim=-1)) / 2).clamp(min=0)


def _sides(boxes: Tensor, half: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends ``[k, 4, 2]`` of the sides of boxes of this half size, anticlockwise, in the axes
    of the boxes ``of``."""
    turn = (boxes[:, 6] - of[:, 6])[:, None]
    along = half.new_tensor([1.0, -1.0, -1.0, 1.0]) * half[..., 0]
    across = half.new_tensor([1.0, 1.0, -1.0, -1.0]) * half[..., 1]
    shift = (boxes[:, :2] - of[:, :2])[:, None]
    corners = _rotated(shift[..., 0], shift[..., 1], -of[:, 6:7]) + _rotated(along, across, turn)
    return corners, corners.roll(-1, dims=1)


def _rotated(x: Tensor, y: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def _fraction_inside(begin: Tensor, end: Tensor, half: Tensor) -> Tensor:
    """The fraction ``[k, 4]`` of each side that is in the box of this half size, in its axes."""
    step = end - begin
    step = torch.where(step == 0, 1e-300, step)
    first, second = (-half - begin) / step, (half - begin) / step
    enter = torch.minimum(first, second).amax(dim=-1).clamp(min=0)
    leave = torch.maximum(first, second).amin(dim=-1).clamp(max=1)
    return (leave - enter).clamp(min=0)
