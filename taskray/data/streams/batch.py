"""A batch: what every stream gives and every step takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from taskray.data.streams.order import START, Place

PLACE = "place_in_sequence"
"""In batches to measure with: the number of each row's sequence and that of its first frame, int64
``[B, 2]``."""


@dataclass(frozen=True)
class Batch:
    """Columns as tensors ``[B, ...]``: ``image`` float32 in [0, 1], integers as int64, the rest
    float32. ``id`` numbers the batches of the mediator dataset and is None elsewhere."""

    tensors: dict[str, Tensor]
    id: int | None = None
    place: Place = START
    """Where a mediator batch comes in the mediator's order."""
