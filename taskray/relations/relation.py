"""A relation: what must hold between quantities, as a loss on unlabelled data.

A relation of your own subclasses :class:`Relation`; a job names it by import path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from taskray.tasks.task import Task


class Relation(ABC):
    """One consistency loss. Its ``__init__`` arguments are what a job may set."""

    quantities: tuple[str, ...]
    """Predicted quantities that the relation ties together."""
    constant: tuple[str, ...] = ()
    """Those of them that get no gradient: a task that predicts no other only teaches here."""
    inputs: tuple[str, ...] = ()
    """Columns of the mediator batch that it needs besides predictions."""

    def check_tasks(self, tasks: Mapping[str, Task]) -> None:
        """Refuse (InputError) tasks, by name, whose predictions this relation cannot compare; all
        that predict one of its quantities are given. Any will do, unless a relation says so."""
        return None

    @abstractmethod
    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Named scalar terms whose sum is the loss; it vanishes where all predictions are true.

        ``predictions`` holds every quantity of ``quantities``, ``[B, ...]`` float32. Those of
        peers are detached, so the gradient reaches the live ones alone, whichever they are.
        """
