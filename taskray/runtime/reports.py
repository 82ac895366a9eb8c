"""What a task's process answers to the driver, besides ``loop.report.ChunkReport``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SetupReport:
    """The task is ready to train."""

    step: int
    """The step that it goes on from."""
    pid: int


@dataclass(frozen=True)
class StandByReport:
    """The task has made its last step."""

    step: int
    needed: bool
    """Whether peers may still ask it to predict."""
