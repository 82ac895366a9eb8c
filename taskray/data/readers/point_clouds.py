"""Shared by the readers of point clouds: points and boxes as arrays of a fixed size."""

from __future__ import annotations

import numpy as np


def pad(values: np.ndarray, size: int) -> np.ndarray:
    """Rows ``[n, d]``, at most ``size``, as float32 ``[size, d]``, the rest NaN."""
    padded = np.full((size, values.shape[1]), np.nan, dtype=np.float32)
    padded[: len(values)] = values
    return padded


def thin_out(number: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of the points to keep: a random subset of ``size`` of ``number`` points, in order,
    or all if there are no more."""
    if number <= size:
        return np.arange(number)
    return np.sort(rng.permutation(number)[:size])


def nearest_boxes(boxes: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` boxes ``[n, 9]`` whose centres are nearest to the sensor, in order."""
    distance = np.linalg.norm(boxes[:, :2], axis=1)
    return np.asarray(boxes[np.sort(np.argsort(distance, kind="stable")[:size])])
