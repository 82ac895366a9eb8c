"""What to do when a call to a task fails: the decision as a value, apart from its execution."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import ray

from taskray.errors import TaskrayError, TrainingError, full_traceback


class Decision(Enum):
    """RESTART the task from its own checkpoint, or let it FAIL. Its peers train on, unless the
    failure ends the run (:func:`taskray.record.result.ends_run`)."""

    RESTART = "restart"
    FAIL = "fail"


@dataclass(frozen=True)
class Verdict:
    """A decision and its reason, in one line."""

    decision: Decision
    reason: str
    error: TaskrayError | None = None


def decide(task: str, step: int, error: Exception, restarts: int, max_restarts: int) -> Verdict:
    """A lost process is started again, as often as the job allows. An error of the application
    would only come back: the task fails at once, with its name, step and cause."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        named = cause if isinstance(cause, TaskrayError) else _named(task, step, cause)
        return Verdict(Decision.FAIL, str(named), named)
    if isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed:
        named = _named(task, step, error)  # the constructor raised: it would again
        return Verdict(Decision.FAIL, str(named), named)
    if isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)):
        lost = f"task {task!r} lost its process near step {step}"
        if restarts < max_restarts:
            return Verdict(Decision.RESTART, f"{lost}; restarting it from its checkpoint")
        failure = TrainingError(task, step, f"process lost, after {restarts} restarts")
        return Verdict(Decision.FAIL, str(failure), failure)
    named = _named(task, step, error)
    return Verdict(Decision.FAIL, str(named), named)


def traceback_of(error: Exception) -> str:
    """Where an error comes from, in full, for the log; from a task's process as it was there."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return re.sub(r"\x1b\[\d*m", "", str(error))
    return full_traceback(error)


def _named(task: str, step: int, cause: Exception) -> TrainingError:
    lines = str(cause).strip().splitlines() or [""]
    return TrainingError(task, step, f"{type(cause).__name__}: {lines[-1]}")
