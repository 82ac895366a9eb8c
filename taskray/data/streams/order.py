"""In what order a task visits the numbered mediator batches.

::

    window: 2, 5 batches      window 0        window 1        window 2    window 3
    batches                   0 1 0 1 ...     2 3 2 3 ...     4 4 ...     0 1 0 1 ...
                              └ 1 pass

A task passes over the batches of one window again and again. Within a window a peer's prediction
is at most one pass old, so ``window`` bounds staleness whatever the length of the dataset. Which
window the tasks are in, the prediction cache decides (``exchange/window.py``); in lock-step, where
every task makes the same visits, each moves on by itself after ``visits`` passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np


class Place(NamedTuple):
    """One visit in a task's order. Places compare by window, then by visit."""

    window: int = 0
    """Number of the window; it only counts up, also where the dataset begins again."""
    visit: int = 0
    """Visits in this window before this one."""
    size: int = 1
    """Batches in this window."""

    @property
    def finished_passes(self) -> int:
        """Passes over the window that are finished with this visit."""
        return (self.visit + 1) // self.size


START = Place()
"""Where every task begins."""


@dataclass(frozen=True)
class MediatorOrder:
    """The batches of each window, and where to go next.

    Args:
        num_batches: of the dataset.
        window: batches in a window; ``all``: the whole dataset is one window, never left.
        shuffle: permute the batches of a window at each pass, by (seed, window, pass).
        seed: of the permutations; the same for all tasks.
        visits: passes after which a task leaves a window by itself; None: it waits to be told.
    """

    num_batches: int
    window: int | Literal["all"] = "all"
    shuffle: bool = False
    seed: int = 0
    visits: int | None = None

    @property
    def width(self) -> int:
        """Batches in a full window."""
        return self.num_batches if self.window == "all" else min(self.window, self.num_batches)

    def batches(self, window: int) -> range:
        """The numbers of the batches in a window. The last window of a dataset may be smaller."""
        first = window % -(-self.num_batches // self.width) * self.width
        return range(first, min(first + self.width, self.num_batches))

    def batch(self, place: Place) -> int:
        """The number of the batch at a place."""
        pass_, offset = divmod(place.visit, place.size)
        if self.shuffle:
            offset = _permutation(place.size, (self.seed, place.window, pass_))[offset]
        return self.batches(place.window)[offset]

    def place(self, window: int, visit: int, told: int = 0) -> Place:
        """The place to go to when ``visit`` of ``window`` is next and the window to be in is
        ``told``: the start of that window, if it is a later one."""
        size = len(self.batches(window))
        if self.window != "all":
            ended = self.visits is not None and visit >= self.visits * size
            to = window + ended if self.visits is not None else max(window, told)
            if to > window:
                return Place(to, 0, len(self.batches(to)))
        return Place(window, visit, size)


@lru_cache(maxsize=8)
def _permutation(size: int, seed: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).permutation(size)]
