"""Ground truth of a frame and of the motion between two, as columns of ``schema``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taskray.data.world.appearance import Look
from taskray.data.world.render import Hits, Snapshot
from taskray.data.world.scene import CLASSES
from taskray.data.world.shapes import Floats, Integers
from taskray.data.world.views import View, pixel_rays

Arrays = dict[str, NDArray[np.generic]]
_EDGE = 0.1
"""Bend of inverse depth, relative to it, that makes a depth edge (a plane has none)."""


@dataclass(frozen=True)
class Frame:
    """One camera's frame of a scene: the hits of its pixels."""

    view: View
    snapshot: Snapshot
    hits: Hits
    size: tuple[int, int]
    focal: float

    @property
    def body(self) -> Integers:
        """The body of every pixel, ``[H * W]``; -1: none."""
        return np.where(self.hits.part >= 0, self.snapshot.body_of_part[self.hits.part], -1)


def take_frame(view: View, snapshot: Snapshot, size: tuple[int, int], focal: float) -> Frame:
    """Cast one ray through every pixel centre of a frame of ``size`` (h, w); ``focal`` is the
    focal length in frame widths."""
    directions = pixel_rays(*size, focal) @ view.rotation.T
    origins = np.broadcast_to(view.position, directions.shape)
    return Frame(view, snapshot, snapshot.cast(origins, directions), size, focal)


def image_of(frame: Frame, look: Look, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The colour frame, ``[H, W, 3]``."""
    light = look.shade(frame.hits, frame.snapshot, frame.focal * frame.size[1])
    exposed = look.expose(light.reshape(*frame.size, 3), rng)
    return np.round(255 * exposed).astype(np.uint8)


def labels_of(frame: Frame) -> Arrays:
    """depth, normals, segmentation and edges of a frame."""
    hits = frame.hits
    depth = np.where(np.isfinite(hits.t), hits.t, 0.0).reshape(1, *frame.size)
    classes = np.where(
        hits.part >= 0, frame.snapshot.class_of_part[hits.part], CLASSES.index("sky")
    )
    return {
        "depth": depth.astype(np.float32),
        "normals": _channels(hits.normals @ frame.view.rotation, frame.size),
        "segmentation": classes.reshape(1, *frame.size).astype(np.uint8),
        "edges": _edges(depth[0], frame.body.reshape(frame.size)),
    }


def motion_of(frame: Frame, other: Frame) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Object motion ``[3, H, W]`` on the pixels of ``frame``, towards ``other`` and in the axes
    of its camera, and the motion mask ``[1, H, W]``."""
    hits = frame.hits
    step = other.snapshot.poses @ np.linalg.inv(frame.snapshot.poses)
    moving = np.abs(step - np.eye(4)).max(axis=(1, 2)) > 1e-9
    mask = (hits.part >= 0) & moving[frame.body]
    moved = np.zeros_like(hits.points)
    own = step[frame.body[mask]]
    moved[mask] = np.einsum("nij,nj->ni", own[:, :3, :3], hits.points[mask]) + own[:, :3, 3]
    moved[mask] -= hits.points[mask]
    delta = _channels(moved @ other.view.rotation, frame.size)
    return delta, mask.reshape(1, *frame.size).astype(np.uint8)


def camera_motion(frame: Frame, other: Frame) -> NDArray[np.float32]:
    """4x4, from camera axes of ``frame`` to those of ``other``."""
    motion = other.view.matrix() @ np.linalg.inv(frame.view.matrix())
    return motion.astype(np.float32)


def _channels(vectors: Floats, size: tuple[int, int]) -> NDArray[np.float32]:
    return np.ascontiguousarray(vectors.T.reshape(3, *size), dtype=np.float32)


def _edges(depth: Floats, body: Integers) -> NDArray[np.uint8]:
    """1 where the body changes to the next row or column, or inverse depth bends."""
    edges = np.zeros(depth.shape, dtype=bool)
    edges[:-1] |= body[:-1] != body[1:]
    edges[:, :-1] |= body[:, :-1] != body[:, 1:]
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=depth > 0)
    for bend, inner in (
        (inverse[2:] - 2 * inverse[1:-1] + inverse[:-2], np.s_[1:-1]),
        (inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2], np.s_[:, 1:-1]),
    ):
        edges[inner] |= np.abs(bend) > _EDGE * inverse[inner]
    return edges[None].astype(np.uint8)
