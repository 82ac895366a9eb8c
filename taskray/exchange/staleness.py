"""How old a prediction may be: the bound is a contract, checked wherever one is used."""

from __future__ import annotations

import math
from dataclasses import dataclass

from taskray.job.config import StalenessConfig

UNDER_WAY = 2
"""Visits between a prediction and the peers that can see it: a task publishes with the question
for its next visit, which it asks a step ahead."""


@dataclass(frozen=True)
class Version:
    """The model that made a prediction (the producer's step), and when (``time.time``)."""

    producer_step: int
    produced_at: float


def window_bound(window: int | None, steps_per_visit: float) -> int | None:
    """The largest staleness, in the producer's steps, of a prediction within a window: one pass of
    the producer over its ``window`` batches, and what is under way. None: no window."""
    return None if window is None else math.ceil((window + UNDER_WAY) * steps_per_visit)


def within(
    bound: StalenessConfig, staleness_steps: int, age_seconds: float, window_bound: int | None
) -> bool:
    """Whether a prediction of this age may be used."""
    limits = [limit for limit in (bound.max_steps, window_bound) if limit is not None]
    if limits and staleness_steps > min(limits):
        return False
    return bound.max_seconds is None or age_seconds <= bound.max_seconds
