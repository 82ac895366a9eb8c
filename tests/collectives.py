"""Small collectives for tests: a job of seconds, and a look at what happens while it runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from taskray.data.storage.source import Handle, RayHandle, load_in_process
from taskray.job.config import EvaluationConfig, Job, override, parse_job
from taskray.loop.report import ChunkReport
from taskray.run.datasets import Opener, prepare_datasets
from taskray.run.train import make_collective

WORLD = {"name": "world", "height": 32, "width": 48, "num_samples": 32}


def tiny_job(*overrides: str) -> Job:
    """Depth and normals on 32 tiny frames each; a step takes milliseconds."""
    model = {"name": "unet", "base": 8, "depth": 2}
    optimizer = {"lr": 0.003}
    task = {"dedicated": "labelled", "model": model, "optimizer": optimizer, "batch_size": 4}
    values: dict[str, Any] = {
        "name": "tiny",
        "steps": 40,
        "data": {
            "labelled": {"reader": {**WORLD, "domain": "sim"}},
            "unlabelled": {"reader": {**WORLD, "domain": "real"}},
            "test": {"reader": {**WORLD, "domain": "real", "split": "test", "num_samples": 8}},
        },
        "tasks": {"depth": {**task, "task": "depth"}, "normals": {**task, "task": "normals"}},
        "mediator": {"data": "unlabelled", "batch_size": 4, "window": 4, "visits": 4},
        "consistency": {"depth_normals": {"relation": "depth_normals"}},
        "evaluation": {"data": {"test": "test"}},
        "checkpoint": {"every": 10},
        "runtime": {"chunk_steps": 5},
    }
    return parse_job(override(values, overrides), "tiny job")


class Watch:
    """Sees every report and event, with the time, and may act on them."""

    def __init__(self, act: Callable[[ChunkReport], None] = lambda report: None) -> None:
        self.act = act
        self.reports: list[tuple[float, ChunkReport]] = []
        self.events: list[str] = []

    def report(self, report: ChunkReport, restarts: int) -> None:
        self.reports.append((time.monotonic(), report))
        self.act(report)

    def event(self, text: str, task: str | None = None, step: int | None = None) -> None:
        self.events.append(text)

    def of(self, task: str) -> list[tuple[float, ChunkReport]]:
        return [(when, report) for when, report in self.reports if report.task == task]

    def losses(self, task: str) -> list[float]:
        """The task's loss at every step (for ``chunk_steps: 1``)."""
        values = [report.values for _, report in self.of(task)]
        return [v.get("loss/supervised", v.get("loss/consistency", 0.0)) for v in values]


class LocalOpener(Opener):
    """Decodes what is to be in memory in this process: a plan of Ray Data takes longer than most
    runs here. Tests of datasets and of whole commands have it."""

    def _open(self, name: str, columns: Sequence[str]) -> Handle:
        config = self.job.data[name]
        if config.materialize == "never":
            return super()._open(name, columns)
        handle = load_in_process(self.paths[name], config, columns, name=name)
        return RayHandle(handle.info, [ray.put(block) for block in handle.blocks])


def run(
    job: Job,
    folder: Path,
    watch: Watch | None = None,
    *,
    inline: bool = False,
    measured: bool = False,
    before: Callable[[Any], None] = lambda collective: None,
) -> dict[str, Any]:
    """Run a job to its result; ``before`` gets the collective before it trains. Only a test that
    looks at metrics asks for them (``measured``): each process would import torchmetrics, which
    takes longer than the training."""
    if not measured:
        job = job.model_copy(update={"evaluation": EvaluationConfig(data={})})
    collective = make_collective(job, str(folder / "checkpoints"), watch or Watch(), inline)
    paths = prepare_datasets(job, False, Console(quiet=True))
    opener = (Opener if inline else LocalOpener)(job, paths, use_ray=not inline)
    try:
        before(collective)
        data, evaluations = opener.for_training(), opener.for_evaluation()
        collective.train(data)
        collective.add_evaluations(evaluations.result())
        collective.evaluate()
        result: dict[str, Any] = collective.result(0.0)
        return result
    finally:
        collective.close()
        opener.close()


def kill(pid: int) -> None:
    """As the kernel kills when memory runs out: no handler, no goodbye."""
    os.kill(pid, signal.SIGKILL)
