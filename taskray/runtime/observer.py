"""Where a collective reports to."""

from __future__ import annotations

from typing import Protocol

from taskray.loop.report import ChunkReport


class Observer(Protocol):
    """Follows the training: files, a live table, Tune."""

    def report(self, report: ChunkReport, restarts: int) -> None:
        """A task has ended a chunk."""
        ...

    def event(self, text: str, task: str | None = None, step: int | None = None) -> None:
        """Something happened that a person should know."""
        ...
