"""The solids of scenes, each in a unit cube around the origin, y pointing down.

Curved solids have fine meshes, which the ray caster uses only to find *which* face a ray hits;
point and normal are then computed from the exact surface (see ``render``). The meshes are
inscribed, so a ray that hits the mesh always hits the surface as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import trimesh
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
ShapeName = Literal["box", "wedge", "ball", "cylinder"]

FLAT, BALL, TUBE = 0, 1, 2
"""Surface of a face: a plane, the sphere x² + y² + z² = 1/4, or the tube x² + z² = 1/4."""


@dataclass(frozen=True)
class Shape:
    """A mesh: ``vertices`` ``[V, 3]``, ``faces`` ``[F, 3]``, ``surface`` ``[F]`` (FLAT ...)."""

    vertices: Floats
    faces: Integers
    surface: Integers


@cache
def shape(name: ShapeName) -> Shape:
    """The unit solid of that name. A ``wedge`` slopes from its top edge at z = +1/2 down to its
    bottom edge at z = -1/2; the axis of a ``cylinder`` is vertical."""
    if name == "box":
        mesh = trimesh.creation.box()
        surface = np.full(len(mesh.faces), FLAT)
    elif name == "wedge":
        corners = [[x, 0.5, z] for x in (-0.5, 0.5) for z in (-0.5, 0.5)]
        mesh = trimesh.Trimesh(
            [*corners, [-0.5, -0.5, 0.5], [0.5, -0.5, 0.5]],
            [
                [0, 1, 3],
                [0, 3, 2],
                [1, 3, 5],
                [1, 5, 4],
                [0, 2, 5],
                [0, 5, 4],
                [0, 1, 4],
                [2, 3, 5],
            ],
            process=False,
        )
        surface = np.full(len(mesh.faces), FLAT)
    elif name == "ball":
        mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.5)
        surface = np.full(len(mesh.faces), BALL)
    else:
        mesh = trimesh.creation.cylinder(radius=0.5, height=1.0, sections=24)
        mesh.vertices = mesh.vertices[:, [0, 2, 1]]
        is_cap = np.ptp(mesh.vertices[mesh.faces][:, :, 1], axis=1) < 1e-9
        surface = np.where(is_cap, FLAT, TUBE)
    return Shape(
        np.asarray(mesh.vertices, dtype=np.float64),
        np.asarray(mesh.faces, dtype=np.int64),
        surface.astype(np.int64),
    )
