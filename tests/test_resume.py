"""A run whose driver is killed goes on from its checkpoints: the real command, the real signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from collectives import tiny_job

from taskray.exchange.shared_memory import ROOT
from taskray.job.config import dump_yaml
from taskray.record.folder import read_metrics, read_result
from taskray.runtime.checkpoints import CheckpointStore

pytestmark = pytest.mark.ray  # a Ray of its own, in each run

TASKRAY = [sys.executable, "-m", "taskray", "train"]


def start(job: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TASKRAY, str(job), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(out: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        steps: dict[str, int] = {}
        for line in read_metrics(out):
            if "values" in line:
                steps[line["task"]] = line["step"]
        if len(steps) == 2 and min(steps.values()) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no task came to step {step}")


def processes_of(pid: int) -> set[int]:
    """A process and all that it has started, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def shared_memory_of(pids: set[int]) -> set[Path]:
    """The folders in shared memory that processes have open."""
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                target = link.readlink()
                if target.parent == ROOT and target.name.startswith("taskray-"):
                    found.add(target)
    return found


def newest_checkpoint(out: Path, task: str) -> int:
    return CheckpointStore(out / "checkpoints").steps(task)[-1]


def test_a_killed_run_resumes_and_an_interrupted_one_leaves_checkpoints(tmp_path):
    job, out = tmp_path / "job.yaml", tmp_path / "run"
    job.write_text(dump_yaml(tiny_job("steps=4000", "runtime.chunk_steps=2")))

    with start(job, out) as first:
        wait_for_step(out, 20)
        processes = processes_of(first.pid)
        left = shared_memory_of(processes)
        assert len(left) == 1
        for pid in processes:  # the driver, the cache, the tasks and Ray
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    killed_at = max(line["step"] for line in read_metrics(out) if "values" in line)
    saved = {name: newest_checkpoint(out, name) for name in ("depth", "normals")}
    assert read_result(out) is None

    with start(job, out) as second:
        wait_for_step(out, max(killed_at, *saved.values()) + 10)
        assert not any(folder.exists() for folder in left)
        left = shared_memory_of(processes_of(second.pid))
        assert len(left) == 1
        os.kill(second.pid, signal.SIGINT)
        text = second.communicate(timeout=60)[0]
    assert second.returncode == 130, text
    assert "Traceback" not in text
    assert not any(folder.exists() for folder in left)
    lines = read_metrics(out)
    gone_on = [line for line in lines if "goes on from step" in line.get("event", "")]
    assert {line["task"] for line in gone_on} == {"depth", "normals"}
    for line in gone_on:
        # Not from less; perhaps from more: a task may save before it is killed.
        assert line["step"] >= saved[line["task"]] >= 10
        first_step = next(
            later["step"]
            for later in lines[lines.index(line) :]
            if later["task"] == line["task"] and "values" in later
        )
        assert line["step"] < first_step <= line["step"] + 2  # a chunk is reported at its end
    times = [line["time"] for line in lines]
    assert times == sorted(times)

    result = read_result(out)
    assert result["status"] == "interrupted"
    for name, task in result["tasks"].items():
        assert task["supervised_steps"] + task["consistency_steps"] == task["steps"]
        assert newest_checkpoint(out, name) >= task["steps"]  # Ctrl-C wrote it
