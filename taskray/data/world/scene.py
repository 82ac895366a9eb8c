"""Scenes: bodies made of parts, their places and motions, in a world with y pointing down.

The ground is y = 0, so a camera at eye height has y = -1.5. Units are metres, radians and, for
motion, frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from taskray.data.world.shapes import Floats, ShapeName

Domain = Literal["sim", "real"]
Kind = Literal["any", "rooms", "streets", "traffic"]
CLASSES: tuple[str, ...] = (
    "ground", "wall", "ceiling", "block", "pillar", "ramp", "ball", "pedestrian", "car", "sky",
)  # fmt: skip
MOVABLE: frozenset[str] = frozenset({"ball", "pedestrian", "car"})


def yaw_matrix(angle: float) -> Floats:
    """Rotation about the vertical axis; a positive angle rotates forward (z) to the right (x)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


@dataclass(frozen=True)
class Part:
    """A unit solid scaled to ``size``, rotated by ``turn``, with its centre at ``centre`` in the
    body's axes."""

    shape: ShapeName
    size: tuple[float, float, float]
    centre: tuple[float, float, float]
    turn: Floats = field(default_factory=lambda: np.eye(3))

    def matrix(self) -> Floats:
        """4x4, from the unit solid to the axes of the body."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.turn * np.asarray(self.size)
        matrix[:3, 3] = self.centre
        return matrix


@dataclass(frozen=True)
class Body:
    """Parts that move together. ``velocity`` is in metres and ``spin`` in radians per frame."""

    label: str
    parts: tuple[Part, ...]
    position: tuple[float, float] = (0.0, 0.0)
    yaw: float = 0.0
    velocity: tuple[float, float] = (0.0, 0.0)
    spin: float = 0.0

    def pose(self, time: int) -> Floats:
        """4x4, from the axes of the body to the world, at a frame's time."""
        pose = np.eye(4)
        pose[:3, :3] = yaw_matrix(self.yaw + self.spin * time)
        pose[[0, 2], 3] = np.asarray(self.position) + time * np.asarray(self.velocity)
        return pose


@dataclass(frozen=True)
class Scene:
    """Bodies, and the ranges of camera positions and directions."""

    bodies: tuple[Body, ...]
    indoor: bool
    camera_x: tuple[float, float]
    camera_z: tuple[float, float]
    camera_yaw: tuple[float, float]
    camera_pitch: tuple[float, float]
    """Range of downward tilts."""


def build_scene(rng: np.random.Generator, domain: Domain, kind: Kind = "any") -> Scene:
    """A random room or street (``any``), or a scene of that kind; scenes of the two domains differ
    slightly in the number of bodies and in the camera's pitch."""
    crowd = 1.0 if domain == "sim" else 1.25
    pitch = np.radians((5.0, 12.0) if domain == "sim" else (3.0, 13.0))
    drawn = "rooms" if rng.random() < 0.5 else "streets"
    make = {"rooms": _room, "streets": _street, "traffic": _traffic}[
        drawn if kind == "any" else kind
    ]
    return make(rng, crowd, (float(pitch[0]), float(pitch[1])))


def _room(rng: np.random.Generator, crowd: float, pitch: tuple[float, float]) -> Scene:
    width, length, height = rng.uniform(5, 9), rng.uniform(7, 14), rng.uniform(2.6, 3.6)
    shell = [
        _slab("ground", (width, 0.4, length), (0, 0.2, 0)),
        _slab("ceiling", (width, 0.4, length), (0, -height - 0.2, 0)),
    ]
    for side in (-1, 1):
        along, across = side * (width / 2 + 0.2), side * (length / 2 + 0.2)
        shell += [
            _slab("wall", (0.4, height + 0.4, length + 0.8), (along, -height / 2, 0)),
            _slab("wall", (width + 0.8, height + 0.4, 0.4), (0, -height / 2, across)),
        ]
    makers = (_cabinet, _table, _crate, _pillar, _ramp, _ball, _pedestrian)
    number = int(crowd * rng.integers(5, 10))
    region = (-width / 2, width / 2), (-length / 2, length / 2)
    return Scene(
        bodies=(*shell, *_populate(rng, number, makers, *region)),
        indoor=True,
        camera_x=(-width / 2 + 1, width / 2 - 1),
        # A camera near the back wall that looks along the long axis sees large depths.
        camera_z=(-length / 2 + 0.6, -length / 2 + 3.5),
        camera_yaw=(-0.5, 0.5),
        camera_pitch=pitch,
    )


def _street(rng: np.random.Generator, crowd: float, pitch: tuple[float, float]) -> Scene:
    width, length = rng.uniform(8, 13), rng.uniform(14, 22)
    shell = [_slab("ground", (60, 0.4, 80), (0, 0.2, 10))]
    for side in (-1, 1):
        z = -8.0
        while z < length:
            depth, height = rng.uniform(4, 9), rng.uniform(5.5, 10)
            x = side * (width / 2 + 3 + rng.uniform(0, 0.8))
            shell.append(_slab("wall", (6, height, depth), (x, -height / 2, z + depth / 2)))
            z += depth
    height = rng.uniform(7, 11)
    shell.append(_slab("wall", (width + 14, height, 2), (0, -height / 2, length + 1)))
    shell.append(_slab("wall", (width + 14, 8, 2), (0, -4, -9)))
    makers = (_car, _car, _pedestrian, _pedestrian, _pillar, _crate, _ramp, _tree, _ball)
    number = int(crowd * rng.integers(6, 12))
    region = (-width / 2, width / 2), (1.0, length - 1)
    return Scene(
        bodies=(*shell, *_populate(rng, number, makers, *region)),
        indoor=False,
        camera_x=(-width / 2 + 1.5, width / 2 - 1.5),
        camera_z=(-4.0, 3.0),
        camera_yaw=(-0.3, 0.3),
        camera_pitch=pitch,
    )


def _traffic(rng: np.random.Generator, crowd: float, pitch: tuple[float, float]) -> Scene:
    """A wide square with cars on all sides of the cameras' lane."""
    width, length, lane = rng.uniform(24, 36), rng.uniform(48, 60), 8.0
    shell = [_slab("ground", (120, 0.4, 140), (0, 0.2, 0))]
    for side in (-1, 1):
        z = -length / 2
        while z < length / 2:
            depth, height = rng.uniform(5, 12), rng.uniform(5, 10)
            x = side * (width / 2 + 4 + rng.uniform(0, 3))
            shell.append(_slab("wall", (6, height, depth), (x, -height / 2, z + depth / 2)))
            z += depth + (rng.uniform(2, 6) if rng.random() < 0.4 else 0.0)
        shell.append(_slab("wall", (width + 14, 8, 2), (0, -4, side * (length / 2 + 2))))
    makers = (*5 * (_car,), _pedestrian, _pedestrian, _pillar, _crate, _tree)
    number = int(crowd * rng.integers(20, 33))
    region = (-width / 2, width / 2), (-length / 2, length / 2)
    free = [(0.0, float(z), 2.5) for z in np.arange(-lane, lane + 2, 2)]
    return Scene(
        bodies=(*shell, *_populate(rng, number, makers, *region, free)),
        indoor=False,
        camera_x=(-0.5, 0.5),
        camera_z=(-lane, lane),
        camera_yaw=(-0.3, 0.3),
        camera_pitch=pitch,
    )


def _slab(label: str, size: tuple[float, float, float], centre: tuple[float, float, float]) -> Body:
    return Body(label, (Part("box", size, centre),))


@dataclass(frozen=True)
class _Model:
    """The result of a maker: parts, their radius, and the highest speed in metres per frame."""

    label: str
    parts: tuple[Part, ...]
    radius: float
    speed: float = 0.0


_Maker = Callable[[np.random.Generator], _Model]


def _populate(
    rng: np.random.Generator,
    number: int,
    makers: Sequence[_Maker],
    x: tuple[float, float],
    z: tuple[float, float],
    free: Sequence[tuple[float, float, float]] = (),
) -> list[Body]:
    """Place bodies that do not overlap, two thirds of the movable ones moving; the circles
    ``free`` (x, z, radius) are left empty."""
    taken = list(free)
    bodies = []
    for _ in range(number):
        model = makers[int(rng.integers(len(makers)))](rng)
        moving = model.speed > 0 and rng.random() < 0.67
        reach = model.radius + (2 * model.speed if moving else 0.0)
        for _ in range(10):
            at = rng.uniform((x[0], z[0]), (x[1], z[1]))
            inside = (x[0] + reach < at[0] < x[1] - reach) and (z[0] + reach < at[1] < z[1] - reach)
            if inside and all(np.hypot(*(at - t[:2])) > reach + t[2] for t in taken):
                bodies.append(_put(rng, model, moving, at))
                taken.append((at[0], at[1], reach))
                break
    return bodies


def _put(rng: np.random.Generator, model: _Model, moving: bool, at: Floats) -> Body:
    quarter = rng.integers(4) * np.pi / 2
    yaw = float(quarter + rng.normal(0, 0.15) if rng.random() < 0.7 else rng.uniform(0, 2 * np.pi))
    velocity, spin = (0.0, 0.0), 0.0
    if moving:
        speed = rng.uniform(0.3, 1.0) * model.speed
        velocity = (float(speed * np.sin(yaw)), float(speed * np.cos(yaw)))
        spin = float(rng.uniform(-1, 1) * np.radians(4))
    return Body(model.label, model.parts, (float(at[0]), float(at[1])), yaw, velocity, spin)


def _cabinet(rng: np.random.Generator) -> _Model:
    w, h, d = rng.uniform(0.6, 1.6), rng.uniform(0.8, 2.1), rng.uniform(0.4, 0.7)
    return _Model("block", (Part("box", (w, h, d), (0, -h / 2, 0)),), np.hypot(w, d) / 2)


def _crate(rng: np.random.Generator) -> _Model:
    w, h, d = rng.uniform(0.4, 1.1, 3)
    return _Model("block", (Part("box", (w, h, d), (0, -h / 2, 0)),), np.hypot(w, d) / 2)


def _table(rng: np.random.Generator) -> _Model:
    w, h, d = rng.uniform(0.9, 1.8), rng.uniform(0.65, 0.8), rng.uniform(0.6, 1.0)
    legs = tuple(
        Part("box", (0.08, h, 0.08), (x * (w / 2 - 0.06), -h / 2, z * (d / 2 - 0.06)))
        for x in (-1, 1) for z in (-1, 1)
    )  # fmt: skip
    return _Model("block", (Part("box", (w, 0.08, d), (0, -h, 0)), *legs), np.hypot(w, d) / 2)


def _pillar(rng: np.random.Generator) -> _Model:
    w, h = rng.uniform(0.25, 0.6), rng.uniform(1.0, 2.5)
    return _Model("pillar", (Part("cylinder", (w, h, w), (0, -h / 2, 0)),), w / 2)


def _tree(rng: np.random.Generator) -> _Model:
    h, crown = rng.uniform(1.6, 2.4), rng.uniform(1.2, 2.0)
    parts = (
        Part("cylinder", (0.25, h, 0.25), (0, -h / 2, 0)),
        Part("ball", (crown, 1.2 * crown, crown), (0, -h - 0.4 * crown, 0)),
    )
    return _Model("pillar", parts, crown / 2)


def _ramp(rng: np.random.Generator) -> _Model:
    w, h, d = rng.uniform(0.8, 1.8), rng.uniform(0.4, 1.0), rng.uniform(1.0, 2.2)
    return _Model("ramp", (Part("wedge", (w, h, d), (0, -h / 2, 0)),), np.hypot(w, d) / 2)


def _ball(rng: np.random.Generator) -> _Model:
    d = rng.uniform(0.4, 1.0)
    return _Model("ball", (Part("ball", (d, d, d), (0, -d / 2, 0)),), d / 2, speed=0.25)


def _pedestrian(rng: np.random.Generator) -> _Model:
    h = rng.uniform(1.5, 1.9)
    parts = (
        Part("cylinder", (0.34, 0.5 * h, 0.26), (0, -0.25 * h, 0)),
        Part("cylinder", (0.48, 0.36 * h, 0.3), (0, -0.66 * h, 0)),
        Part("ball", (0.2, 0.16 * h, 0.22), (0, -0.92 * h, 0)),
    )
    return _Model("pedestrian", parts, 0.35, speed=0.15)


def _car(rng: np.random.Generator) -> _Model:
    w, h, d = rng.uniform(1.55, 1.8), rng.uniform(1.35, 1.6), rng.uniform(3.4, 4.2)
    sideways = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    wheels = tuple(
        Part("cylinder", (0.6, 0.2, 0.6), (x * (w / 2 - 0.08), -0.3, z * 0.3 * d), sideways)
        for x in (-1, 1) for z in (-1, 1)
    )  # fmt: skip
    parts = (
        Part("box", (w, 0.5 * h, d), (0, -0.45 * h, 0)),
        Part("box", (0.88 * w, 0.32 * h, 0.4 * d), (0, -0.84 * h, -0.1 * d)),
        Part("wedge", (0.88 * w, 0.32 * h, 0.2 * d), (0, -0.84 * h, 0.2 * d), np.diag([-1, 1, -1])),
        *wheels,
    )
    return _Model("car", parts, float(np.hypot(w, d)) / 2, speed=0.35)
