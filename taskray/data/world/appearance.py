"""Colours of surfaces: flat in ``sim``; in ``real`` another palette, textures fixed to the
surfaces, a lamp with shadows, haze, and a camera with vignette and noise. ``sim`` may vary all
that at random from scene to scene instead.

Nothing here changes geometry. Colours are linear RGB in [0, 1] before the camera.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from taskray.data.world.render import Hits, Snapshot
from taskray.data.world.scene import Domain, Scene
from taskray.data.world.shapes import Floats
from taskray.data.world.texture import Textures

SIM_PALETTE: dict[str, tuple[float, float, float]] = {
    "ground": (0.45, 0.45, 0.48), "wall": (0.85, 0.78, 0.62), "ceiling": (0.92, 0.92, 0.95),
    "block": (0.62, 0.40, 0.22), "pillar": (0.55, 0.62, 0.35), "ramp": (0.35, 0.55, 0.62),
    "ball": (0.90, 0.55, 0.15), "pedestrian": (0.75, 0.25, 0.45), "car": (0.22, 0.35, 0.75),
    "sky": (0.60, 0.78, 0.95),
}  # fmt: skip
_SUN = np.array([-0.35, -0.8, -0.5]) / np.linalg.norm([-0.35, -0.8, -0.5])


class Look(Protocol):
    """The appearance of one scene."""

    def shade(self, hits: Hits, snapshot: Snapshot, focal: float) -> Floats:
        """The light ``[N, 3]`` along rays, given their hits; ``focal`` is the focal length in
        pixels, which bounds the visible detail."""
        ...

    def expose(self, image_hw3: Floats, rng: np.random.Generator) -> Floats:
        """The camera's image of the light, ``[H, W, 3]`` in [0, 1]."""
        ...


def build_look(rng: np.random.Generator, scene: Scene, domain: Domain, varied: bool) -> Look:
    """A random look of that domain for a scene; ``varied``: of the domain ``sim``, see
    :func:`varied_weather`."""
    if domain == "real":
        return TexturedLook(rng, scene, _weather(rng, scene), _natural_colour)
    if varied:
        return TexturedLook(rng, scene, varied_weather(rng, scene), _any_colour)
    return SimLook(rng, scene)


class SimLook:
    """One colour per class, a little different per body; one light from behind the camera."""

    def __init__(self, rng: np.random.Generator, scene: Scene) -> None:
        tints = rng.normal(1.0, 0.15, (len(scene.bodies), 3))
        self._albedo = np.array(
            [SIM_PALETTE[b.label] * t for b, t in zip(scene.bodies, tints, strict=True)]
        )

    def shade(self, hits: Hits, snapshot: Snapshot, focal: float) -> Floats:
        """Lambert's law with one distant light and no shadows."""
        albedo = self._albedo[snapshot.body_of_part[hits.part]]
        light = 0.55 + 0.45 * np.maximum(hits.normals @ _SUN, 0.0)
        colour: Floats = albedo * light[:, None]
        colour[hits.part < 0] = SIM_PALETTE["sky"]
        return colour

    def expose(self, image_hw3: Floats, rng: np.random.Generator) -> Floats:
        """The unchanged light."""
        return np.clip(image_hw3, 0.0, 1.0)


@dataclass(frozen=True)
class _Weather:
    """Light, air and camera of one real scene."""

    lamp: Floats
    lamp_colour: Floats
    ambient: Floats
    shadow: float
    haze: Floats
    visibility: float
    """Metres after which 1/e of the contrast is left."""
    gamma: float
    gain: float
    vignette: float
    noise: float


class TexturedLook:
    """Textured surfaces under one lamp (the sun, outdoors), seen through haze.

    Args:
        rng: of the scene.
        scene: whose parts are coloured.
        weather: of the scene.
        colour: a random albedo for a part of that class.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        scene: Scene,
        weather: _Weather,
        colour: Callable[[np.random.Generator, str], Floats],
    ) -> None:
        self._weather = weather
        labels = [body.label for body in scene.bodies for _ in body.parts]
        self._albedo = np.array([colour(rng, label) for label in labels])
        self._textures = Textures(rng, labels)

    def shade(self, hits: Hits, snapshot: Snapshot, focal: float) -> Floats:
        """Lambert's law with one shadowed lamp, then haze over the distance."""
        weather = self._weather
        met = np.flatnonzero(hits.part >= 0)
        part, points, normals = hits.part[met], hits.points[met], hits.normals[met]
        pose = snapshot.poses[snapshot.body_of_part[part]]
        local = np.einsum("nji,nj->ni", pose[:, :3, :3], points - pose[:, :3, 3])
        facing = np.einsum("nji,nj->ni", pose[:, :3, :3], normals)
        texture = self._textures(part, local, facing, hits.t[met] / focal)

        to_lamp = weather.lamp - points
        to_lamp /= np.linalg.norm(to_lamp, axis=1, keepdims=True)
        lit = np.maximum(np.einsum("ni,ni->n", normals, to_lamp), 0.0)
        start = points + 0.02 * normals
        lit *= 1.0 - weather.shadow * snapshot.blocked(
            start, np.broadcast_to(weather.lamp, start.shape)
        )
        light = weather.ambient + lit[:, None] * weather.lamp_colour
        colour = np.tile(weather.haze, (len(hits.t), 1))
        clear = np.exp(-hits.t[met] / weather.visibility)[:, None]
        colour[met] = clear * (self._albedo[part] * texture * light) + (1 - clear) * weather.haze
        return colour

    def expose(self, image_hw3: Floats, rng: np.random.Generator) -> Floats:
        """Vignette, a tone curve and sensor noise."""
        height, width = image_hw3.shape[:2]
        y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
        fall = 1.0 - self._weather.vignette * (x * x + y * y) / 2
        seen = np.clip(self._weather.gain * image_hw3 * fall[..., None], 0.0, 1.0) ** (
            1 / self._weather.gamma
        )
        # Photon noise grows with the light, read noise does not.
        noise = rng.standard_normal(seen.shape) * self._weather.noise * (0.5 + np.sqrt(seen))
        return np.clip(seen + noise, 0.0, 1.0)


def _weather(rng: np.random.Generator, scene: Scene) -> _Weather:
    if scene.indoor:
        lamp = np.array([rng.uniform(-1.5, 1.5), -2.5, rng.uniform(-3, 3)])
        visibility = rng.uniform(30, 80)
    else:
        angle, climb = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.3)
        aim = [np.cos(climb) * np.cos(angle), -np.sin(climb), np.cos(climb) * np.sin(angle)]
        lamp, visibility = 500 * np.array(aim), rng.uniform(15, 60)
    warmth = rng.normal(0.0, 0.12)
    tint = np.array([1 + warmth, 1.0, 1 - warmth])
    ambient = rng.uniform(0.35, 0.6)
    return _Weather(
        lamp=lamp,
        lamp_colour=rng.uniform(0.5, 1.0) * tint,
        ambient=ambient * tint[::-1] ** 0.5,
        shadow=rng.uniform(0.4, 0.9),
        haze=rng.uniform(0.4, 0.8) * np.array([0.95, 1.0, 1.05]),
        visibility=visibility,
        gamma=1.6,
        gain=rng.uniform(0.8, 1.4),
        vignette=rng.uniform(0.1, 0.5),
        noise=rng.uniform(0.005, 0.025),
    )


def varied_weather(rng: np.random.Generator, scene: Scene) -> _Weather:
    """Light, air and camera drawn from ranges that are wide and not those of any real scene (domain
    randomisation, Tobin et al., IROS 2017): what is learnt must not rest on them."""
    if scene.indoor:
        lamp = np.array([rng.uniform(-2, 2), -2.5, rng.uniform(-4, 4)])
    else:
        angle, climb = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.5)
        aim = [np.cos(climb) * np.cos(angle), -np.sin(climb), np.cos(climb) * np.sin(angle)]
        lamp = 500 * np.array(aim)
    return _Weather(
        lamp=lamp,
        lamp_colour=rng.uniform(0.2, 1.2) * rng.uniform(0.6, 1.4, 3),
        ambient=rng.uniform(0.2, 0.8) * rng.uniform(0.6, 1.4, 3),
        shadow=rng.uniform(0.0, 1.0),
        haze=rng.uniform(0.0, 1.0, 3),
        visibility=np.exp(rng.uniform(np.log(10), np.log(500))),
        gamma=rng.uniform(0.8, 2.4),
        gain=rng.uniform(0.5, 2.0),
        vignette=rng.uniform(0.0, 0.7),
        noise=rng.uniform(0.0, 0.04),
    )


def _any_colour(rng: np.random.Generator, label: str) -> Floats:
    return rng.uniform(0.05, 0.95, 3)


def _natural_colour(rng: np.random.Generator, label: str) -> Floats:
    """Muted hues; movable objects are more colourful than the ground."""
    vivid = label in ("car", "ball", "pedestrian")
    saturation = rng.uniform(0.2, 0.8) if vivid else rng.uniform(0.05, 0.45)
    hue = rng.uniform(0, 1) if vivid else rng.normal(0.09, 0.09) % 1.0
    low, high = (0.15, 0.45) if label == "ground" else (0.2, 0.85)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(low, high)))
