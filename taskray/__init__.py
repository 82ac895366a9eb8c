"""Asynchronous collective training of vision tasks on Ray.

Each task is an actor with its own model, optimizer and labelled dataset. Consistency losses connect
the tasks: each task compares its predictions on a shared unlabelled dataset with the stale
predictions of its peers. Start with ``taskray.loop.trainer`` and ``taskray.exchange.cache``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Job",
    "Reader",
    "Relation",
    "Task",
    "TaskrayError",
    "TrainingError",
    "load_job",
    "train",
]

if TYPE_CHECKING:
    from taskray.data.readers.reader import Reader
    from taskray.errors import InputError, TaskrayError, TrainingError
    from taskray.job.config import Job, load_job
    from taskray.relations.relation import Relation
    from taskray.run.train import train
    from taskray.tasks.task import Task

_HOMES = {
    "InputError": "taskray.errors",
    "Job": "taskray.job.config",
    "Reader": "taskray.data.readers.reader",
    "Relation": "taskray.relations.relation",
    "Task": "taskray.tasks.task",
    "TaskrayError": "taskray.errors",
    "TrainingError": "taskray.errors",
    "load_job": "taskray.job.config",
    "train": "taskray.run.train",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``taskray --help`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'taskray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
