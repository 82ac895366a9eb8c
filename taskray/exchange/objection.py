"""What the cache checks in a prediction before it keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from taskray.schema import shape_problem


def objection(arrays: Mapping[str, np.ndarray], announced: Sequence[str]) -> str | None:
    """Why a prediction cannot be used, or None: its names, shapes, type, and finite values."""
    if set(arrays) != set(announced):
        return f"predicts {sorted(arrays)}, announced {sorted(announced)}"
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 2:
            return f"{name} is not an array of floats with a batch dimension"
        problem = shape_problem(name, array.shape, {})
        if problem is not None:
            return problem
        if not _is_finite(array):
            return f"{name} has values that are not finite"
    if len({array.shape[0] for array in arrays.values()}) > 1:
        return "its quantities differ in batch size"
    return None


def _is_finite(array: np.ndarray) -> bool:
    """As ``np.isfinite(array).all()``. For float16, twenty times as fast by its bits: infinities
    and NaN are the largest positive values as int16, and the largest of all as uint16."""
    if array.dtype == np.float16 and array.size:
        bits = array.view(np.int16)
        return bool(bits.max() < 0x7C00 and bits.view(np.uint16).max() < 0xFC00)
    return bool(np.isfinite(array).all())
