"""What a run writes and prints while it trains."""

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
    """A function that is called with every report of every task: a Tune trial, a benchmark."""

    def __call__(self, task: str, step: int, values: Mapping[str, float]) -> None: ...


class Recorder:
    """Receives reports and events of the collective: writes them to the run folder, updates the
    live table, and calls the listener."""

    def __init__(self, files: RunFolder, live: Live, listener: Listener | None = None) -> None:
        self.files, self.live, self.listener = files, live, listener
        self.began = time.monotonic()
        self.events: list[dict[str, Any]] = []

    @property
    def elapsed(self) -> float:
        """Seconds of training, including those before the run was resumed."""
        return self.files.elapsed + time.monotonic() - self.began

    def report(self, report: ChunkReport, restarts: int) -> None:
        task, step, values = report.task, report.step, report.values
        self.files.log(task, step, self.elapsed, values)
        self.live.update(task, step, values, restarts)
        for warning in report.warnings:
            if warning not in {event["event"] for event in self.events}:  # once, not every chunk
                self.event(warning, task, step)
        if self.listener is not None:
            self.listener(task, step, values)

    def event(self, text: str, task: str | None = None, step: int | None = None) -> None:
        self.files.event(text, self.elapsed, task, step)
        self.live.event(text)
        self.events.append({"event": text, "task": task, "step": step})


def hardware() -> str:
    """CPU, GPU and torch of this machine, in one line for ``result.json``."""
    gpus = torch.cuda.device_count()
    card = f", {gpus} x {torch.cuda.get_device_name(0)}" if gpus else ""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}){card}, torch {torch.__version__}"
