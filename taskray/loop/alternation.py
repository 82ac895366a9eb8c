"""Which steps of a task are consistency steps."""

from __future__ import annotations

from collections.abc import Sequence

from taskray.job.config import Job
from taskray.loop.consistency import WeightedRelation


class Alternation:
    """Supervised and consistency steps of one task, in turn.

    Args:
        job: of the run.
        relations: of the task.
        labelled: whether the task has labels; without, every step is a consistency step.
    """

    def __init__(self, job: Job, relations: Sequence[WeightedRelation], labelled: bool) -> None:
        self.mediator, self.relations, self.labelled = job.mediator, relations, labelled
        self.teacher_only = all(relation.scale == 0 for relation in relations)
        """Whether the task predicts for its peers and learns nothing from them."""
        self._by_server = job.runtime.publisher == "forward_server"

    def is_consistency_step(self, step: int) -> bool:
        """Whether the step is spent on the mediator."""
        if self.mediator is None or not self.relations:
            return False
        if not self.labelled:
            return True
        if self.teacher_only and self._by_server:  # its server predicts for it
            return False
        if not any(relation.has_begun(step) for relation in self.relations):
            return False
        return self.mediator.has_turn(step)
