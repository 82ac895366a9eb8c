"""In what order the numbered mediator batches are visited.

::

    window 2, visits 3, 5 batches:   0 1 0 1 0 1   2 3 2 3 2 3   4 4 4  |  0 1 0 1 ...
                                     └─ 3 walks ┘                 one pass

All tasks follow the same order, each at its own pace. Within a window a peer's prediction is at
most one walk of the window old, so ``window`` bounds staleness whatever the dataset's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Visit:
    """One step of the order: the batch to take, and where in the order it stands."""

    batch: int
    pass_: int
    window: int
    walk: int


@dataclass(frozen=True)
class VisitingOrder:
    """Walk ``window`` batches ``visits`` times, then the next ``window`` ones, without end.

    ``window='all'`` is the plain pass, each batch once. With ``shuffle`` the batches of a window
    are permuted anew at each walk, by (seed, pass, window, walk). The last window of a pass may
    be smaller.
    """

    num_batches: int
    window: int | Literal["all"] = "all"
    visits: int = 1
    shuffle: bool = False
    seed: int = 0

    def __getitem__(self, number: int) -> Visit:
        """Visit ``number``, counted from 0."""
        pass_, within = divmod(number, self.num_batches * self.walks)
        window = within // (self.width * self.walks)
        begin = window * self.width
        size = min(self.width, self.num_batches - begin)
        walk, offset = divmod(within - begin * self.walks, size)
        if self.shuffle:
            offset = _permutation(size, (self.seed, pass_, window, walk))[offset]
        return Visit(begin + offset, pass_, window, walk)

    def start_of_window(self, number: int) -> int:
        """The visit with which the window of visit ``number`` begins."""
        visit = self[number]
        return (visit.pass_ * self.num_batches + visit.window * self.width) * self.walks

    def end_of_window(self, number: int) -> int:
        """The visit with which the window after that of visit ``number`` begins."""
        visit = self[number]
        last = min((visit.window + 1) * self.width, self.num_batches)
        return (visit.pass_ * self.num_batches + last) * self.walks

    def length_of_walk(self, number: int) -> int:
        """Batches in the window of visit ``number``."""
        return (self.end_of_window(number) - self.start_of_window(number)) // self.walks

    def begins_walk(self, number: int) -> bool:
        """Whether a walk of a window begins with visit ``number``."""
        return number == 0 or (
            self[number - 1].walk != self[number].walk
            or self.start_of_window(number) != self.start_of_window(number - 1)
        )

    @property
    def width(self) -> int:
        """Batches in a full window."""
        return self.num_batches if self.window == "all" else min(self.window, self.num_batches)

    @property
    def walks(self) -> int:
        """How often a window is walked."""
        return 1 if self.window == "all" else self.visits


@lru_cache(maxsize=8)
def _permutation(size: int, seed: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).permutation(size)]
