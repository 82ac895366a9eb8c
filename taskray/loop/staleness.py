"""How old a prediction may be: the bound is a contract, checked wherever one is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from taskray.errors import InputError
from taskray.job.config import Job, StalenessConfig


@dataclass(frozen=True)
class Version:
    """Which model made a prediction, and when (seconds of the producer's clock)."""

    producer_step: int
    produced_at: float

    def staleness(self, producer_now: int) -> int:
        """Steps that the producer has made since. A producer that went back to a checkpoint is
        behind its own predictions for a while: they count as fresh."""
        return max(0, producer_now - self.producer_step)


def within(bound: StalenessConfig, version: Version, producer_now: int, now: float) -> bool:
    """Whether a prediction of this version may be used."""
    if bound.max_steps is not None and version.staleness(producer_now) > bound.max_steps:
        return False
    return bound.max_seconds is None or now - version.produced_at <= bound.max_seconds


def worth_waiting_for(
    bound: StalenessConfig, version: Version | None, consumer_step: int, now: float
) -> bool:
    """Whether a consumer that waits should wait on: the prediction at hand is not fresh enough.

    Waiting needs a clock that does not run away while one waits, so it goes by the consumer's:
    the producer must have come to within ``max_steps`` of the consumer's own step. With
    ``max_steps: 0`` two tasks that wait for each other walk in lock-step.
    """
    if version is None:
        return True
    if bound.max_steps is not None and version.producer_step < consumer_step - bound.max_steps:
        return True
    return bound.max_seconds is not None and now - version.produced_at > bound.max_seconds


def check_waiting(job: Job, tied: Collection[str], begins: Mapping[str, int]) -> None:
    """Refuse a bound that tasks of one relation could only wait for in vain, each of the other,
    at nearly every step. ``begins``: when the first relation of each task does. InputError names
    the key and the smallest bound that is none.

    Without labels a task makes mediator batch k at its step k. One with labels makes it later, by
    the supervised steps it has made so far (all of them, before the first relation begins), and
    the other, which waits for that very batch, never comes nearer.
    """
    bound, alternation = job.staleness, job.mediator
    if bound.on_stale != "wait" or bound.max_steps is None or alternation is None:
        return
    training = [name for name in tied if name not in job.frozen]
    labelled = [name for name in training if job.labels_of(name) is not None]
    others = [name for name in training if name not in labelled]
    if not labelled or not others:
        return
    needed = max(
        begins[name]
        + sum(not alternation.has_turn(step) for step in range(begins[name], job.steps_of(name)))
        for name in labelled
    )
    if bound.max_steps < needed:
        raise InputError(
            f"staleness.max_steps: {labelled[0]!r} has labels and {others[0]!r} has none: their "
            f"steps on one mediator batch are up to {needed} apart, and with on_stale 'wait' both "
            f"would wait in vain; expected null or at least {needed} (got {bound.max_steps})"
        )
