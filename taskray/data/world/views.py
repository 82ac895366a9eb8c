"""Camera positions and their motion in a clip of a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from taskray.data.world.render import Snapshot
from taskray.data.world.scene import Scene, yaw_matrix
from taskray.data.world.shapes import Floats

CLIP_LENGTH = 3
"""Frames of a clip, of which a dataset uses 1, 2 or 3."""
EYE_HEIGHT = (1.4, 1.6)
MOUNT_HEIGHT = (1.6, 1.8)
"""Range of a LiDAR's height above the ground, in metres; drawn once for each clip."""
FOCAL_LENGTH = 0.8
"""Default, in frame widths: 64 degrees across."""
CLEARANCE = 0.2
"""Metres between a camera, or a sensor above it, and the nearest surface in any direction."""


@dataclass(frozen=True)
class View:
    """A camera: ``rotation`` ``[3, 3]`` from camera to world axes, ``position`` ``[3]``."""

    rotation: Floats
    position: Floats

    def matrix(self) -> Floats:
        """4x4, world to camera."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.rotation.T
        matrix[:3, 3] = -self.rotation.T @ self.position
        return matrix


def camera_matrix(height: int, width: int, focal: float = FOCAL_LENGTH) -> Floats:
    """Intrinsics of a frame: square pixels, centred, ``focal`` in frame widths."""
    f = focal * width
    return np.array([[f, 0.0, (width - 1) / 2], [0.0, f, (height - 1) / 2], [0.0, 0.0, 1.0]])


def pixel_rays(height: int, width: int, focal: float = FOCAL_LENGTH) -> Floats:
    """Rays of all pixels in camera axes with z = 1, ``[H * W, 3]``."""
    k = camera_matrix(height, width, focal)
    row, column = np.mgrid[:height, :width]
    x, y = (column - k[0, 2]) / k[0, 0], (row - k[1, 2]) / k[1, 1]
    return np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)


def clip_views(
    rng: np.random.Generator, scene: Scene, snapshots: tuple[Snapshot, ...]
) -> list[View]:
    """Cameras of one clip, one per snapshot.

    A clip is drawn again while a camera is too close to a surface or sees only a near wall; after
    ten draws the one with the most free space is used. A clip with a camera inside a body, or
    nearer than ``CLEARANCE`` to one, is never used.
    """
    most, best = 0.0, None
    draws = 0
    while best is None or (most < 1.0 and draws < 10):
        views = _draw(rng, scene)
        room = min(_roominess(v, s) for v, s in zip(views, snapshots, strict=True))
        if room > most:
            most, best = room, views
        draws += 1
    return best


def _draw(rng: np.random.Generator, scene: Scene) -> list[View]:
    position = np.array(
        [rng.uniform(*scene.camera_x), -rng.uniform(*EYE_HEIGHT), rng.uniform(*scene.camera_z)]
    )
    yaw, pitch = rng.uniform(*scene.camera_yaw), rng.uniform(*scene.camera_pitch)
    rotation = yaw_matrix(yaw) @ _tilt(-pitch)
    views = [View(rotation, position)]
    for _ in range(CLIP_LENGTH - 1):
        ahead = yaw_matrix(yaw)[:, 2]
        sway = rng.normal(0.0, 1.0, 3) * (0.03, 0.01, 0.0)
        position = position + rng.uniform(0.15, 0.4) * ahead + sway
        rotation = rotation @ _small_rotation(rng.normal(0.0, np.radians(0.5), 3))
        views.append(View(rotation, position))
    return views


def _roominess(view: View, snapshot: Snapshot) -> float:
    """At least 1 if the smallest depth is 0.6 m or more and the median 2.5 m or more; 0 inside a
    body, where the rays may meet no surface, and nearer to one than ``CLEARANCE``."""
    if snapshot.within(_sensor_positions(view), CLEARANCE).any():
        return 0.0
    probes = pixel_rays(8, 12) @ view.rotation.T
    depth = snapshot.cast(np.broadcast_to(view.position, probes.shape), probes).t
    return min(float(depth.min()) / 0.6, float(np.median(depth)) / 2.5)


def _sensor_positions(view: View) -> Floats:
    """The camera, and the lowest and highest place of a LiDAR above it, ``[3, 3]``."""
    positions = np.tile(view.position, (3, 1))
    positions[1:, 1] = -np.asarray(MOUNT_HEIGHT)
    return positions


def _tilt(angle: float) -> Floats:
    """Rotation about the x axis; a positive angle is upwards."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def _small_rotation(angles: Floats) -> Floats:
    """Rotation by a vector of angles (Rodrigues)."""
    x, y, z = angles
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    angle = float(np.linalg.norm(angles))
    if angle < 1e-12:
        return np.eye(3)
    unit = cross / angle
    return np.asarray(np.eye(3) + np.sin(angle) * unit + (1 - np.cos(angle)) * unit @ unit)
