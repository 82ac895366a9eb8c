"""The loop of all tasks in one process: what its own backend has to see to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import Watch, run, tiny_job

from taskray.job.config import dump_yaml
from taskray.loop.network import Network
from taskray.loop.trainer import Trainer
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.inline import InlineCollective

TASKRAY = [sys.executable, "-c", "import sys; sys.modules['ray'] = None; import taskray.cli as c;"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_after_ctrl_c_the_result_and_the_checkpoints_are_of_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collectives: list[InlineCollective] = []
    step = InlineCollective._step

    def interrupted(self: InlineCollective, living: dict[str, Any]) -> None:
        if living["depth"].trainer.steps_made == 17:
            raise KeyboardInterrupt
        step(self, living)

    monkeypatch.setattr(InlineCollective, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_job("runtime.chunk_steps=10"), tmp_path, inline=True, before=collectives.append)
    result = collectives[0].result(0.0)
    assert result["status"] == "interrupted"
    store = CheckpointStore(tmp_path / "checkpoints")
    for name, task in result["tasks"].items():
        assert store.steps(name)[-1] == task["steps"] == 17
        assert task["supervised_steps"] + task["consistency_steps"] == 17


def test_every_task_finds_its_peers_at_every_consistency_step(tmp_path: Path) -> None:
    result = run(tiny_job("steps=24", "mediator.window=2"), tmp_path, inline=True)
    for task in result["tasks"].values():
        assert task["consistency_steps"] == 12
        assert task["replaced_by_supervised"] == task["skipped_consistency_steps"] == 0
    assert set(result["staleness"]) == {"depth<-normals", "normals<-depth"}
    for edge in result["staleness"].values():
        assert (edge["hit_rate"], edge["steps_max"]) == (1.0, 0.0)


def test_each_task_computes_with_its_own_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[int]] = {"depth": set(), "normals": set()}
    predict = Network.predict

    def counting(self: Network, *arguments: Any) -> Any:
        if self.module.training:  # not where a peer asks, or an evaluation
            used[self.task.quantities[0]].add(torch.get_num_threads())
        return predict(self, *arguments)

    monkeypatch.setattr(Network, "predict", counting)
    job = tiny_job("steps=6", "tasks.depth.threads=1", "tasks.normals.threads=2")
    run(job, tmp_path, inline=True)
    assert used == {"depth": {1}, "normals": {2}}


def test_a_task_that_names_no_threads_is_not_bound_by_its_peers_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    used: set[int] = set()
    step = Trainer.step

    def counting(self: Trainer) -> Iterator[None]:
        for half in step(self):
            used.add(torch.get_num_threads()) if self.name == "normals" else None
            yield half

    monkeypatch.setattr(Trainer, "step", counting)
    run(tiny_job("steps=4", "tasks.depth.threads=1"), tmp_path, inline=True)
    assert used == {2}


def test_a_run_in_one_process_and_its_evaluation_need_no_ray(tmp_path: Path) -> None:
    job, out = tmp_path / "job.yaml", tmp_path / "run"
    job.write_text(dump_yaml(tiny_job("steps=4", "tasks.depth.threads=1")))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for arguments in (["train", str(job), "--inline", "--out", str(out)], ["evaluate", str(out)]):
        command = [*TASKRAY[:2], f"{TASKRAY[2]} sys.exit(c.main({arguments!r}))"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert (out / "result.json").is_file()


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_the_error_of_a_first_step_ends_the_run_unless_the_job_continues(tmp_path, on_failure):
    watch = Watch()
    faulty = "tasks.depth.task.name=faults:HalfSizeDepth"
    job = tiny_job(faulty, f"runtime.on_failure={on_failure}", "steps=6")
    result = run(job, tmp_path, watch, inline=True, measured=True)
    assert result["status"] == "failed"
    assert result["error"].startswith("task 'depth' failed at step 0: ")
    normals = result["tasks"]["normals"]
    if on_failure == "continue":
        assert normals["steps"] == 6
        assert normals["metrics"]
    else:
        assert normals["steps"] <= 1
        assert normals["metrics"] == {}
        assert watch.events[-1].startswith("the run ends, because task 'depth' failed before")


def test_the_error_of_a_later_step_leaves_the_peers_alone(tmp_path):
    faulty = "tasks.depth.task={name: faults:DepthThatRaises, at: 1}"
    result = run(tiny_job(faulty, "steps=6"), tmp_path, inline=True)
    assert result["status"] == "failed"
    assert result["tasks"]["normals"]["steps"] == 6
