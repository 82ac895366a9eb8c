"""How far upright boxes overlap, and which of many overlapping ones to keep.

Boxes are ``x y z l w h theta`` and whatever follows, as in :mod:`taskray.schema`.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 1e-9
"""Relative. By so much one box of each pair is grown: so no two sides lie on one line."""


def ground_overlap(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Area ``[n, m]`` in square metres, float64, that boxes share, seen from above.

    The area is the integral of (x dy - y dx) / 2 along the border of what two boxes share. That
    border is made of the parts of a's sides that lie in b, and of b's sides that lie in a; in the
    axes of the other box such a part is found by cutting at two pairs of parallel lines. All
    pairs at once, without sorting corners. NaN boxes share NaN or nothing. No gradient is meant
    to pass.
    """
    a, b = a_nd.double(), b_md.double()
    half_a = a[:, None, 3:5] / 2
    half_b = b[None, :, 3:5] / 2 * (1 + GROWTH)
    begin, end = _sides(half_a, _turns(a[:, None], b[None]))
    begin, end = begin + _offset(a[:, None], b[None]), end + _offset(a[:, None], b[None])
    swept = begin[..., 0] * end[..., 1] - begin[..., 1] * end[..., 0]
    area = (_inside(begin, end, half_b) * swept).sum(dim=-1)
    begin, end = _sides(half_b, _turns(b[None], a[:, None]))
    shift = _offset(b[None], a[:, None])
    within = _inside(begin + shift, end + shift, half_a).sum(dim=-1)
    return ((area + within * 2 * half_b.prod(dim=-1)) / 2).clamp(min=0)


def ground_iou(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Overlap over union ``[n, m]`` of boxes seen from above (BEV), in [0, 1], float64."""
    shared = ground_overlap(a_nd, b_md)
    area_a = a_nd[:, 3:5].double().prod(dim=1)[:, None]
    return shared / (area_a + b_md[:, 3:5].double().prod(dim=1) - shared).clamp(min=1e-12)


def volume_iou(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Overlap over union ``[n, m]`` of boxes in space (3D), in [0, 1], float64."""
    a, b = a_nd.double(), b_md.double()
    shared = ground_overlap(a, b) * height_overlap(a, b)
    volume_a = a[:, 3:6].prod(dim=1)[:, None]
    return shared / (volume_a + b[:, 3:6].prod(dim=1) - shared).clamp(min=1e-12)


def height_overlap(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Metres ``[n, m]`` of height that boxes share."""
    a, b = a_nd[:, None], b_md[None]
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    return (top - bottom).clamp(min=0)


def non_maximum_suppression(boxes_nd: Tensor, scores_n: Tensor, max_overlap: float) -> Tensor:
    """Indices of the boxes to keep, best first: none overlaps a better one that is kept by more
    than ``max_overlap`` (:func:`ground_iou`). Of equal scores the first is the better."""
    order = scores_n.argsort(descending=True, stable=True)
    rivals = ground_iou(boxes_nd[order], boxes_nd[order]) > max_overlap
    rivals = rivals.cpu()
    left = torch.ones(len(order), dtype=torch.bool)
    kept = []
    while left.any():
        best = int(left.int().argmax())
        kept.append(best)
        left &= ~rivals[best]
        left[best] = False  # a box of no area does not overlap itself
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def _turns(boxes: Tensor, of: Tensor) -> Tensor:
    """Headings of boxes in the axes of other ones."""
    return boxes[..., 6] - of[..., 6]


def _offset(boxes: Tensor, of: Tensor) -> Tensor:
    """Centres ``[..., 1, 2]`` of boxes in the axes of other ones."""
    x, y = (boxes[..., :2] - of[..., :2]).unbind(dim=-1)
    cos, sin = of[..., 6].cos(), of[..., 6].sin()
    return torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1)[..., None, :]


def _sides(half: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends ``[..., 4, 2]`` of a box's sides around its centre, anticlockwise."""
    cos, sin = turn.cos()[..., None], turn.sin()[..., None]
    along = half.new_tensor([1.0, -1.0, -1.0, 1.0]) * half[..., :1]
    across = half.new_tensor([1.0, 1.0, -1.0, -1.0]) * half[..., 1:]
    corners = torch.stack([cos * along - sin * across, sin * along + cos * across], dim=-1)
    return corners, corners.roll(-1, dims=-2)


def _inside(begin: Tensor, end: Tensor, half: Tensor) -> Tensor:
    """The fraction ``[..., 4]`` of each side that lies in the upright box of this half size."""
    step = end - begin
    step = torch.where(step == 0, 1e-300, step)
    half = half[..., None, :]
    first, second = (-half - begin) / step, (half - begin) / step
    enter = torch.minimum(first, second).amax(dim=-1).clamp(min=0)
    leave = torch.maximum(first, second).amin(dim=-1).clamp(max=1)
    return (leave - enter).clamp(min=0)
