"""What a run writes and shows while it trains."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from taskray.loop.report import ChunkReport
from taskray.record.folder import RunFolder
from taskray.report.live import Live


class Listener(Protocol):
    """Somebody else who wants each task's reports as they come: a Tune trial, a benchmark."""

    def __call__(self, task: str, step: int, values: Mapping[str, float]) -> None: ...


class Recorder:
    """Looks on while the collective trains: writes files, draws the table, tells a listener."""

    def __init__(self, files: RunFolder, live: Live, listener: Listener | None = None) -> None:
        self.files, self.live, self.listener = files, live, listener
        self.began = time.monotonic()
        self.events: list[dict[str, Any]] = []

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resumption included."""
        return self.files.elapsed + time.monotonic() - self.began

    def report(self, report: ChunkReport, restarts: int) -> None:
        task, step, values = report.task, report.step, report.values
        self.files.log(task, step, self.elapsed, values)
        self.live.update(task, step, values, restarts)
        if self.listener is not None:
            self.listener(task, step, values)

    def event(self, text: str, task: str | None = None, step: int | None = None) -> None:
        self.files.event(text, self.elapsed, task, step)
        self.live.event(text)
        self.events.append({"event": text, "task": task, "step": step})


def hardware() -> str:
    """What the run ran on, for whoever reads the result."""
    gpus = torch.cuda.device_count()
    card = f", {gpus} x {torch.cuda.get_device_name(0)}" if gpus else ""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}){card}, torch {torch.__version__}"
