"""The mediator window that the whole collective is in."""

from __future__ import annotations

from collections.abc import Collection

from taskray.data.streams.order import Place


class Window:
    """Its ``number`` only counts up. It moves on when every task in training that has begun has
    passed over it twice, once to fill it with predictions and once to use those of its peers, and
    one of them ``visits`` times.

    Tasks of equal speed make ``visits`` passes each. A task ten times slower than its peers makes
    two, and they make twenty: a prediction that is used is never older than one pass of its
    producer, and the slow task's peers find predictions on nearly every batch.

    Args:
        visits: passes of the task that is ahead; None: the window is never left.
    """

    def __init__(self, visits: int | None) -> None:
        self.visits = visits
        self.number = 0
        self._passes: dict[str, int] = {}

    def visit(self, task: str, place: Place, training: Collection[str]) -> bool:
        """A task has come to ``place``. Returns whether the window moves on."""
        self.number, before = max(self.number, place.window), self.number
        if self.number > before:  # it goes on from a later window, or moves on by itself
            self._passes = dict.fromkeys(self._passes, 0)
        self._passes[task] = place.finished_passes if place.window == self.number else 0
        return self.advance(training) or self.number > before

    def advance(self, training: Collection[str]) -> bool:
        """Move on if it is time to; returns whether it was. ``training``: the tasks that visit the
        mediator; those that have not begun count for nothing."""
        passes = [self._passes[task] for task in training if task in self._passes]
        if self.visits is None or not passes:
            return False
        if min(passes) < min(2, self.visits) or max(passes) < self.visits:
            return False
        self.number += 1
        self._passes = dict.fromkeys(self._passes, 0)
        return True
