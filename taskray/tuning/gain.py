"""The multi-task gain over a baseline: the mean relative improvement of several metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping


def delta_m(
    values: Mapping[str, float | None],
    baseline: Mapping[str, float | None],
    metrics: Mapping[str, bool],
) -> float | None:
    """``mean over metrics of s (value - baseline) / baseline``, a fraction; ``s`` is -1 where lower
    is better (Maninis et al. 2019; XTasC-Net eq. 17; DenseMTL). Above 0 is better than the
    baseline. ``metrics``: metric -> whether a higher value is better.

    The papers average over different metrics, so ``metrics`` has no default. Returns None if a
    value is missing or a baseline is 0.
    """
    changes = []
    for metric, higher_is_better in metrics.items():
        value, base = values.get(metric), baseline.get(metric)
        if value is None or not base:
            return None
        sign = 1 if higher_is_better else -1
        changes.append(sign * (value - base) / base)
    return statistics.fmean(changes) if changes else None
