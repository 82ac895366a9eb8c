"""The runtime on real Ray actors, with faults injected for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from collectives import Watch, kill, run, tiny_job

from taskray.data.streams.batch import Batch
from taskray.exchange.messages import Query
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.peers import CachePeers
from taskray.runtime.placement import place_cache

pytestmark = pytest.mark.usefixtures("ray_session")


def pid_of(actor: Any) -> int:
    pid: int = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=30)
    return pid


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the actors have: sums taken in another order differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_staleness_zero_with_wait_reproduces_the_inline_losses(tmp_path):
    job = tiny_job(
        "steps=50",
        "tasks.depth.task.loss=log_mse",
        "staleness={max_steps: 0, on_stale: wait}",
        "cache.dtype=float32",
        "runtime.chunk_steps=1",
        "checkpoint.every=1000",
    )
    inline, actors = Watch(), Watch()
    run(job, tmp_path / "inline", inline, inline=True)
    result = run(job, tmp_path / "actors", actors)
    for task in job.tasks:
        assert len(actors.losses(task)) == 50
        assert actors.losses(task) == pytest.approx(inline.losses(task), abs=1e-5)
        assert result["tasks"][task]["skipped_consistency_steps"] == 0
    for edge in result["staleness"].values():
        assert edge["steps_max"] == 0
        assert edge["hit_rate"] == 1


def test_a_killed_task_resumes_from_its_checkpoint_and_its_peers_train_on(tmp_path):
    killed: list[float] = []

    def act(report: dict[str, Any]) -> None:
        if not killed and report.task == "depth" and report.step >= 40:
            killed.append(time.monotonic())
            kill(report.pid)

    job = tiny_job(
        "steps=200", "tasks.normals.steps=1500", "runtime.chunk_steps=2", "checkpoint.every=20",
        "mediator.visits=100",  # both are in one window when it happens, whoever is ahead
    )  # fmt: skip
    watch = Watch(act)
    result = run(job, tmp_path, watch)
    assert result["status"] == "finished"
    assert result["tasks"]["depth"]["restarts"] == 1
    assert result["tasks"]["normals"]["restarts"] == 0
    assert result["tasks"]["depth"]["steps"] == 200
    assert any("lost its process" in event for event in watch.events)
    goes_on = re.compile(r"'depth' goes on from step (\d+)")
    steps = [int(found[1]) for event in watch.events if (found := goes_on.search(event))]
    assert len(steps) == 1  # at 40, or later where the kill came late
    assert 40 <= steps[0] < 200
    assert steps[0] % 20 == 0
    back = next(when for when, report in watch.of("depth") if when > killed[0] + 0.01)
    assert watch.longest_pause("normals", killed[0], back) < 1.0
    served = [
        report.values.get("hit_rate/depth", 0.0)
        for when, report in watch.of("normals")
        if killed[0] < when < back
    ]
    assert max(served) > 0  # the dead task's predictions were still there


def test_a_task_that_dies_too_often_fails_alone(tmp_path):
    def act(report: dict[str, Any]) -> None:
        if report.task == "depth" and report.step >= 10:
            kill(report.pid)

    result = run(tiny_job("runtime.max_restarts=1"), tmp_path, Watch(act))
    assert result["status"] == "failed"
    assert "process lost, after 1 restarts" in result["tasks"]["depth"]["error"]
    assert result["tasks"]["normals"]["steps"] == 40
    assert result["tasks"]["normals"]["metrics"]


def test_a_task_killed_before_it_is_measured_is_measured_from_its_checkpoint(tmp_path):
    def kill_depth_at_the_end(collective: Any) -> None:
        add = collective.add_evaluations

        def add_and_kill(data: dict[str, Any]) -> None:
            add(data)
            kill(pid_of(collective.actors["depth"]))

        collective.add_evaluations = add_and_kill

    watch = Watch()
    result = run(tiny_job("steps=10"), tmp_path, watch, before=kill_depth_at_the_end)
    assert result["status"] == "finished"
    assert result["tasks"]["depth"]["restarts"] == 1
    assert all(task["metrics"] for task in result["tasks"].values())
    assert any("lost" in event for event in watch.events)


def test_the_cache_may_be_killed(tmp_path):
    pids: list[int] = []
    seen: list[float] = []

    def act(report: dict[str, Any]) -> None:
        if pids and report.task == "depth" and report.step >= 40:
            kill(pids.pop())
            seen.append(time.monotonic())

    job = tiny_job("steps=800", "runtime.chunk_steps=2")
    watch = Watch(act)
    result = run(job, tmp_path, watch, before=lambda c: pids.append(pid_of(c.cache)))
    assert seen
    assert result["status"] == "finished"
    for task in job.tasks:
        assert result["tasks"][task]["restarts"] == 0
        assert watch.longest_pause(task, seen[0], time.monotonic()) < 1.0
        last = watch.of(task)[-1][1]["values"]
        assert any(name.startswith("hit_rate") for name in last)
    assert result["cache"]["publishes"] > 100  # the new one was published to
    rates = [r["values"].get("hit_rate/normals", 0) for _, r in watch.of("depth")[-40:]]
    assert max(rates) > 0.5


def test_a_restarted_cache_learns_again_which_task_has_failed(tmp_path):
    pids: list[int] = []

    def act(report: dict[str, Any]) -> None:
        if pids and report.task == "normals" and report.step >= 40:
            kill(pids.pop())

    job = tiny_job(
        "tasks.depth.task=faults:DepthThatBecomesNaN",
        "staleness.on_stale=wait",
        "staleness.wait_seconds=30",
        "steps=80",
    )
    watch = Watch(act)
    result = run(job, tmp_path, watch, before=lambda c: pids.append(pid_of(c.cache)))
    assert not pids
    assert "not finite" in result["tasks"]["depth"]["error"]
    assert result["tasks"]["normals"]["steps"] == 80
    assert watch.longest_pause("normals", watch.reports[0][0], time.monotonic()) < 15


@pytest.mark.parametrize("settings", ["runtime.publisher=forward_server", "on_stale"])
def test_a_forward_server_may_be_killed(tmp_path, settings):
    pids: list[int] = []

    def act(report: dict[str, Any]) -> None:
        if pids and report.task == "depth" and report.step >= 40:
            kill(pids.pop())

    if settings == "on_stale":
        settings = "staleness={max_steps: 30, on_stale: forward_server}"
    job = tiny_job("steps=2000", "runtime.chunk_steps=5", settings)
    watch = Watch(act)
    result = run(job, tmp_path, watch, before=lambda c: pids.append(pid_of(c.servers["normals"])))
    assert not pids
    assert result["status"] == "finished"
    assert {t["restarts"] for t in result["tasks"].values()} == {0}
    rates = [r["values"].get("hit_rate/normals", 0) for _, r in watch.of("depth")]
    assert max(rates[-10:]) > 0.5  # the new server got its weights again
    bound = job.staleness.max_steps
    if bound is not None:
        assert result["staleness"]["depth<-normals"]["steps_max"] <= bound


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("faults:DepthThatBecomesNaN", "not finite"),
        ("faults:DepthThatRaises", "RuntimeError: the label store is on fire"),
        ("faults:HalfSizeDepth", "'depth' has shape 4x1x16x24, expected 4x1x32x48"),
    ],
)
def test_a_task_that_goes_wrong_is_named_and_nobody_else_is_affected(tmp_path, task, reason):
    watch = Watch()
    result = run(tiny_job(f"tasks.depth.task.name={task}"), tmp_path, watch)
    assert result["status"] == "failed"
    error = result["tasks"]["depth"]["error"]
    assert error.startswith("task 'depth' failed at step ")
    assert reason in error
    assert error in watch.events
    assert result["tasks"]["depth"]["restarts"] == 0
    assert result["tasks"]["normals"]["steps"] == 40
    assert result["tasks"]["normals"]["error"] is None
    assert result["tasks"]["normals"]["metrics"]


def test_whoever_is_too_slow_to_write_its_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("taskray.runtime.collective.SAVE_TIMEOUT", 0.5)
    run(tiny_job("steps=20"), tmp_path, inline=True)

    def act(report: dict[str, Any]) -> None:
        if report.task == "normals" and report.step >= 30:
            raise KeyboardInterrupt

    job = tiny_job("steps=100", "tasks.depth.task={name: faults:SlowDepth, seconds: 2}")
    watch = Watch(act)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, watch)
    (late,) = [event for event in watch.events if "wrote no checkpoint" in event]
    assert late == "task 'depth' wrote no checkpoint within 0.5 s; the last is of step 20"


def test_ctrl_c_does_not_wait_for_whoever_waits_for_a_stopped_peer(tmp_path):
    job = tiny_job(
        "tasks.normals.dedicated=null", "tasks.depth.task={name: 'faults:SlowDepth', seconds: 0.2}",
        "runtime.chunk_steps=2",
    )  # fmt: skip

    stopped: list[float] = []

    def interrupt(report: dict[str, Any]) -> None:
        stopped.append(time.monotonic())
        raise KeyboardInterrupt

    watch = Watch(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, watch)
    assert not [event for event in watch.events if "wrote no checkpoint" in event]
    for task in job.tasks:  # the chunks that were under way are reported, too
        last = watch.of(task)[-1][1]["step"]
        assert [last] == CheckpointStore(tmp_path / "checkpoints").steps(task)[-1:]
    assert time.monotonic() - stopped[0] < 30.0


def test_a_slow_task_does_not_slow_its_peers_and_is_of_use_to_them(tmp_path):
    alone = run(tiny_job("steps=200"), tmp_path / "fast")
    slow = run(
        tiny_job(
            "steps=200",
            "tasks.depth.task={name: 'faults:SlowDepth', seconds: 0.1}",
            "tasks.depth.steps=20",
        ),
        tmp_path / "slow",
    )
    rates = [r["tasks"]["normals"]["steps_per_second"] for r in (alone, slow)]
    assert slow["tasks"]["depth"]["steps_per_second"] < 0.5 * rates[1]
    assert rates[1] > 0.5 * rates[0]  # in step with the slow one: a tenth
    # it stays where the slow one has been, or it would be alone from the second window on
    assert slow["staleness"]["normals<-depth"]["hit_rate"] > 0.05


FAULTS_OF_A_STEP = """
import resource, torch
from taskray.runtime.process import keep_freed_memory

torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        held = [torch.ones(4 << 20) for _ in range(2)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="says so of glibc alone")
def test_a_step_gets_its_memory_back_without_page_faults():
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_A_STEP], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 1000  # 20 times 32 MB are 160,000 pages


def test_waiting_tasks_are_served_by_one_that_is_done(tmp_path):
    result = run(tiny_job("staleness.on_stale=wait", "tasks.depth.steps=10", "steps=60"), tmp_path)
    assert result["tasks"]["normals"]["skipped_consistency_steps"] == 0
    assert result["cache"]["waits_given_up"] == 0


def test_waiting_tasks_that_resume_apart_do_not_wait_for_each_other(tmp_path):
    waits = ("staleness.on_stale=wait", "evaluation.data={}")
    run(tiny_job(*waits, "steps=20"), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "depth" / "step_20")  # it goes on from step 10
    began = time.monotonic()
    result = run(tiny_job(*waits, "steps=40"), tmp_path)
    assert result["tasks"]["depth"]["steps"] == result["tasks"]["normals"]["steps"] == 40
    assert 0 < result["cache"]["waits_given_up"] < 8
    assert time.monotonic() - began < 60.0  # 60 s is what one wait in vain would take


def test_supervised_steps_age_what_the_task_has_predicted(tmp_path):
    job = tiny_job("mediator.supervised_steps=9")
    cache = place_cache(job)
    peers = CachePeers(job, "depth", ("depth",), {"normals": 0}, cache)
    peers.announce(0, torch.nn.Identity())
    depth = {"depth": torch.ones(2, 1, 4, 6)}
    peers.publish(Batch({}, 3), 9, depth)
    for step in range(10, 18):
        peers.stepped(step, torch.nn.Identity())
    peers.retire()  # waits for everything told
    found = ray.get(cache.look_up.remote(Query("normals", 3, ("depth",))))
    assert found["depth"].staleness_steps >= 17 - 9 - 2


def test_a_task_without_labels_does_not_run_away_from_a_slower_peer(tmp_path):
    job = tiny_job(
        "steps=32", "tasks.normals.dedicated=null", "tasks.depth.steps=8",
        "tasks.depth.task={name: 'faults:SlowDepth', seconds: 0.1}",
    )  # fmt: skip
    normals = run(job, tmp_path)["tasks"]["normals"]
    assert normals["consistency_steps"] == 32
    assert normals["skipped_consistency_steps"] <= 4


def test_bad_predictions_are_refused_and_the_peer_trains_on_its_labels(tmp_path):
    result = run(tiny_job("tasks.depth.task.name=faults:OverflowingDepth"), tmp_path)
    assert result["cache"]["refused"] > 0
    assert "not finite" in next(iter(result["cache"]["refusals"]))
    assert result["tasks"]["normals"]["steps"] == 40
    assert result["tasks"]["normals"]["skipped_consistency_steps"] == 20


def test_a_prediction_beyond_the_bound_is_skipped_and_counted(tmp_path):
    job = tiny_job("steps=200", "staleness.max_steps=6", "mediator.window=8")
    result = run(job, tmp_path)
    for edge in result["staleness"].values():
        assert edge["steps_max"] <= 6
    assert sum(t["misses"].get("stale", 0) for t in result["tasks"].values()) > 0


@pytest.mark.parametrize("publisher", ["trainer", "forward_server"])
def test_both_publishers_feed_the_peers(tmp_path, publisher):
    job = tiny_job("steps=200", f"runtime.publisher={publisher}")
    result = run(job, tmp_path)
    assert result["status"] == "finished"
    for edge in result["staleness"].values():
        assert edge["hit_rate"] > 0.2  # the leader of the two finds less than the follower


def test_staleness_follows_the_window_whatever_the_dataset(tmp_path):
    job = tiny_job("steps=160", "mediator.window=2", "mediator.visits=10", "mediator.batch_size=2")
    result = run(job, tmp_path)
    for edge in result["staleness"].values():
        assert edge["hit_rate"] > 0.2
        assert edge["steps_mean"] < 20


def test_a_restarted_run_goes_on_from_its_checkpoints(tmp_path):
    first = run(tiny_job("steps=20"), tmp_path)
    watch = Watch()
    second = run(tiny_job("steps=60"), tmp_path, watch)
    assert first["tasks"]["depth"]["steps"] == 20
    assert second["tasks"]["depth"]["steps"] == 60
    assert watch.of("depth")[0][1]["step"] > 20
    totals = second["tasks"]["depth"]
    assert totals["supervised_steps"] + totals["consistency_steps"] == 60


def test_a_run_frees_its_processes_and_no_others(tmp_path):
    before = threading.active_count()
    run(tiny_job("steps=10"), tmp_path)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and ray.available_resources().get("CPU") != 2:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == 2
    assert threading.active_count() <= before + 2
