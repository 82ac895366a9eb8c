"""Tasks that begin from a checkpoint, and tasks that are frozen: they predict and never train."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collectives import Watch, kill, run, tiny_job
from rich.console import Console

from taskray.cli import main
from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.errors import InputError
from taskray.exchange.messages import Made
from taskray.job.config import Job, dump_yaml
from taskray.loop.assembly import build_learned, build_task
from taskray.loop.report import ChunkReport
from taskray.run.checks import check, check_checkpoints
from taskray.run.doctor import doctor
from taskray.runtime.answering import RECENT, Answering, Request
from taskray.runtime.checkpoints import CheckpointStore, find_checkpoint
from taskray.runtime.member import load_initial
from taskray.tasks.normals import Normals


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of depth and normals, of 20 steps each."""
    folder = tmp_path_factory.mktemp("taught")
    run(tiny_job("steps=20"), folder, inline=True)
    return folder


def frozen(checkpoint: Any, *overrides: str) -> Job:
    return tiny_job(
        "steps=20",
        "tasks.normals.frozen=true",
        f"tasks.normals.checkpoint={checkpoint}",
        *overrides,
    )


def weights(folder: Path, task: str) -> dict[str, torch.Tensor]:
    checkpoint = CheckpointStore(folder / "checkpoints").latest(task)
    assert checkpoint is not None
    return checkpoint.weights


# ---- the job ------------------------------------------------------------------------------------


def test_a_frozen_task_needs_a_checkpoint() -> None:
    with pytest.raises(InputError, match=r"tasks\.normals\.frozen: a frozen task needs a 'check"):
        tiny_job("tasks.normals.frozen=true")


def test_a_frozen_task_takes_no_steps_and_no_labels() -> None:
    job = frozen("somewhere", "tasks.normals.steps=7")
    assert job.steps_of("normals") == 0
    assert job.labels_of("normals") == ()
    assert job.labels_of("depth") == ("labelled",)
    assert tiny_job("tasks.normals.steps=7").steps_of("normals") == 7


def test_a_checkpoint_is_named_by_its_folder_or_by_its_run(taught: Path) -> None:
    own = find_checkpoint(str(taught), "depth")
    assert own.step == 20
    for location in (f"{taught}#depth", f"{taught}/checkpoints/depth/step_20"):
        found = find_checkpoint(location, "normals")
        torch.testing.assert_close(found.weights, own.weights)


def test_a_run_that_keeps_its_checkpoints_elsewhere_is_followed(
    taught: Path, tmp_path: Path
) -> None:
    job = tiny_job(f"checkpoint.path={taught / 'checkpoints'}")
    (tmp_path / "config.yaml").write_text(dump_yaml(job))
    assert find_checkpoint(str(tmp_path), "depth").step == 20


@pytest.mark.parametrize(
    ("location", "model", "message"),
    [
        ("{taught}", "{name: unet, base: 16, depth: 2}", "from another model: weight"),
        ("{taught}#depth", "{name: unet, base: 8, depth: 2}", "from another model: weight"),
        ("{taught}", "{name: unet, base: 8, depth: 3}", "from another model: the file lacks"),
        ("{taught}#edges", "unet", "a checkpoint, or a run with a checkpoint of task 'edges'"),
        ("/nowhere", "unet", "a checkpoint, or a run with a checkpoint of task 'normals'"),
    ],
)
def test_a_wrong_checkpoint_is_refused_in_one_line_before_anything_runs(
    taught: Path, tmp_path: Path, capsys: Any, location: str, model: str, message: str
) -> None:
    place = location.format(taught=taught)
    job = frozen(f"'{place}'", f"tasks.normals.model={model}")
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    code = main(["train", str(tmp_path / "job.yaml"), "--inline", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith(f"taskray: tasks.normals.checkpoint: {place.partition('#')[0]}")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_doctor_shows_what_is_frozen(taught: Path) -> None:
    console = Console(file=StringIO(), width=120)
    doctor(frozen(taught), console)
    assert isinstance(console.file, StringIO)
    assert "frozen" in console.file.getvalue()
    with pytest.raises(InputError, match=r"tasks\.normals\.checkpoint: /nowhere"):
        doctor(frozen("/nowhere"), console)


# ---- initial weights ----------------------------------------------------------------------------


def test_a_task_begins_from_the_checkpoint_and_goes_on_from_its_own(
    taught: Path, tmp_path: Path
) -> None:
    job = tiny_job("steps=10", f"tasks.depth.checkpoint={taught}", "tasks.depth.optimizer.lr=1e-9")
    learned = build_learned(job, "depth", build_task(job, "depth"), [])
    load_initial(job, "depth", learned)
    torch.testing.assert_close(learned.weights(), weights(taught, "depth"))
    result = run(job, tmp_path, inline=True)
    assert result["tasks"]["depth"]["steps"] == 10  # it counts from zero
    parameters = {n for n, _ in learned.network.named_parameters()}
    after, before = weights(tmp_path, "depth"), weights(taught, "depth")
    for name in parameters:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    watch = Watch()
    longer = tiny_job("steps=14", f"tasks.depth.checkpoint={taught}")
    run(longer, tmp_path, watch, inline=True)
    assert "task 'depth' goes on from step 10" in watch.events


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tasks.depth.model.base=16", r"checkpoints/depth/step_20: from another model: weight"),
        ("tasks.normals.model.base=16", r"checkpoints/normals/step_20: from another model: weight"),
        ("tasks.depth.optimizer.name=sgd", r"checkpoints/depth/step_20: .* optimizer than 'sgd'"),
    ],
)
def test_checkpoints_of_a_run_must_fit_its_job_also_where_a_task_is_frozen(
    taught: Path, setting: str, message: str
) -> None:
    job = frozen(taught, setting)
    with pytest.raises(InputError, match=message):
        check_checkpoints(job, str(taught / "checkpoints"), check(job))


def test_a_run_that_goes_on_does_not_read_where_its_tasks_once_began(
    taught: Path, tmp_path: Path
) -> None:
    job = frozen("/nowhere", "tasks.depth.checkpoint=/nowhere")
    check_checkpoints(job, str(taught / "checkpoints"), check(job))
    with pytest.raises(
        InputError, match=r"tasks\.depth\.checkpoint: /nowhere: expected a checkpoint"
    ):
        check_checkpoints(job, str(tmp_path), check(job))


# ---- predicting on demand -----------------------------------------------------------------------


class CountingNetwork:
    """Predicts zeros, and remembers on which batches."""

    def __init__(self) -> None:
        self.task = Normals()
        self.batches: list[int | None] = []

    def infer(self, batch: Batch, frames: Any) -> dict[str, torch.Tensor]:
        self.batches.append(batch.id)
        return {"normals": torch.zeros(2, 3, 4, 6)}


class Asked:
    """A task that answers, its publications, and a batch of images."""

    def __init__(self, reuse: bool = True) -> None:
        self.network, self.published = CountingNetwork(), list[Made]()
        network: Any = self.network
        self.answering = Answering("normals", network, ["normals"], "float16", self.publish, reuse)

    def publish(self, new: Made) -> None:
        self.published.append(new)

    def predict_for(self, batch: int, cached: int | None = None, step: int = 20) -> None:
        image = {"image": np.zeros((2, 3, 4, 6), np.float32)}
        request = Request(batch, Place(0, batch, 8), cached)
        assert self.answering.predict_for(request, image, step) is None


def test_a_task_predicts_once_for_two_peers_that_come_to_a_batch_together() -> None:
    asked = Asked()
    for batch in (0, 0, 1, 0, *range(2, 2 + RECENT), 0):
        asked.predict_for(batch)
    assert asked.network.batches == [0, 1, *range(2, 2 + RECENT), 0]
    assert asked.answering.forward_passes == len(asked.network.batches)
    assert [new.batch for new in asked.published[:4]] == [0, 0, 1, 0]
    assert {new.step for new in asked.published} == {20}
    assert asked.published[2].place == Place(0, 1, 8)


def test_a_cached_prediction_of_the_same_weights_is_kept() -> None:
    asked = Asked()
    asked.predict_for(0, cached=20, step=20)
    assert (asked.network.batches, asked.published) == ([], [])
    asked.predict_for(0, cached=20, step=21)
    assert asked.network.batches == [0]
    assert asked.published[0].step == 21


def test_without_reuse_each_question_costs_a_forward_pass() -> None:
    asked = Asked(reuse=False)
    for cached in (None, 20, 20):
        asked.predict_for(0, cached)
    assert asked.network.batches == [0, 0, 0]


# ---- frozen, in one process ---------------------------------------------------------------------


@pytest.mark.parametrize("window", ["all", "4"])
def test_a_frozen_task_is_always_there_and_never_changes(
    taught: Path, tmp_path: Path, window: str
) -> None:
    job = frozen(taught, f"mediator.window={window}")
    result = run(job, tmp_path, inline=True, measured=True)
    assert result["status"] == "finished"
    assert result["staleness"] == {
        "depth<-normals": {
            "steps_mean": 0.0, "steps_max": 0.0, "hit_rate": 1.0,
            "seconds_mean": pytest.approx(0.0, abs=20), "bound": None, "misses": {},
        }
    }  # fmt: skip
    task = result["tasks"]["normals"]
    assert (task["steps"], task["supervised_steps"], task["consistency_steps"]) == (0, 0, 0)
    assert 0 < task["metrics"]["mean_deg"] < 180  # it is measured all the same
    assert result["tasks"]["depth"]["replaced_by_supervised"] == 0
    torch.testing.assert_close(weights(tmp_path, "normals"), weights(taught, "normals"))


def test_a_frozen_prediction_is_made_once_in_a_plain_pass(taught: Path, tmp_path: Path) -> None:
    result = run(frozen(taught, "steps=60", "mediator.window=all"), tmp_path, inline=True)
    assert result["tasks"]["depth"]["consistency_steps"] == 30
    # depth publishes at each of them, normals once for each of the 8 batches
    assert result["cache"]["publishes"] == 30 + 8


def test_an_age_bound_makes_a_frozen_task_predict_again(taught: Path, tmp_path: Path) -> None:
    job = frozen(taught, "steps=60", "mediator.window=all", "staleness.max_seconds=1e-9")
    result = run(job, tmp_path, inline=True)
    assert result["status"] == "finished"
    # every prediction is too old when it is looked up: it predicts again at each visit
    assert result["cache"]["publishes"] == 30 + 30
    assert result["tasks"]["depth"]["replaced_by_supervised"] == 30


def test_a_frozen_task_alone_is_measured(taught: Path, tmp_path: Path) -> None:
    job = frozen(taught, "tasks.depth.frozen=true", f"tasks.depth.checkpoint={taught}")
    result = run(job, tmp_path, inline=True, measured=True)
    assert result["status"] == "finished"
    assert {t["steps"] for t in result["tasks"].values()} == {0}
    assert all(t["metrics"] for t in result["tasks"].values())


def test_a_frozen_task_that_fails_fails_alone(taught: Path, tmp_path: Path) -> None:
    job = frozen(f"{taught}#normals", "tasks.normals.task.name=faults:RaisingNormals")
    result = run(job, tmp_path, inline=True)
    assert result["status"] == "failed"
    assert "out of normals" in result["tasks"]["normals"]["error"]
    assert result["tasks"]["depth"]["steps"] == 20
    assert result["tasks"]["depth"]["error"] is None


def test_the_whole_command_works_on_a_job_with_a_frozen_task(
    taught: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "job.yaml").write_text(dump_yaml(frozen(taught)))
    arguments = ["train", str(tmp_path / "job.yaml"), "--inline", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 0  # again: nothing is left to do
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    capsys.readouterr()


# ---- frozen, on Ray -----------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_waiting_for_a_frozen_task_gives_the_losses_of_one_process(
    taught: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    job = frozen(
        taught,
        "staleness={max_steps: 0, on_stale: wait}",
        "cache.dtype=float32",
        "runtime.chunk_steps=1",
        "checkpoint.every=1000",
        "mediator.window=4",
    )
    inline, actors = Watch(), Watch()
    run(job, tmp_path / "inline", inline, inline=True)
    result = run(job, tmp_path / "actors", actors)
    torch.set_num_threads(before)
    assert len(actors.losses("depth")) == 20
    assert actors.losses("depth") == pytest.approx(inline.losses("depth"), abs=1e-5)
    assert result["tasks"]["depth"]["replaced_by_supervised"] == 0
    assert result["staleness"]["depth<-normals"]["steps_max"] == 0
    assert result["staleness"]["depth<-normals"]["hit_rate"] == 1
    assert result["tasks"]["normals"]["steps"] == 0


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("settings", ["mediator.window=2", "runtime.publisher=forward_server"])
def test_a_frozen_task_serves_its_peers_to_the_last_step(
    taught: Path, tmp_path: Path, settings: str
) -> None:
    watch = Watch()
    result = run(frozen(taught, "steps=200", settings), tmp_path, watch)
    assert (result["status"], watch.events) == ("finished", [])
    edge = result["staleness"]["depth<-normals"]
    assert edge["steps_max"] == 0
    assert edge["hit_rate"] > 0.8
    assert "normals<-depth" not in result["staleness"]


@pytest.mark.usefixtures("ray_session")
def test_a_frozen_task_whose_process_is_lost_comes_back(taught: Path, tmp_path: Path) -> None:
    killed: list[int] = []
    rates: list[float] = []  # of depth, since then

    def act(report: ChunkReport) -> None:
        if report.task == "normals" and not killed:
            killed.append(report.pid)
            kill(report.pid)
        if report.task == "depth" and killed:
            rates.append(report.values.get("hit_rate/normals", 0.0))
            if min(rates) < 0.5 < rates[-1]:  # it was away and is back
                raise KeyboardInterrupt

    job = frozen(taught, "steps=20000", "mediator.window=2", "mediator.visits=2")
    watch, collectives = Watch(act), []
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, watch, before=collectives.append)
    states = collectives[0].states
    assert (states["normals"].restarts, states["depth"].restarts) == (1, 0)
