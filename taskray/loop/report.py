"""What a task reports to the driver after a chunk of steps."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from taskray.loop.meters import Totals


@dataclass
class ChunkReport:
    """``values`` are means over the steps since the last report, by metric name; ``totals`` are
    counts since the run began."""

    task: str
    step: int
    """Steps made so far."""
    values: dict[str, float]
    totals: Totals
    corrupt_rows: int = 0
    """Rows that could not be used so far."""
    warnings: tuple[str, ...] = ()
    """What is unusual in these steps, each in one line."""
    pid: int = field(default_factory=os.getpid)
    """The process that made the steps."""
