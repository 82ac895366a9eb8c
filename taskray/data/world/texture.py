"""Procedural textures in the axes of a body, so that they move with it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from taskray.data.world.shapes import Floats, Integers

_LATTICE = 32
_OCTAVES = 4


class _Pattern(NamedTuple):
    """Cells of a plane with a dark part along each side: joints (either) or panes (both)."""

    width: float
    height: float
    dark_u: float
    dark_v: float
    panes: bool = False
    staggered: bool = False


_PATTERNS = {
    "plain": _Pattern(1.0, 1.0, 0.0, 0.0),
    "bricks": _Pattern(0.5, 0.25, 0.06, 0.12, staggered=True),
    "tiles": _Pattern(0.6, 0.6, 0.07, 0.07),
    "planks": _Pattern(2.4, 0.25, 0.02, 0.12, staggered=True),
    "windows": _Pattern(1.6, 2.2, 0.6, 0.6, panes=True),
    "stripes": _Pattern(1e3, 0.5, 0.0, 0.5),
}
_USUAL: dict[str, tuple[str, ...]] = {
    "ground": ("plain", "plain", "tiles", "planks"),
    "wall": ("plain", "plain", "bricks", "windows", "stripes"),
    "ceiling": ("plain", "tiles"),
    "block": ("plain", "planks", "stripes"),
    "ramp": ("plain", "planks", "bricks"),
}


class Textures:
    """A texture for every part of a scene: a regular pattern times fractal noise."""

    def __init__(self, rng: np.random.Generator, labels: list[str]) -> None:
        number = len(labels)
        self._lattice = rng.uniform(-1, 1, _LATTICE**3)
        self._offset = rng.uniform(0, _LATTICE, (number, 3))
        self._frequency = rng.uniform(0.8, 2.5, number)
        self._contrast = rng.uniform(0.05, 0.35, number)
        names = [str(rng.choice(_USUAL.get(label, ("plain", "stripes")))) for label in labels]
        self._pattern = np.array([_PATTERNS[name] for name in names], dtype=np.float64)
        self._pattern[:, :2] *= rng.uniform(0.7, 1.4, (number, 1))
        self._relief = rng.uniform(0.15, 0.5, number)

    def __call__(self, part: Integers, points: Floats, normals: Floats, pixel: Floats) -> Floats:
        """Brightness factors ``[N, 1]`` around 1 for parts ``[N]`` at points with normals
        ``[N, 3]`` in body axes, where a pixel is ``pixel`` metres wide ``[N]``.

        Detail finer than a pixel is faded out, because it would alias.
        """
        noise = np.zeros(len(part))
        for octave in range(_OCTAVES):
            frequency = self._frequency[part] * 2.0**octave
            visible = np.flatnonzero(pixel * frequency < 1.0)
            where = points[visible] * frequency[visible, None] + self._offset[part[visible]]
            fade = 0.65**octave * _fade(1.0 / frequency[visible], pixel[visible])
            noise[visible] += fade * _value_noise(self._lattice, where + 7.3 * octave)
        joints = self._relief[part] * self._dark(part, points, normals, pixel)
        return ((1.0 + self._contrast[part] * noise) * (1.0 - joints))[:, None]

    def _dark(self, part: Integers, points: Floats, normals: Floats, pixel: Floats) -> Floats:
        """How dark the pattern is, 0 to 1, on the plane that the surface is closest to."""
        axis = np.abs(normals).argmax(axis=1)
        u = np.where(axis == 0, points[:, 2], points[:, 0])
        v = np.where(axis == 1, points[:, 2], points[:, 1])
        width, height, dark_u, dark_v, panes, staggered = self._pattern[part].T
        row = v / height
        column = u / width + 0.5 * staggered * np.floor(row)
        in_u, in_v = column % 1.0 < dark_u, row % 1.0 < dark_v
        dark = np.where(panes > 0, in_u & in_v, in_u | in_v)
        return np.asarray(dark * _fade(height, pixel))


def _fade(detail: Floats, pixel: Floats) -> Floats:
    """1 if a detail is several pixels wide, 0 if it is smaller than one."""
    return np.clip(detail / (3.0 * pixel) - 0.33, 0.0, 1.0)


def _value_noise(lattice: Floats, points: Floats) -> Floats:
    """Smoothly interpolated random values on a repeating grid of unit cells, in [-1, 1]."""
    cell = np.floor(points)
    f = points - cell
    f = f * f * (3 - 2 * f)
    low = cell.astype(np.int64) % _LATTICE
    high = (low + 1) % _LATTICE
    x = (low[:, 0] * _LATTICE**2, high[:, 0] * _LATTICE**2)
    y = (low[:, 1] * _LATTICE, high[:, 1] * _LATTICE)
    z = (low[:, 2], high[:, 2])
    planes = []
    for i in range(2):
        lines = [
            (1 - f[:, 2]) * lattice[x[i] + y[j] + z[0]] + f[:, 2] * lattice[x[i] + y[j] + z[1]]
            for j in range(2)
        ]
        planes.append((1 - f[:, 1]) * lines[0] + f[:, 1] * lines[1])
    return np.asarray((1 - f[:, 0]) * planes[0] + f[:, 0] * planes[1])
