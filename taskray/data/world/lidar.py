"""LiDAR sweeps of the world's scenes, and exact boxes around movable bodies.

The sensor is level, above the camera, with the same heading. Its axes are those of ``schema``:
x forward, y left, z up. A sweep is one instant: nothing moves while the beams rotate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from taskray.data.readers.point_clouds import nearest_boxes, pad, thin_out
from taskray.data.readers.reader import Sample
from taskray.data.world.render import Snapshot
from taskray.data.world.scene import CLASSES, MOVABLE, Body, Part, Scene, yaw_matrix
from taskray.data.world.shapes import Floats, Integers, shape
from taskray.data.world.views import MOUNT_HEIGHT, View
from taskray.errors import InputError

REFLECTANCE: dict[str, float] = {
    "ground": 0.20, "wall": 0.35, "ceiling": 0.55, "block": 0.45, "pillar": 0.30, "ramp": 0.40,
    "ball": 0.65, "pedestrian": 0.25, "car": 0.75,
}  # fmt: skip
"""Fraction of the light that a class reflects; ``sky`` reflects none."""
REFLECTANCE_NOISE = 0.03


class LidarSensor(BaseModel):
    """A spinning LiDAR: ``beams`` lasers above each other, fired ``azimuth_steps`` times a turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beams: Annotated[int, Field(ge=1, le=256)] = 32
    """Lasers, spread evenly from ``lowest_deg`` to ``highest_deg``."""
    azimuth_steps: Annotated[int, Field(ge=8, le=4096)] = 256
    """Shots of each laser in a full turn; every sweep begins at a random angle."""
    lowest_deg: Annotated[float, Field(gt=-90, lt=90)] = -25.0
    """Elevation of the lowest laser in degrees; negative is downwards."""
    highest_deg: Annotated[float, Field(gt=-90, lt=90)] = 3.0
    """Elevation of the highest laser in degrees."""
    max_range: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    """Metres beyond which there are no returns."""
    range_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """Standard deviation of the measured range, in metres."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Probability that a return is lost."""

    @model_validator(mode="after")
    def _ordered(self) -> LidarSensor:
        if self.lowest_deg > self.highest_deg:
            raise InputError(
                "highest_deg",
                f"got {self.highest_deg:g}, expected at least lowest_deg, {self.lowest_deg:g}",
            )
        return self

    def directions(self, phase: float) -> Floats:
        """Unit vectors of all shots of a turn, ``[beams * azimuth_steps, 3]``, sensor axes;
        ``phase`` in [0, 1) rotates them by that part of an azimuth step."""
        up = np.radians(np.linspace(self.lowest_deg, self.highest_deg, self.beams))[:, None]
        turn = 2 * np.pi * (np.arange(self.azimuth_steps) + phase) / self.azimuth_steps - np.pi
        flat = np.cos(up)
        x, y = flat * np.cos(turn), flat * np.sin(turn)
        return np.stack([x, y, np.broadcast_to(np.sin(up), x.shape)], axis=-1).reshape(-1, 3)


@dataclass(frozen=True)
class Sweep:
    """Returns of one turn: ``points`` ``[N, 4]`` float32 in sensor axes, as in ``schema``, and
    the ``body`` of each, ``[N]``."""

    points: np.ndarray
    body: Integers


def lidar_columns(
    scene: Scene,
    snapshots: Sequence[Snapshot],
    views: Sequence[View],
    sensor: LidarSensor,
    rng: np.random.Generator,
    *,
    num_points: int,
    max_boxes: int,
    min_box_points: int,
) -> Sample:
    """points, boxes and lidar_motion of the frames of ``views``, padded with NaN.

    Of more returns than ``num_points`` a random subset is kept, of more boxes the nearest
    ``max_boxes``; a box with fewer than ``min_box_points`` of the returns is left out.
    """
    poses = sensor_poses(views, float(rng.uniform(*MOUNT_HEIGHT)))
    streams = rng.spawn(len(poses))
    sample: Sample = {}
    for number, (pose, snapshot, own) in enumerate(zip(poses, snapshots, streams, strict=False)):
        suffix = f"_{number + 1}" if number else ""
        sweep = take_sweep(pose, snapshot, sensor, own)
        kept = thin_out(len(sweep.points), num_points, own)
        returns = np.bincount(sweep.body[kept], minlength=len(scene.bodies))
        boxes = boxes_of(scene, snapshot, pose)
        boxes = boxes[returns[boxes[:, 8].astype(int)] >= min_box_points]
        sample["points" + suffix] = pad(sweep.points[kept], num_points)
        sample["boxes" + suffix] = pad(nearest_boxes(boxes, max_boxes), max_boxes)
        if number + 1 < len(poses):
            motion = np.linalg.inv(poses[number + 1]) @ pose
            sample["lidar_motion" + suffix] = motion.astype(np.float32)
    return sample


def sensor_poses(views: Sequence[View], height: float) -> list[Floats]:
    """4x4 matrices, sensor to world: level, ``height`` metres above the ground at the positions
    of the cameras, x along their heading."""
    poses = []
    for view in views:
        ahead = view.rotation[:, 2]
        turn = yaw_matrix(float(np.arctan2(ahead[0], ahead[2])))
        pose = np.eye(4)
        pose[:3, :3] = np.stack([turn[:, 2], -turn[:, 0], -turn[:, 1]], axis=1)
        pose[:3, 3] = view.position[0], -height, view.position[2]
        poses.append(pose)
    return poses


def take_sweep(
    pose: Floats, snapshot: Snapshot, sensor: LidarSensor, rng: np.random.Generator
) -> Sweep:
    """The returns of one turn of the sensor."""
    local = sensor.directions(rng.random())
    origins = np.broadcast_to(pose[:3, 3], local.shape)
    hits = snapshot.cast(origins, local @ pose[:3, :3].T)
    lost = rng.random(len(local)) < sensor.dropout
    distance = hits.t + sensor.range_noise * rng.standard_normal(len(local))
    sheen = REFLECTANCE_NOISE * rng.standard_normal(len(local))
    # by the true range: noise must not decide which points are out of range
    back = np.flatnonzero((hits.t <= sensor.max_range) & (distance > 0) & ~lost)
    part = hits.part[back]
    base = np.array([REFLECTANCE.get(name, 0.0) for name in CLASSES])
    reflectance = np.clip(base[snapshot.class_of_part[part]] + sheen[back], 0.0, 1.0)
    where = local[back] * distance[back, None]
    points = np.concatenate([where, reflectance[:, None]], axis=1).astype(np.float32)
    return Sweep(points, snapshot.body_of_part[part])


def boxes_of(scene: Scene, snapshot: Snapshot, pose: Floats) -> Floats:
    """Boxes ``[N, 9]`` around all movable bodies, visible or not, in the axes of the sensor at
    ``pose``; the track id is the body's number in the scene."""
    to_sensor = np.linalg.inv(pose)
    boxes = []
    for number, body in enumerate(scene.bodies):
        if body.label not in MOVABLE:
            continue
        low, high = extent_of(body)
        own = to_sensor @ snapshot.poses[number]
        centre = own[:3, :3] @ (low + high) / 2 + own[:3, 3]
        theta = np.arctan2(own[1, 2], own[0, 2])  # direction of the body's z axis, its heading
        width, height, length = high - low
        row = [*centre, length, width, height, theta, CLASSES.index(body.label), number]
        boxes.append(row)
    return np.array(boxes, dtype=np.float64).reshape(-1, 9)


def extent_of(body: Body) -> tuple[Floats, Floats]:
    """Lowest and highest coordinates ``[3]`` of a body's exact surfaces, in the body's axes."""
    bounds = np.array([_part_extent(part) for part in body.parts])
    return bounds[:, 0].min(axis=0), bounds[:, 1].max(axis=0)


def _part_extent(part: Part) -> tuple[Floats, Floats]:
    matrix, centre = part.matrix()[:3, :3], np.asarray(part.centre)
    if part.shape == "ball":
        reach = np.linalg.norm(matrix, axis=1) / 2
    elif part.shape == "cylinder":
        reach = (np.abs(matrix[:, 1]) + np.hypot(matrix[:, 0], matrix[:, 2])) / 2
    else:
        corners = shape(part.shape).vertices @ matrix.T + centre
        return corners.min(axis=0), corners.max(axis=0)
    return centre - reach, centre + reach
