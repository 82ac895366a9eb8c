"""Upright boxes in point clouds: change of axes, the points inside, the corners on the ground.

A box is ``x y z l w h theta`` and further values (class index, track id), in the axes of
:mod:`taskray.schema`: the centre, the extent along the heading, across and up, in metres, and
the heading about z in radians, from x towards y. Shape legend: ``m`` boxes, ``n`` points, ``d``
values of a box (7 or more); ``...`` any leading dimensions, the same for all arguments. Rows of
NaN stay rows of NaN. All functions but :func:`points_in_boxes` are differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def transform_boxes(boxes: Tensor, motion: Tensor) -> Tensor:
    """Boxes ``[..., m, d]`` in the axes after the rigid ``motion`` ``[..., 4, 4]``.

    Boxes stay upright: a motion that tilts z changes only their centres and headings. The new
    headings are in [-pi, pi].
    """
    rotation, shift = motion[..., None, :3, :3], motion[..., None, :3, 3]
    centre = (rotation * boxes[..., None, :3]).sum(dim=-1) + shift
    theta = boxes[..., 6:7]
    ahead = torch.cat([theta.cos(), theta.sin()], dim=-1)
    turned = (rotation[..., :2, :2] * ahead[..., None, :]).sum(dim=-1)
    heading = torch.atan2(turned[..., 1:], turned[..., :1])
    return torch.cat([centre, boxes[..., 3:6], heading, boxes[..., 7:]], dim=-1)


def points_in_boxes(points: Tensor, boxes: Tensor, margin: float = 0.0) -> Tensor:
    """Whether each point ``[..., n, 3 or more]`` is in each box ``[..., m, d]``; bool
    ``[..., n, m]``.

    ``margin`` metres are added to the box on every side. False for points and boxes of NaN.
    """
    x, y, z = (points[..., :, None, :3] - boxes[..., None, :, :3]).unbind(dim=-1)
    cos, sin = boxes[..., None, :, 6].cos(), boxes[..., None, :, 6].sin()
    offset = torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1)
    return (offset.abs() <= boxes[..., None, :, 3:6] / 2 + margin).all(dim=-1)


def ground_corners(boxes: Tensor) -> Tensor:
    """Corners of boxes ``[..., m, d]`` from above, ``[..., m, 4, 2]``: x and y in metres,
    anticlockwise from the front left corner."""
    along = boxes.new_tensor([0.5, -0.5, -0.5, 0.5]) * boxes[..., 3:4]
    across = boxes.new_tensor([0.5, 0.5, -0.5, -0.5]) * boxes[..., 4:5]
    cos, sin = boxes[..., 6:7].cos(), boxes[..., 6:7].sin()
    corners = torch.stack([cos * along - sin * across, sin * along + cos * across], dim=-1)
    return boxes[..., None, :2] + corners
