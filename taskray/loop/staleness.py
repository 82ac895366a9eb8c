"""How old a prediction may be: the bound is a contract, checked wherever one is used."""

from __future__ import annotations

from dataclasses import dataclass

from taskray.config import StalenessConfig


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
