"""What the cache knows of one task."""

from __future__ import annotations

from taskray.data.streams.order import Place
from taskray.exchange.messages import Announcement


class StepCount:
    """The training steps of one producer, those that it repeats after a restart included."""

    def __init__(self, step: int) -> None:
        self.made = self.step = step

    def reach(self, step: int) -> None:
        """The producer has come to ``step``."""
        self.made += max(0, step - self.step)
        self.step = max(step, self.step)

    def resume(self, step: int) -> None:
        """The producer goes on from ``step``, which may be one of an earlier checkpoint."""
        self.reach(step)
        self.step = step

    def at(self, step: int) -> int:
        """The count when the producer was at ``step``, since it last began."""
        return self.made - max(0, self.step - step)


class Producer:
    """One task, as it announced itself, and how far it is."""

    def __init__(self, new: Announcement, count: StepCount) -> None:
        self.task, self.quantities = new.task, new.quantities
        self.trains, self.on_demand = new.trains, new.on_demand
        self.steps_per_visit = new.steps_per_visit
        self.count = count
        self.published: Place | None = None
        """The last place in the mediator's order at which it published."""
        if new.place is not None:  # what it published before is on the shelf, or is lost
            self.published = new.place._replace(visit=new.place.visit - 1)
