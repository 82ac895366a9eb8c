"""Jobs on real video and real sweeps, and the scripts that measure what no task measures by
itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scenes import moving_square, world_pairs

from taskray.data.readers.video import checked_part, cut
from taskray.data.storage.convert import build_reader
from taskray.errors import InputError
from taskray.geometry.motion import rigid_motion
from taskray.job.config import Job, load_job
from taskray.loop.assembly import build_tasks
from taskray.relations.scene_photometric import ScenePhotometric
from taskray.run.train import train
from taskray.tuning.settings import OF_EACH_RUN, load_study
from taskray.tuning.study import plan_study

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "jobs"))
import constant_velocity  # noqa: E402
import photometric  # noqa: E402

JOBS = ("real_video", "ego_motion_kitti", "detection_flow_kitti", "nyuv2")
PARTS = {  # of each job: what it trains on, and the later parts that it is measured on
    "real_video": ("video", "later_video", "street"),
    "ego_motion_kitti": ("drive", "later"),
    "detection_flow_kitti": ("unlabelled", "later"),
    "nyuv2": ("train", "test"),
}
FILES = ("images", "sweeps")


def job_of(name: str, data: Path | None = None, *overrides: str) -> Job:
    """A job, with its datasets read from another folder than ``data``."""
    path = ROOT / f"jobs/{name}.yaml"
    found = load_job(path)
    places = [(k, str(d.reader.arguments["path"])) for k, d in found.data.items()]
    assert all(place.startswith("data/") for _, place in places)
    if data is None:
        return found
    moved = [f"data.{k}.reader.path={data / place[5:]}" for k, place in places]
    return load_job(path, [*moved, *overrides])


def small(name: str, data: Path) -> Job:
    """The job with small frames, networks and numbers of steps."""
    job = job_of(name)
    tiny = ["steps=4"]
    if job.mediator is not None:
        tiny += ["mediator.batch_size=2", "mediator.window=2", "mediator.visits=2"]
    for relation in job.consistency:
        tiny += [f"consistency.{relation}.start_step=0", f"consistency.{relation}.warmup_steps=0"]
    for task, config in job.tasks.items():
        model = f"tasks.{task}.model"
        tiny += [f"tasks.{task}.batch_size=2"]
        if config.model.name == "pillars":
            tiny += [f"{model}.channels=4", f"{model}.layers=[1, 1]"]
        elif config.model.name == "encoder_decoder":
            tiny += [f"{model}.width=16", f"{model}.pretrained=null"]
        else:
            depth = 2 if config.model.name == "unet" else 3
            tiny += [f"{model}.base=8", f"{model}.depth={depth}"]
    for name_of_data, config in job.data.items():
        if config.reader.name != "kitti_tracking":
            sizes = {"height": 32, "width": 64}
            tiny += [f"data.{name_of_data}.reader.{k}={v}" for k, v in sizes.items()]
    return job_of(name, data, *tiny)


def trained(name: str, data: Path, folder: Path) -> dict[str, Any]:
    result = train(small(name, data), folder, inline=True, console=Console(quiet=True))
    assert (result["status"], result["error"]) == ("finished", None)
    return result


# ---- the jobs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_a_job_on_real_data_names_no_place_of_a_machine(name: str) -> None:
    job = job_of(name)
    assert job.name == name
    assert job.description
    build_tasks(job)


def frames_of(row: Mapping[str, Any]) -> list[str]:
    """The files of a row: one image, or those of a part of a video."""
    parts = [part for key in FILES for part in row.get(key, [])]
    return [row["image"]] if "image" in row else [f"{row.get('video', '')}{p}" for p in parts]


@pytest.mark.parametrize("name", JOBS)
def test_training_and_measuring_share_no_frame(name: str, data_root: Path) -> None:
    job = job_of(name, data_root)
    before, *later = (
        {frame for row in build_reader(job.data[d], d).index() for frame in frames_of(row)}
        for d in PARTS[name]
    )
    assert before
    for after in later:
        assert after
        assert not before & after


def test_real_video_trains_and_its_frames_can_be_compared(
    data_root: Path, tmp_path: Path, cache: Path
) -> None:
    result = trained("real_video", data_root, tmp_path)
    assert result["staleness"].keys() >= {"depth<-motion", "segmentation<-depth"}
    assert {edge["hit_rate"] for edge in result["staleness"].values()} == {1.0}
    assert np.isfinite(result["tasks"]["segmentation"]["metrics"]["miou"])
    found = photometric.measure(tmp_path, "later_video")
    assert 0 < found["visible"] <= 1
    assert 0 < found["everywhere"] < 0.2
    assert found["warped"] < 0.2


def test_ego_motion_is_scored_against_poses_and_against_a_steady_car(
    data_root: Path, tmp_path: Path, cache: Path
) -> None:
    result = trained("ego_motion_kitti", data_root, tmp_path)
    still = constant_velocity.measure(tmp_path, "drive", "later")["still"]["ate"]
    assert 1.2 < still < 1.4  # five frames, 1.2 m apart
    assert result["tasks"]["ego_motion"]["metrics"]["ate"] < still  # any direction is scaled
    shell = [sys.executable, str(ROOT / "jobs/constant_velocity.py"), tmp_path, "drive", "later"]
    printed = subprocess.run(shell, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(printed.stdout)["constant"]["ate"] < 0.01  # this car hardly turns


def test_detection_and_flow_train_on_real_sweeps(
    data_root: Path, tmp_path: Path, cache: Path
) -> None:
    result = trained("detection_flow_kitti", data_root, tmp_path)
    assert 0 <= result["tasks"]["detection"]["metrics"]["ap_bev"] <= 1
    flow = result["tasks"]["flow"]["metrics"]
    assert 0.5 < flow["still_error"] < 3
    assert np.isfinite(flow["flow_error"])
    for task in ("detection", "flow"):
        assert result["tasks"][task]["consistency_steps"] == 2


def test_a_shared_encoder_trains_on_real_rooms(
    data_root: Path, tmp_path: Path, cache: Path
) -> None:
    job = small("nyuv2", data_root)
    few = {d: config.model_copy(update={"limit": 8}) for d, config in job.data.items()}
    job = job.model_copy(
        update={
            "data": few,
        }
    )
    result = train(job, tmp_path, inline=True, console=Console(quiet=True))
    metrics = result["tasks"]["shared"]["metrics"]
    assert 0 < metrics["abs_rel"] < 5
    assert np.isfinite(metrics["miou"])


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of everything in nested dicts."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


@pytest.mark.parametrize("name", ["real_sweeps"])
def test_a_study_of_real_data_changes_what_its_job_has(name: str, tmp_path: Path) -> None:
    path = ROOT / f"jobs/studies/{name}.yaml"
    study = load_study(path)
    job = leaves(load_job(path.parent / study.job).model_dump())
    changes: set[str] = set()
    for planned in plan_study(study, path, tmp_path, [0], []):
        variant = leaves(planned.run.job.model_dump())
        asked = leaves({**study.set, **study.variants[planned.variant].set})
        assert variant.keys() == job.keys()  # a key that the job lacks would do nothing
        differing = {key for key in job.keys() - OF_EACH_RUN.keys() if variant[key] != job[key]}
        assert differing == asked.keys()
        assert {key: variant[key] for key in asked} == asked
        changes |= differing
    assert changes


# ---- a part of a video's time -----------------------------------------------------------------


def test_parts_of_a_video_meet_and_do_not_overlap() -> None:
    frames = {3 * n: f"{n}.png" for n in range(7)}
    first, last = cut(frames, (0.0, 0.6)), cut(frames, (0.6, 1.0))
    assert list(first) == [0, 3, 6, 9]
    assert first | last == frames
    assert len(first) + len(last) == 7
    assert cut(frames, checked_part(0.0, 1.0)) == frames
    with pytest.raises(InputError, match=r"stop: got 0.5, expected more than start, 0.6"):
        checked_part(0.6, 0.5)


# ---- photometric.py and constant_velocity.py ----------------------------------------------------


def errors_of(relation: ScenePhotometric, predictions: Any, batch: Any) -> dict[str, float]:
    found = photometric.compare(relation, predictions, batch)
    return {name: float(total / count) for name, (total, count) in found.items()}


def test_true_depth_and_motion_move_frames_onto_one_another() -> None:
    pair = moving_square()
    errors = errors_of(ScenePhotometric(), pair.truth, pair.batch)
    assert errors["warped"] < 1e-9
    assert errors["identity"] > 0.02
    world = world_pairs(count=2)
    errors = errors_of(ScenePhotometric(), world, world)
    assert errors["warped"] < 0.5 * errors["identity"]


def test_a_camera_at_rest_compares_frames_as_they_are() -> None:
    world = world_pairs(count=2)
    rest = torch.eye(4).expand(2, 4, 4)
    depth = torch.full_like(world["depth"], 7.0)
    predictions = {
        "depth": depth, "depth_2": depth, "camera_motion": rest, "camera_motion_back_2": rest,
    }  # fmt: skip
    errors = errors_of(ScenePhotometric(object_motion=False), predictions, world)
    assert errors["warped"] == pytest.approx(errors["identity"], abs=1e-6)
    assert errors["identity"] == pytest.approx(errors["everywhere"], abs=1e-6)


def test_the_mean_motion_is_a_motion() -> None:
    turns = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.3, 0.0]])
    steps = torch.tensor([[0.0, 0.0, -1.0], [0.2, 0.0, -2.0]])
    mean = constant_velocity.mean_motion(rigid_motion(turns, steps))
    expected = rigid_motion(torch.tensor([[0.0, 0.2, 0.0]]), torch.tensor([[0.1, 0.0, -1.5]]))
    torch.testing.assert_close(mean[None], expected)


@pytest.mark.parametrize("script", ["photometric.py", "constant_velocity.py"])
def test_a_folder_that_is_no_run_is_one_line(script: str, tmp_path: Path) -> None:
    shell = [sys.executable, str(ROOT / "jobs" / script), str(tmp_path), "a"]
    shell += ["b"] if script != "photometric.py" else []
    done = subprocess.run(shell, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "config.yaml" in done.stderr
