"""Arrays as RGB pictures: depth, normals, segmentation and other quantities, and error maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from taskray.schema import IGNORE

INVALID = (58, 62, 70)
"""Colour of pixels without a valid value."""

PALETTE = np.array(
    [(76, 120, 168), (245, 133, 24), (84, 162, 75), (228, 87, 86), (114, 183, 178),
     (238, 202, 59), (178, 121, 162), (255, 157, 166), (157, 117, 93), (186, 176, 172),
     (31, 87, 122), (182, 71, 10), (136, 210, 122), (148, 34, 54), (17, 138, 138),
     (170, 140, 10), (109, 69, 137), (214, 39, 120), (94, 60, 40), (110, 110, 120)],
    dtype=np.uint8,
)  # fmt: skip
"""Colours of the first 20 classes; further classes repeat them."""


@dataclass(frozen=True)
class Panel:
    """One picture, uint8 RGB ``[H, W, 3]``, and its caption."""

    caption: str
    pixels: np.ndarray


def colour_depth(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth ``[..., H, W]`` in metres to uint8 RGB ``[..., H, W, 3]``, near bright and far dark on
    a logarithmic scale from ``near`` to ``far``; pixels that are not positive are INVALID."""
    valid = np.isfinite(depth) & (depth > 0)
    span = max(float(np.log(far / near)), 1e-6)
    closeness = 1 - np.log(np.where(valid, depth, near) / near) / span
    return _paint(_colormap("magma", closeness), valid)


def depth_range(truth: np.ndarray) -> tuple[float, float]:
    """Near and far of a shared scale: the 1st and 99th percentile of the valid depths."""
    valid = truth[np.isfinite(truth) & (truth > 0)]
    if not valid.size:
        return 0.1, 10.0
    near, far = np.percentile(valid, [1, 99])
    return float(near), max(float(far), float(near) * 1.01)


def colour_normals(normals: np.ndarray) -> np.ndarray:
    """Normals ``[..., 3, H, W]`` in the camera axes of ``schema`` to uint8 RGB.

    The usual picture (n + 1) / 2 has y up and z towards the viewer, so y and z change sign:
    floors are green, walls that face the camera are blue. Zero vectors are INVALID.
    """
    last = np.moveaxis(normals, -3, -1)
    length = np.linalg.norm(last, axis=-1, keepdims=True)
    valid = np.isfinite(last).all(-1) & (length[..., 0] > 1e-6)
    unit = np.where(valid[..., None], last, 0) / np.maximum(length, 1e-6)
    return _paint(_to_uint8((unit * (1, -1, -1) + 1) / 2), valid)


def colour_segmentation(classes: np.ndarray) -> np.ndarray:
    """Class indexes ``[..., H, W]`` to uint8 RGB; 255 is INVALID."""
    index = np.nan_to_num(classes, nan=IGNORE).astype(np.int64)
    return _paint(PALETTE[index % len(PALETTE)], (index >= 0) & (index != IGNORE))


def colour_any(values: np.ndarray, scale: float) -> np.ndarray:
    """Any other quantity ``[..., C, H, W]``: one channel as grey from 0 to ``scale``, more as
    colours around grey from ``-scale`` to ``scale``."""
    finite = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    last = np.moveaxis(finite, -3, -1)
    if last.shape[-1] == 3:
        return _to_uint8(0.5 + last / (2 * scale))
    return np.repeat(_to_uint8(last[..., :1] / scale), 3, axis=-1)


def paint(quantity: str, truth: np.ndarray | None) -> Callable[[np.ndarray], np.ndarray]:
    """A function that colours arrays ``[N, C, H, W]`` of a quantity on the scale of the truth, so
    that truth and predictions can be compared."""
    if quantity == "depth":
        near, far = depth_range(truth if truth is not None else np.zeros(0))
        return lambda a: colour_depth(a[:, 0], near, far)
    if quantity == "normals":
        return colour_normals
    if quantity in ("segmentation", "motion_mask"):
        return lambda a: colour_segmentation(a[:, 0])
    finite = truth[np.isfinite(truth) & (truth != IGNORE)] if truth is not None else np.zeros(0)
    scale = float(np.abs(finite).max()) if finite.size else 1.0
    return lambda a: colour_any(a, scale or 1.0)


def colour_energy(energy: np.ndarray) -> np.ndarray:
    """Consistency energy ``[N, 1, H, W]`` as uint8 RGB, black from one deviation below the mean of
    its reference to yellow at three above; NaN is INVALID."""
    values = energy[:, 0]
    valid = np.isfinite(values)
    return _paint(_colormap("inferno", (np.where(valid, values, 0) + 1) / 4), valid)


def error_map(quantity: str, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray | None:
    """The error of a prediction ``[N, C, H, W]`` as uint8 RGB ``[N, H, W, 3]``, black for none:
    relative depth up to 50 %, normals up to 45 degrees; None for other quantities."""
    if quantity == "depth":
        valid = truth[:, 0] > 0
        error = np.abs(prediction[:, 0] - truth[:, 0]) / np.where(valid, truth[:, 0], 1) / 0.5
    elif quantity == "normals":
        valid = np.linalg.norm(truth, axis=1) > 1e-6
        cross = np.linalg.norm(np.cross(prediction, truth, axis=1), axis=1)
        angle = np.degrees(np.arctan2(cross, (prediction * truth).sum(1)))
        error = angle / 45
    else:
        return None
    valid &= np.isfinite(error)
    return _paint(_colormap("inferno", np.where(valid, error, 0)), valid)


ERROR_SCALES = {"depth": "relative error, black 0 to yellow 50 %",
                "normals": "angle, black 0° to yellow 45°"}  # fmt: skip


def compose(
    arrays: Mapping[str, np.ndarray],
    group: str,
    quantity: str,
    labels: tuple[str, str],
    baseline: Mapping[str, np.ndarray] | None = None,
    limit: int = 4,
) -> list[list[Panel]]:
    """The pictures of one quantity, a row for each sample: input, truth, predictions, errors.

    ``group`` is ``<task>/<evaluation>``; ``labels`` name the predictions of the baseline and of
    the run. The baseline is shown only if it was evaluated on the same images.
    """
    image, truth = arrays.get(f"{group}/image"), arrays.get(f"{group}/{quantity}/truth")
    predictions = []
    if baseline is not None and image is not None:
        theirs = baseline.get(f"{group}/{quantity}/prediction")
        if theirs is not None and np.array_equal(baseline.get(f"{group}/image", 0), image):
            predictions.append((labels[0], theirs))
    ours = arrays.get(f"{group}/{quantity}/prediction")
    if ours is not None:
        predictions.append((labels[1], ours))
    colour = paint(quantity, truth)
    columns = [("input", image)] if image is not None else []
    columns += [("truth", colour(truth))] if truth is not None else []
    columns += [(label, colour(prediction)) for label, prediction in predictions]
    for label, prediction in predictions:
        if truth is not None and prediction.shape == truth.shape:
            errors = error_map(quantity, prediction, truth)
            columns += [(f"error {label}", errors)] if errors is not None else []
    energy = arrays.get(f"{group}/{quantity}/energy")
    columns += [("consistency energy", colour_energy(energy))] if energy is not None else []
    num = min([limit, *(len(pixels) for _, pixels in columns)]) if columns else 0
    return [[Panel(caption, pixels[i]) for caption, pixels in columns] for i in range(num)]


def png_data_uri(pixels: np.ndarray, max_width: int = 360) -> str:
    """uint8 RGB ``[H, W, 3]`` as a ``data:`` URI of a PNG, at most ``max_width`` pixels wide."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    if image.width > max_width:
        image = image.resize((max_width, max(1, image.height * max_width // image.width)))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@cache
def _lookup(name: str) -> np.ndarray:
    import matplotlib

    return _to_uint8(matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3])


def _colormap(name: str, values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] (clipped) through a matplotlib colour map."""
    colours: np.ndarray = _lookup(name)[(np.clip(values, 0, 1) * 255).astype(np.uint8)]
    return colours


def _to_uint8(values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
    return rounded


def _paint(colours: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid[..., None], colours, np.array(INVALID, np.uint8))
