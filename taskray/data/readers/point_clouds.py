"""What readers of point clouds share: sweeps and boxes of any number as arrays of a fixed size."""

from __future__ import annotations

import numpy as np


def pad(values: np.ndarray, size: int) -> np.ndarray:
    """Rows ``[n, d]``, at most ``size``, as float32 ``[size, d]``, the rest NaN."""
    padded = np.full((size, values.shape[1]), np.nan, dtype=np.float32)
    padded[: len(values)] = values
    return padded


def thin_out(number: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Which of ``number`` points to keep where there is room for ``size``: a random subset, in
    order; all of them where they fit."""
    if number <= size:
        return np.arange(number)
    return np.sort(rng.permutation(number)[:size])


def nearest_boxes(boxes: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` boxes ``[n, 9]`` whose centres are nearest to the sensor, in order."""
    distance = np.linalg.norm(boxes[:, :2], axis=1)
    return np.asarray(boxes[np.sort(np.argsort(distance, kind="stable")[:size])])
