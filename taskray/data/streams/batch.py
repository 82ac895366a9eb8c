"""A batch: what every stream gives and every step takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Columns as tensors ``[B, ...]``: ``image`` float32 in [0, 1], integers as int64, the rest
    float32. ``id`` numbers the batches of the mediator dataset and is None elsewhere."""

    tensors: dict[str, Tensor]
    id: int | None = None
    window: int = 0
    """Where the window of a mediator batch begins in the visiting order: it only ever grows."""
    walk: int = 0
    """How often the window has been walked before."""
    visit: int = 0
    """Its number in the visiting order."""
