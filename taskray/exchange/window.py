"""The mediator window that the whole collective is in."""

from __future__ import annotations

from collections.abc import Collection

from taskray.data.streams.order import Place


class Window:
    """Its ``number`` only counts up. It moves on when every task in training that has begun has
    passed over it ``visits`` times.

    Tasks of equal speed make ``visits`` passes each. A task that is ten times faster than the
    slowest makes ten times as many: on other batches it would find no prediction of the slow task,
    and the slow task would find predictions that are many passes old.

    Args:
        visits: passes before the window is left; None: it is never left.
    """

    def __init__(self, visits: int | None) -> None:
        self.visits = visits
        self.number = 0
        self._passes: dict[str, int] = {}

    def join(self, task: str, place: Place | None) -> None:
        """A task begins, or comes back: at ``place``, or before its first visit."""
        self._passes.pop(task, None)
        if place is not None:
            self.visit(task, place._replace(visit=place.visit - 1), ())

    def visit(self, task: str, place: Place, training: Collection[str]) -> bool:
        """A task asks about ``place``, where it is about to predict. Returns whether the window
        moves on."""
        self.number, before = max(self.number, place.window), self.number
        if self.number > before:  # it goes on from a later window, or moves on by itself
            self._passes = dict.fromkeys(self._passes, 0)
        self._passes[task] = place.finished_passes if place.window == self.number else 0
        return self.advance(training) or self.number > before

    def advance(self, training: Collection[str]) -> bool:
        """Move on if it is time to; returns whether it was. ``training``: the tasks that visit the
        mediator; those that have not begun count for nothing."""
        passes = [self._passes[task] for task in training if task in self._passes]
        if self.visits is None or not passes or min(passes) < self.visits:
            return False
        self.number += 1
        self._passes = dict.fromkeys(self._passes, 0)
        return True
