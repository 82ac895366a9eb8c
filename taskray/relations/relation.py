"""A relation: what must hold between quantities, as a loss on unlabelled data.

A relation of your own subclasses :class:`Relation`; a job names it by import path. One with
parameters derives from ``torch.nn.Module`` first (``class Mine(nn.Module, Relation)``) and defines
``forward`` instead of ``__call__``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from taskray.tasks.task import Task


class Path(NamedTuple):
    """A quantity as a relation makes it of other predictions; see ``relations.energy``."""

    prediction: Tensor
    """``[B, C, H, W]``, as a task predicts it."""
    valid: Tensor
    """``[B, 1, H, W]`` bool: the pixels at which the relation gives a value."""


class Relation(ABC):
    """One consistency loss. Its ``__init__`` arguments are what a job may set."""

    quantities: tuple[str, ...]
    """Predicted quantities that the relation ties together."""
    constant: tuple[str, ...] = ()
    """Those of them that get no gradient. A task that predicts only these learns nothing from the
    relation and predicts for its peers."""
    inputs: tuple[str, ...] = ()
    """Columns of the batch that it needs besides predictions."""
    labels: tuple[str, ...] = ()
    """Label columns that it needs. Only a relation inside one task may have some, because labels
    of the mediator are never read; it is left out of batches without them."""
    sources: tuple[str, ...] = ()
    """Those of its quantities that it also needs on the task's labelled batch of the same step, so
    ``mediator.with_labels`` must be set; they are named by :func:`at_source`."""

    def check_tasks(self, tasks: Mapping[str, Task]) -> None:
        """Raise InputError for tasks whose predictions this relation cannot compare. ``tasks`` are
        all simple tasks (:attr:`taskray.tasks.task.Task.heads`) that predict one of its quantities,
        by name. By default any tasks are accepted."""
        return None

    def build_for(self, tasks: Mapping[str, Task]) -> None:
        """Build what depends on the tasks: layers for the classes of a segmentation. Called once
        before the first use; ``tasks`` as in :meth:`check_tasks`, that which learns the relation
        first, or the heads of one task alone where it predicts all of the quantities."""
        return None

    def paths(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Path]:
        """What the relation makes of the other predictions, by quantity; by default nothing. The
        arguments are those of :meth:`__call__`."""
        return {}

    @abstractmethod
    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Named scalar terms whose sum is the loss; it is 0 where all predictions are true.

        ``predictions`` contains every quantity of ``quantities``, ``[B, ...]`` float32. Those of
        peers are detached, so the gradient reaches only those of the task that trains. It also
        contains every quantity of ``sources``, under its other name.
        """


def at_source(quantity: str) -> str:
    """The name of a prediction on the task's labelled batch among those that a relation gets:
    ``depth`` -> ``source:depth``."""
    return f"source:{quantity}"
