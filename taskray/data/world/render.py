"""Ray casting: the first surface behind every pixel, with its exact distance and normal.

Embree finds the face that a ray hits; the point is then computed in double precision on the
face's plane, or on the sphere or tube that the face approximates. Ray directions have z = 1 in
camera axes, so the ray parameter *is* the depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

from taskray.data.world.scene import CLASSES, Scene
from taskray.data.world.shapes import FLAT, TUBE, Floats, Integers, shape

_ROUND = {"box": (0, 0, 0), "wedge": (0, 0, 0), "ball": (1, 1, 1), "cylinder": (1, 0, 1)}
"""The axes along which a solid is round: there, it contains what is within 1/2 of its centre."""


@dataclass(frozen=True)
class Hits:
    """The first hits of N rays: ray parameter ``t`` ``[N]`` (inf: no hit), ``points`` and
    ``normals`` ``[N, 3]`` in world axes (normals against the ray), ``part`` ``[N]`` (-1: none)."""

    t: Floats
    points: Floats
    normals: Floats
    part: Integers


class Snapshot:
    """A scene at the time of one frame, prepared for ray casting."""

    def __init__(self, scene: Scene, time: int) -> None:
        parts = [(index, part) for index, body in enumerate(scene.bodies) for part in body.parts]
        self.body_of_part = np.array([index for index, _ in parts])
        self.class_of_part = np.array([CLASSES.index(scene.bodies[i].label) for i, _ in parts])
        self.poses = np.stack([body.pose(time) for body in scene.bodies])
        matrices = np.stack([self.poses[index] @ part.matrix() for index, part in parts])
        self._to_unit = np.linalg.inv(matrices)
        self._round = np.array([_ROUND[part.shape] for _, part in parts])
        shapes = [shape(part.shape) for _, part in parts]
        vertices = np.concatenate(
            [s.vertices @ m[:3, :3].T + m[:3, 3] for s, m in zip(shapes, matrices, strict=True)]
        )
        starts = np.cumsum([0, *(len(s.vertices) for s in shapes[:-1])])
        faces = np.concatenate([s.faces + n for s, n in zip(shapes, starts, strict=True)])
        self._part = np.repeat(np.arange(len(parts)), [len(s.faces) for s in shapes])
        self._surface = np.concatenate([s.surface for s in shapes])
        self._corner = vertices[faces[:, 0]]
        self._normal = np.cross(
            vertices[faces[:, 1]] - self._corner, vertices[faces[:, 2]] - self._corner
        )
        self._normal /= np.linalg.norm(self._normal, axis=1, keepdims=True)
        self._embree = EmbreeScene()
        TriangleMesh(self._embree, vertices.astype(np.float32), faces.astype(np.int32))

    def cast(self, origins: Floats, directions: Floats) -> Hits:
        """The first hits of rays ``[N, 3]`` (directions of any length)."""
        face = self._first_face(origins, directions)
        hit = np.flatnonzero(face >= 0)
        face, o, d = face[hit], origins[hit], directions[hit]
        n = self._normal[face]
        with np.errstate(divide="ignore", invalid="ignore"):
            t = _dot(self._corner[face] - o, n) / _dot(d, n)
        curved = np.flatnonzero(self._surface[face] != FLAT)
        if len(curved):
            t[curved], n[curved] = self._on_curved(face[curved], o[curved], d[curved])
        n *= -np.sign(_dot(n, d))[:, None]

        # The solution may be undefined for a ray that grazes its face: that ray has no hit.
        sound = np.isfinite(t) & (t > 0)
        hit, t, n, face = hit[sound], t[sound], n[sound], face[sound]
        number = len(origins)
        hits = Hits(
            np.full(number, np.inf),
            np.zeros((number, 3)),
            np.zeros((number, 3)),
            np.full(number, -1),
        )
        hits.t[hit], hits.normals[hit], hits.part[hit] = t, n, self._part[face]
        hits.points[hit] = o[sound] + t[:, None] * d[sound]
        return hits

    def blocked(self, origins: Floats, targets: Floats) -> NDArray[np.bool_]:
        """Whether a surface is between two points; ``[N]`` (for shadows: flat faces only)."""
        directions = targets - origins
        face = self._first_face(origins, directions)
        n, corner = self._normal[face], self._corner[face]
        with np.errstate(divide="ignore", invalid="ignore"):
            t = _dot(corner - origins, n) / _dot(directions, n)
        return (face >= 0) & (t < 1)

    def within(self, positions: Floats, margin: float) -> NDArray[np.bool_]:
        """Whether points ``[N, 3]`` are inside a part enlarged by ``margin`` metres on all sides;
        ``[N]``. A wedge counts as the box around it."""
        unit = np.einsum("pij,nj->npi", self._to_unit[:, :3, :3], positions)
        unit += self._to_unit[:, :3, 3]
        size = 1 / np.linalg.norm(self._to_unit[:, :3, :3], axis=2)
        unit *= size / (size + 2 * margin)
        in_box = (np.abs(unit) < 0.5).all(axis=2)
        return np.asarray((in_box & (np.linalg.norm(self._round * unit, axis=2) < 0.5)).any(axis=1))

    def _first_face(self, origins: Floats, directions: Floats) -> Integers:
        found = self._embree.run(
            np.ascontiguousarray(origins, dtype=np.float32),
            np.ascontiguousarray(directions, dtype=np.float32),
        )
        return np.asarray(found, dtype=np.int64)

    def _on_curved(self, face: Integers, o: Floats, d: Floats) -> tuple[Floats, Floats]:
        """The ray parameters where rays enter the sphere or tube of a face, and the unit normals.
        Affine maps keep the ray parameter, so the quadratic is solved for the unit solid."""
        to_unit = self._to_unit[self._part[face]]
        start = _apply(to_unit[:, :3, :3], o) + to_unit[:, :3, 3]
        along = _apply(to_unit[:, :3, :3], d)
        axes = np.ones_like(start)
        axes[self._surface[face] == TUBE, 1] = 0.0
        a, b = _dot(axes * along, along), _dot(axes * start, along)
        c = _dot(axes * start, start) - 0.25
        t = (-b - np.sqrt(np.maximum(b * b - a * c, 0.0))) / a
        gradient = axes * (start + t[:, None] * along)
        normal = np.einsum("nji,nj->ni", to_unit[:, :3, :3], gradient)
        return t, normal / np.linalg.norm(normal, axis=1, keepdims=True)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("ni,ni->n", a, b))


def _apply(matrices: Floats, vectors: Floats) -> Floats:
    return np.asarray(np.einsum("nij,nj->ni", matrices, vectors))
