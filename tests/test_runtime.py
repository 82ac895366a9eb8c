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
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from collectives import Watch, kill, run, tiny_job

from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.exchange.messages import Announcement, Question
from taskray.exchange.transport import Transport
from taskray.loop.assembly import build_model, build_task
from taskray.loop.network import Network
from taskray.loop.report import ChunkReport
from taskray.loop.wiring import wire
from taskray.runtime.answering import Request
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
        assert result["tasks"][task]["replaced_by_supervised"] == 0
    for edge in result["staleness"].values():
        assert edge["steps_max"] == 0
        assert edge["hit_rate"] == 1


def test_a_killed_task_resumes_from_its_checkpoint_and_its_peers_train_on(tmp_path):
    killed: list[float] = []
    killed_pid: list[int] = []

    def act(report: ChunkReport) -> None:
        if not killed and report.task == "depth" and report.step >= 40:
            killed.append(time.monotonic())
            killed_pid.append(report.pid)
            kill(report.pid)

    job = tiny_job(
        "steps=200", "tasks.normals.steps=1500", "runtime.chunk_steps=2", "checkpoint.every=20",
        "mediator.visits=100",  # both are in one window when it happens
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
    back = next(when for when, report in watch.of("depth") if report.pid != killed_pid[0])
    alone = [report for when, report in watch.of("normals") if killed[0] < when < back]
    assert alone[-1].step - alone[0].step >= 100  # a process takes seconds to begin
    # the dead task's last predictions were still there
    assert alone[-1].totals.edges["depth"].hits - alone[0].totals.edges["depth"].hits >= 20


def test_a_task_that_dies_too_often_fails_alone(tmp_path):
    def act(report: ChunkReport) -> None:
        if report.task == "depth" and report.step >= 10:
            kill(report.pid)

    result = run(tiny_job("runtime.max_restarts=1"), tmp_path, Watch(act), measured=True)
    assert result["status"] == "failed"
    assert "process lost, after 1 restarts" in result["tasks"]["depth"]["error"]
    assert result["tasks"]["normals"]["steps"] == 40
    assert result["tasks"]["normals"]["metrics"]


def test_a_task_killed_before_it_is_measured_is_measured_from_its_checkpoint(tmp_path):
    def kill_depth_at_the_end(collective: Any) -> None:
        add = collective.add_evaluations

        def add_and_kill(data: dict[str, Any]) -> None:
            add(data)
            kill(pid_of(collective.roster.actors["depth"]))

        collective.add_evaluations = add_and_kill

    watch = Watch()
    result = run(tiny_job("steps=10"), tmp_path, watch, measured=True, before=kill_depth_at_the_end)
    assert result["status"] == "finished"
    assert result["tasks"]["depth"]["restarts"] == 1
    assert all(task["metrics"] for task in result["tasks"].values())
    assert any("lost" in event for event in watch.events)


def test_the_cache_may_be_killed(tmp_path):
    pids: list[int] = []

    def act(report: ChunkReport) -> None:
        if pids and report.task == "depth" and report.step >= 40:
            kill(pids.pop())

    job = tiny_job("steps=800", "runtime.chunk_steps=2")
    watch = Watch(act)
    result = run(job, tmp_path, watch, before=lambda c: pids.append(pid_of(c.roster.cache)))
    assert not pids
    assert result["status"] == "finished"
    for task in job.tasks:
        assert result["tasks"][task]["restarts"] == 0
        misses = result["tasks"][task]["misses"]
        # it made steps while the cache was away
        assert misses.get("timeout", 0) + misses.get("unavailable", 0) >= 10
        last = watch.of(task)[-1][1].values
        assert any(name.startswith("hit_rate") for name in last)
    assert result["cache"]["publishes"] > 100  # the new one was published to
    rates = [r.values.get("hit_rate/normals", 0) for _, r in watch.of("depth")[-40:]]
    assert max(rates) > 0.5


def test_a_restarted_cache_learns_again_which_task_has_failed(tmp_path):
    pids: list[int] = []

    def act(report: ChunkReport) -> None:
        if pids and report.task == "normals" and report.step >= 40:
            kill(pids.pop())

    job = tiny_job(
        "tasks.depth.task=faults:DepthThatBecomesNaN",
        "staleness.on_stale=wait",
        "staleness.wait_seconds=600",
        "steps=80",
    )
    result = run(job, tmp_path, Watch(act), before=lambda c: pids.append(pid_of(c.roster.cache)))
    assert not pids
    assert "not finite" in result["tasks"]["depth"]["error"]
    assert result["tasks"]["normals"]["steps"] == 80
    assert result["cache"]["timed_out"] == 0


@pytest.mark.parametrize("settings", ["runtime.publisher=forward_server", "on_stale"])
def test_a_forward_server_may_be_killed(tmp_path, settings):
    collectives: list[Any] = []
    killed: list[int] = []
    back: list[Any] = []  # the answer of the new server: it has weights

    def act(report: ChunkReport) -> None:
        server = collectives[0].roster.servers["normals"]
        if report.task != "depth" or report.step < 40:
            return
        if not killed:
            killed.append(pid_of(server))
            kill(killed[0])
        elif not back:
            answer = server.version.remote()
            with suppress(ray.exceptions.RayError):
                if ray.wait([answer], timeout=0.01)[0] and ray.get(answer) is not None:
                    back.append(report.step)
        elif report.values.get("hit_rate/normals", 0) > 0.5 or report.step > back[0] + 2000:
            raise KeyboardInterrupt

    if settings == "on_stale":
        settings = "staleness={max_steps: 30, on_stale: forward_server}"
    job = tiny_job("steps=20000", "runtime.chunk_steps=5", settings)
    watch = Watch(act)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, watch, before=collectives.append)
    reports = [r for _, r in watch.of("depth")]
    assert back
    assert {state.restarts for state in collectives[0].states.values()} == {0}
    rates = [r.values.get("hit_rate/normals", 0) for r in reports if r.step >= back[0]]
    assert max(rates) > 0.5  # the new server got its weights again
    bound = job.staleness.max_steps
    if bound is not None:
        assert reports[-1].totals.edges["normals"].summary()["steps_max"] <= bound


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("faults:DepthThatBecomesNaN", "not finite"),
        ("faults:DepthThatRaises", "RuntimeError: the label store is on fire"),
    ],
)
def test_a_task_that_goes_wrong_is_named_and_its_peers_are_not_affected(tmp_path, task, reason):
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


def test_a_task_that_fails_in_its_first_step_ends_the_run(tmp_path):
    watch = Watch()
    job = tiny_job("tasks.depth.task.name=faults:HalfSizeDepth", "steps=100000")
    result = run(job, tmp_path, watch)
    assert result["status"] == "failed"
    assert "'depth' has shape 4x1x16x24, expected 4x1x32x48" in result["error"]
    assert watch.events[-1].startswith("the run ends, because task 'depth' failed before its fi")
    assert result["tasks"]["normals"]["error"] is None
    assert result["tasks"]["normals"]["steps"] < 100000


def test_a_task_that_is_too_slow_to_write_its_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("taskray.runtime.collective.SAVE_TIMEOUT", 0.5)
    run(tiny_job("steps=20"), tmp_path, inline=True)

    def act(report: ChunkReport) -> None:
        if report.task == "normals" and report.step >= 30:
            raise KeyboardInterrupt

    job = tiny_job("steps=100", "tasks.depth.task={name: faults:SlowDepth, seconds: 2}")
    watch = Watch(act)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, watch)
    (late,) = [event for event in watch.events if "wrote no checkpoint" in event]
    assert late == "task 'depth' wrote no checkpoint within 0.5 s; the last is of step 20"


def test_ctrl_c_does_not_wait_for_a_task_that_waits_for_a_stopped_peer(tmp_path):
    job = tiny_job(
        "tasks.normals.dedicated=null", "tasks.depth.task={name: 'faults:SlowDepth', seconds: 0.2}",
        "runtime.chunk_steps=2", "staleness.wait_seconds=600",  # longer than SAVE_TIMEOUT
    )  # fmt: skip

    def interrupt(report: ChunkReport) -> None:
        raise KeyboardInterrupt

    watch = Watch(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, watch)
    assert not [event for event in watch.events if "wrote no checkpoint" in event]
    for task in job.tasks:  # the chunks that were under way are reported, too
        last = watch.of(task)[-1][1].step
        assert [last] == CheckpointStore(tmp_path / "checkpoints").steps(task)[-1:]


def test_a_slow_task_does_not_hold_up_its_peer(tmp_path):
    job = tiny_job(
        "steps=100",
        "tasks.depth.task={name: 'faults:SlowDepth', seconds: 0.1}",
        "tasks.depth.steps=40",
    )
    watch = Watch()
    run(job, tmp_path, watch)
    done = next(when for when, report in watch.of("normals") if report.step == 100)
    assert all(report.step < 40 for when, report in watch.of("depth") if when < done)


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


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_step_gets_its_memory_back_without_page_faults():
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_A_STEP], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 1000  # 20 times 32 MB are 160,000 pages


@pytest.mark.parametrize("on_stale", ["wait", "skip"])
def test_a_finished_task_predicts_on_demand(tmp_path, on_stale):
    settings = f"staleness.on_stale={on_stale}"
    watch = Watch()
    result = run(tiny_job(settings, "tasks.depth.steps=10", "steps=400"), tmp_path, watch)
    assert result["tasks"]["depth"]["steps"] == 10
    assert result["cache"]["timed_out"] == 0
    # Two windows, which are all 8 batches; depth has been on those of the first one alone.
    last = [report.values["hit_rate/depth"] for _, report in watch.of("normals")[-14:]]
    assert last == [1.0] * 14


def test_waiting_tasks_that_resume_apart_do_not_wait_for_each_other(tmp_path):
    waits = ("staleness.on_stale=wait", "staleness.wait_seconds=600", "evaluation.data={}")
    run(tiny_job(*waits, "steps=20"), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "depth" / "step_20")  # it goes on from step 10
    result = run(tiny_job(*waits, "steps=40"), tmp_path)
    assert result["tasks"]["depth"]["steps"] == result["tasks"]["normals"]["steps"] == 40
    assert result["cache"]["timed_out"] == 0


def test_supervised_steps_age_what_the_task_has_predicted(tmp_path):
    job = tiny_job("mediator.supervised_steps=9")
    wiring = wire(job)
    cache = place_cache(job, wiring, tmp_path.name)
    peers = CachePeers(job, "depth", wiring, cache)
    peers.link.announce(0, None)
    ray.get(cache.announce.remote(Announcement("normals", ("normals",), trains=False)))
    peers.publish(Batch({}, 3), 9, {"depth": torch.ones(2, 1, 4, 6)})
    for step in range(10, 18):
        peers.stepped(step)
    peers.link.retire(17, None)  # returns when all that was sent has arrived
    answer = ray.get(cache.exchange.remote([], Question("normals", ("depth",), 3)))
    assert answer.found["depth"].staleness_steps >= 17 - 9 - 2
    ray.get(cache.close.remote())


def test_a_task_without_labels_waits_for_its_peers_first_predictions(tmp_path):
    job = tiny_job(
        "steps=32", "tasks.normals.dedicated=null", "tasks.depth.steps=8",
        "tasks.depth.task={name: 'faults:SlowDepth', seconds: 0.1}",
        "staleness.wait_seconds=600",
    )  # fmt: skip
    result = run(job, tmp_path)
    normals = result["tasks"]["normals"]
    assert normals["consistency_steps"] == 32
    assert normals["skipped_consistency_steps"] == 0
    assert result["cache"]["timed_out"] == 0


def test_bad_predictions_are_refused_and_the_peer_trains_on_its_labels(tmp_path):
    result = run(tiny_job("tasks.depth.task.name=faults:OverflowingDepth"), tmp_path)
    assert result["cache"]["refused"] > 0
    assert "not finite" in next(iter(result["cache"]["refusals"]))
    assert result["tasks"]["normals"]["steps"] == 40
    assert result["tasks"]["normals"]["replaced_by_supervised"] == 20


def test_a_prediction_beyond_the_bound_is_not_used_and_counted(tmp_path):
    job = tiny_job("steps=200", "staleness.max_steps=6", "mediator.window=8")
    result = run(job, tmp_path)
    for edge in result["staleness"].values():
        assert edge["steps_max"] <= 6
    assert sum(t["misses"].get("stale", 0) for t in result["tasks"].values()) > 0


def test_forward_servers_feed_the_peers(tmp_path):
    passes: list[int] = []

    def count_forward_passes(collective: Any) -> None:
        evaluate = collective.evaluate

        def count_and_evaluate() -> None:
            servers = [s.statistics.remote() for s in collective.roster.servers.values()]
            passes.extend(found["forward_passes"] for found in ray.get(servers))
            evaluate()

        collective.evaluate = count_and_evaluate

    job = tiny_job("steps=200", "runtime.publisher=forward_server")
    result = run(job, tmp_path, before=count_forward_passes)
    assert result["status"] == "finished"
    assert result["staleness"].keys() == {"depth<-normals", "normals<-depth"}
    for edge in result["staleness"].values():
        assert edge["hit_rate"] > 0
        assert edge["steps_max"] <= edge["bound"] == 2 * (4 + 2)  # 2 steps a visit, 4 batches
    assert min(passes) > 0


def test_a_forward_server_in_bfloat16_predicts_what_its_trainer_does(tmp_path):
    found: dict[str, Any] = {}

    def compare_after_training(collective: Any) -> None:
        collective.evaluate = partial(predict_with_both, job, collective, found)

    job = tiny_job(
        "steps=10", "forward_server.refresh_every=10",  # the server has the last weights
        "runtime.publisher=forward_server", "tasks.normals.precision=bfloat16",
        "tasks.normals.memory_format=channels_last", "cache.dtype=float32",
    )  # fmt: skip
    run(job, tmp_path, before=compare_after_training)
    assert found["refused"] is None
    np.testing.assert_array_equal(found["server"], found["trainer"])
    assert np.abs(found["float32"] - found["trainer"]).max() > 1e-5


def predict_with_both(job: Any, collective: Any, found: dict[str, Any]) -> None:
    """The normals of one batch: by the trainer, by its server through the cache, and in float32
    with the same weights."""
    image = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    batch = Batch({"image": image}, 1000, Place(1000))
    actor, server, cache = (
        collective.roster.actors["normals"],
        collective.roster.servers["normals"],
        collective.roster.cache,
    )
    trainer = ray.get(
        actor.__ray_call__.remote(lambda self: self.member.trainer.network.infer(batch))
    )
    weights = ray.get(
        actor.__ray_call__.remote(lambda self: self.member.trainer.learned.network.state_dict())
    )
    request = Request(1000, batch.place, None)
    found["refused"] = ray.get(server.predict_for.remote(request, {"image": image.numpy()}))
    question = Question("depth", ("normals",), 1000, batch.place)
    answer = ray.get(cache.exchange.remote([], question, "elsewhere"))
    arrays = Transport(get=ray.get).fetch(answer.found["normals"].token)
    found["server"], found["trainer"] = arrays["normals"], trainer["normals"].numpy()
    task = build_task(job, "normals")
    model = build_model(job, "normals", task)
    model.load_state_dict(weights)
    config = job.tasks["normals"].model_copy(update={"precision": "float32"})
    found["float32"] = Network(task, model.eval(), config, "cpu").infer(batch)["normals"].numpy()


def test_a_run_leaves_nothing_in_shared_memory(tmp_path):
    host: list[str] = []
    written: list[int] = []

    def act(report: ChunkReport) -> None:
        written.append(len([path for path in Path(host[0]).iterdir() if path.is_file()]))

    job = tiny_job("mediator.batch_size=16", "mediator.window=2")  # 48 kB are not sent by value
    transport_host = lambda self: self.transport.host  # noqa: E731
    run(
        job,
        tmp_path,
        Watch(act),
        before=lambda c: host.append(ray.get(c.roster.cache.__ray_call__.remote(transport_host))),
    )
    assert max(written) > 0
    assert not Path(host[0]).exists()


def test_a_restarted_run_goes_on_from_its_checkpoints(tmp_path):
    first = run(tiny_job("steps=20"), tmp_path)
    watch = Watch()
    second = run(tiny_job("steps=60"), tmp_path, watch)
    assert first["tasks"]["depth"]["steps"] == 20
    assert second["tasks"]["depth"]["steps"] == 60
    assert watch.of("depth")[0][1].step > 20
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
