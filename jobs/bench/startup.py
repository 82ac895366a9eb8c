"""Seconds from launching ``taskray train jobs/depth_normals.yaml`` to its first optimizer step.

Each time a fresh process, as a person starts it, with the datasets already converted. The job is
the main job but for ``runtime.chunk_steps=1``, so that the first step of a task is reported (a
line in ``metrics.jsonl``, looked at every 10 ms) as soon as it is made. Then the run is
interrupted.

  seconds              launch to the first step of the first task, median; target 20
  seconds_all_tasks    launch to the first step of the last task, median
  seconds_ray          launch to Ray being up (the run folder gets its ``config.yaml``), median
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import (
    MAIN_JOB,
    PATIENCE,
    finish,
    main_job,
    median,
    parse,
    parser,
    say,
    small_job,
)
from rich.console import Console

from taskray.job.config import Job, dump_yaml
from taskray.run.datasets import prepare_datasets

QUICK = {"repetitions": 1}


def launch(job_file: Path, job: Job, folder: Path, *arguments: str) -> dict[str, float]:
    """One launch of the command, with these arguments; seconds from its begin to each milestone."""
    command = [sys.executable, "-m", "taskray", "train", str(job_file), "--out", str(folder)]
    begin = time.monotonic()
    process = subprocess.Popen(
        [*command, "--set", "runtime.chunk_steps=1", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    seconds: dict[str, float] = {}
    try:
        while len(seconds) < len(job.tasks) + 1:
            now = time.monotonic() - begin
            if process.poll() is not None or now > PATIENCE:
                errors = process.stderr.read().decode() if process.stderr else ""
                raise SystemExit(f"taskray train ended before its first step: {errors[-500:]}")
            if (folder / "config.yaml").exists():
                seconds.setdefault("ray", now)
            for task in tasks_that_stepped(folder / "metrics.jsonl"):
                seconds.setdefault(task, now)
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
    return seconds


def tasks_that_stepped(metrics: Path) -> list[str]:
    if not metrics.exists():
        return []
    lines = [json.loads(t) for t in metrics.read_text().splitlines(True) if t.endswith("\n")]
    return [line["task"] for line in lines if "values" in line]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=3)
    settings = parse(options, arguments, QUICK)
    job = small_job("evaluation.data={}", frames=64) if settings.quick else main_job()
    prepare_datasets(job, use_ray=False, console=Console(quiet=True))
    launches: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="taskray-bench-") as temporary:
        job_file = MAIN_JOB
        if settings.quick:
            job_file = Path(temporary) / "small.yaml"
            job_file.write_text(dump_yaml(job))
        for number in range(settings.repetitions):
            where = ["--inline"] if settings.quick else []  # starting Ray is what takes the time
            launches.append(launch(job_file, job, Path(temporary) / str(number), *where))
            say(f"launch {number}: {launches[-1]}")
    steps = [[at for name, at in one.items() if name != "ray"] for one in launches]
    result = {
        "seconds": median(min(times) for times in steps),
        "seconds_all_tasks": median(max(times) for times in steps),
        "seconds_ray": median(one["ray"] for one in launches),
        "launches": launches,
        "target_seconds": 20,
    }
    finish("startup", result, settings)


if __name__ == "__main__":
    main()
