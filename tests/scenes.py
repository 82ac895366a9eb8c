"""Pairs of frames whose truth is exact: every quantity, and the columns of the batch beside them.

Frame 1 is camera 1, whose axes are those of the scene; something moves by ``v`` between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from taskray.data.world import CLASSES, World
from taskray.geometry.camera import rays, transform
from taskray.geometry.motion import rigid_motion
from taskray.geometry.warp import invert

Columns = dict[str, Tensor]
GROUND, CAR = 0, CLASSES.index("car")


@dataclass(frozen=True)
class Pair:
    """Exact truth of some pairs of frames."""

    truth: Columns
    batch: Columns


def texture(points_b3hw: Tensor, channels: int, phase: float) -> Tensor:
    """Smooth values in [0, 1] that stick to points, ``[b, channels, h, w]``."""
    x, y, z = (points_b3hw[:, axis] for axis in range(3))
    waves = [
        torch.sin(1.1 * x + (0.3 + 0.2 * c) * y + 0.4 * z + phase + c)
        + torch.sin((0.7 + 0.1 * c) * y - 0.5 * x + 2 * phase)
        for c in range(channels)
    ]
    return 0.5 + 0.25 * torch.stack(waves, dim=1)


def logits_of(is_object: Tensor, values: Tensor) -> Tensor:
    """Logits of the world's classes: what moves is a car, the rest is ground."""
    classes = torch.where(is_object, CAR, GROUND)[:, 0]
    one_hot = functional.one_hot(classes, len(CLASSES)).movedim(-1, 1)
    return 4.0 * one_hot + values


def moving_square(height: int = 24, width: int = 36, dtype: torch.dtype = torch.float64) -> Pair:
    """A square before a wall, both facing; everything moves by whole pixels, so that warping is
    exact: the wall by 2 to the right, the square by 5, and 1 down."""
    f, wall, near = 0.8 * width, 8.0, 5.0
    intrinsics = torch.tensor([[f, 0, 0.45 * width], [0, f, 0.5 * height], [0, 0, 1]], dtype=dtype)
    camera = torch.tensor([2 * wall / f, 0.0, 0.0], dtype=dtype)
    own = torch.tensor([5 * near / f, near / f, 0.0], dtype=dtype) - camera
    motion = torch.eye(4, dtype=dtype)
    motion[:3, 3] = camera
    truth: Columns = {"camera_motion": motion[None], "camera_motion_back_2": invert(motion[None])}
    batch: Columns = {"intrinsics": intrinsics[None]}
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    top, left, side = height // 4, width // 4, height // 3
    for suffix, back, (wall_at, row, column), sign in (
        ("", "", (0, top, left), 1.0),
        ("_2", "_back_2", (2, top + 1, left + 5), -1.0),
    ):
        inside = (i >= row) & (i < row + side) & (j >= column) & (j < column + side)
        inside = inside[None, None]
        grid = torch.stack([j, i, torch.zeros_like(i)]).to(dtype)[None] * 0.4
        of_wall = grid - 0.4 * torch.tensor([wall_at, 0, 0]).to(dtype)[:, None, None]
        of_square = grid - 0.4 * torch.tensor([column, row, 0]).to(dtype)[:, None, None]
        look = torch.where(inside, texture(of_square, 13, 1.0), texture(of_wall, 13, 0.0))
        batch["image" + suffix], extra = look[:, :3], look[:, 3:]
        truth["depth" + suffix] = torch.where(inside, near, wall).to(dtype)
        truth["object_motion" + back] = sign * own[:, None, None] * inside
        truth["segmentation" + suffix] = logits_of(inside, extra)
    return Pair(truth, batch)


def moving_ball(height: int = 48, width: int = 72, dtype: torch.dtype = torch.float64) -> Pair:
    """A ball of radius 3 m that moves before a facing wall, while the camera turns and moves."""
    f = 0.8 * width
    intrinsics = torch.tensor(
        [[[f, 0, 0.45 * width], [0, 1.1 * f, 0.52 * height], [0, 0, 1]]], dtype=dtype
    )
    motion = rigid_motion(
        torch.tensor([[0.01, -0.02, 0.015]], dtype=dtype),
        torch.tensor([[0.1, 0.05, -0.2]], dtype=dtype),
    )
    step = torch.tensor([0.3, -0.1, 0.2], dtype=dtype)
    truth: Columns = {"camera_motion": motion, "camera_motion_back_2": invert(motion)}
    batch: Columns = {"intrinsics": intrinsics}
    for number, suffix in enumerate(("", "_2")):
        to_scene = invert(motion) if number else torch.eye(4, dtype=dtype)[None]
        origin = to_scene[:, :3, 3, None, None]
        ray = transform(to_scene, rays(height, width, intrinsics)) - origin
        centre = torch.tensor([0.2, -0.1, 6.0], dtype=dtype) + number * step
        from_centre = origin - centre[:, None, None]
        a = ray.square().sum(1, keepdim=True)
        b = (ray * from_centre).sum(1, keepdim=True)
        inside = b.square() - a * (from_centre.square().sum(1, keepdim=True) - 9.0)
        hit = inside > 0
        depth = torch.where(
            hit, (-b - inside.clamp(min=0).sqrt()) / a, (8.0 - origin[:, 2:]) / ray[:, 2:]
        )
        points = origin + depth * ray
        on_ball = points - centre[:, None, None]
        look = torch.where(hit, texture(on_ball, 13, 1.0), texture(points, 13, 0.0))
        batch["image" + suffix], extra = look[:, :3], look[:, 3:]
        truth["depth" + suffix] = depth
        truth["segmentation" + suffix] = logits_of(hit, extra)
        own = -step if number else motion[0, :3, :3] @ step
        truth["object_motion_back_2" if number else "object_motion"] = own[:, None, None] * hit
    return Pair(truth, batch)


def world_pairs(domain: str = "sim", count: int = 4, height: int = 64, width: int = 96) -> Columns:
    """Pairs of the embedded world as a relation sees them, with true logits (one-hot)."""
    reader = World(
        domain=domain, split="test", num_samples=count, frames=2, height=height, width=width,
        frames_per_scene=2,
    )  # fmt: skip
    samples = [reader.load(row) for row in reader.index()]
    columns = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
    for suffix in ("", "_2"):
        columns["image" + suffix] = columns["image" + suffix].permute(0, 3, 1, 2).float() / 255
        classes = columns["segmentation" + suffix][:, 0].long()
        one_hot = functional.one_hot(classes, len(CLASSES)).movedim(-1, 1)
        columns["segmentation" + suffix] = one_hot.float()
    columns["camera_motion_back_2"] = invert(columns["camera_motion"])
    return columns
