"""The special cases of collective training (Taskology 3.1): each a job, and what makes it one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collectives import Watch, run
from rich.console import Console

from taskray.data.storage.source import load_in_process
from taskray.errors import InputError
from taskray.job.config import Job, load_job
from taskray.loop.assembly import build_tasks
from taskray.run.checks import check
from taskray.run.datasets import prepare_datasets
from taskray.schema import IGNORE

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs/special_cases").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def small(name: str, *overrides: str) -> Job:
    """The job of that name with tiny frames, networks and numbers of steps."""
    path = ROOT / f"jobs/special_cases/{name}.yaml"
    job = load_job(path)
    tiny = ["steps=8", "mediator.batch_size=4", "mediator.window=2", "mediator.visits=2"]
    for data in job.data:
        sizes = {"height": 32, "width": 48, "num_samples": 16}
        tiny += [f"data.{data}.reader.{key}={value}" for key, value in sizes.items()]
    for task, config in job.tasks.items():
        depth = 2 if config.model.name == "unet" else 3
        tiny += [f"tasks.{task}.batch_size=4", f"tasks.{task}.model.base=8"]
        tiny += [f"tasks.{task}.model.depth={depth}"]
    return load_job(path, [*tiny, *overrides])


def losses(watch: Watch, task: str) -> set[str]:
    names = {name for _, report in watch.of(task) for name in report.values}
    return {name.removeprefix("loss/") for name in names if name.startswith("loss/")}


def train(job: Job, folder: Path, teacher: str = "") -> tuple[dict[str, Any], Watch]:
    watch = Watch()
    result = run(job, folder, watch, inline=True, measured=True)
    assert (result["status"], result["error"]) == ("finished", None)
    for name, task in result["tasks"].items():
        assert task["steps"] == 8
        # a task that learns nothing from its peers spends its turns on labels
        spent_on_labels = task["consistency_steps"] if name == teacher else 0
        assert task["replaced_by_supervised"] == spent_on_labels
        assert task["skipped_consistency_steps"] == 0
        assert task["metrics"]
        assert all(np.isfinite(value) for value in task["metrics"].values())
    return result, watch


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_special_case_is_named_as_its_file_and_explains_itself(path: Path) -> None:
    job = load_job(path)
    assert job.name == path.stem
    assert job.description
    build_tasks(job)


def test_without_any_labels_every_step_is_a_consistency_step(tmp_path: Path) -> None:
    result, watch = train(small("unsupervised"), tmp_path)
    for name, task in result["tasks"].items():
        assert (task["supervised_steps"], task["consistency_steps"]) == (0, 8)
        assert losses(watch, name) >= {"consistency", "consistency/scene/rgb"}
        assert "supervised" not in losses(watch, name)


def test_dedicated_and_mediator_may_be_the_same_frames(tmp_path: Path) -> None:
    job = small("overlapping")
    assert job.mediator
    assert {job.labels_of(task) for task in job.tasks} == {(job.mediator.data,)}
    result, watch = train(job, tmp_path)
    for name, task in result["tasks"].items():
        assert (task["supervised_steps"], task["consistency_steps"]) == (4, 4)
        assert losses(watch, name) >= {"supervised", "consistency/depth_normals"}


def test_of_a_partly_labelled_dataset_each_task_learns_where_it_has_labels(
    tmp_path: Path,
) -> None:
    job = small("partly_labelled")
    path = prepare_datasets(job, use_ray=False, console=Console(quiet=True))["frames"]
    columns = ["image", "depth", "normals", "segmentation"]
    rows = load_in_process(path, job.data["frames"], columns).open().take(range(16))
    has_depth = (rows["depth"] > 0).any(axis=(1, 2, 3))
    has_normals = (rows["normals"] != 0).any(axis=(1, 2, 3))
    has_classes = (rows["segmentation"] != IGNORE).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(has_depth, np.arange(16) % 2 == 0)
    np.testing.assert_array_equal(has_normals, ~has_depth)
    np.testing.assert_array_equal(has_classes, ~has_depth)

    result, watch = train(job, tmp_path)
    for name in ("depth", "normals"):  # they agree on frames with the labels of either, and both
        assert losses(watch, name) >= {"supervised", "consistency/depth_normals"}
        assert result["staleness"][f"{name}<-{'normals' if name == 'depth' else 'depth'}"]
    assert losses(watch, "segmentation") >= {"supervised"}
    assert result["tasks"]["segmentation"]["consistency_steps"] == 0


def test_a_batch_without_one_label_teaches_nothing_and_does_no_harm() -> None:
    task = build_tasks(small("partly_labelled"))["depth"]
    output = torch.zeros(2, 1, 8, 8, requires_grad=True)
    (loss,) = task.loss(task.predict(output), {"depth": torch.zeros(2, 1, 8, 8)}).values()
    loss.backward()
    assert loss == 0
    assert output.grad is not None
    assert (output.grad == 0).all()


def test_three_tasks_meet_in_one_relation(tmp_path: Path) -> None:
    result, watch = train(small("three_tasks"), tmp_path, teacher="segmentation")
    edges = {"depth<-motion", "depth<-segmentation", "motion<-depth", "motion<-segmentation"}
    assert result["staleness"].keys() == edges | {"segmentation<-depth", "segmentation<-motion"}
    assert {edge["hit_rate"] for edge in result["staleness"].values()} == {1.0}
    for name in ("depth", "motion"):
        assert "consistency/scene" in losses(watch, name)
    # two of them have no labels and make twice as many visits; still everybody meets everybody
    steps = {name: task["consistency_steps"] for name, task in result["tasks"].items()}
    assert steps == {"depth": 8, "motion": 8, "segmentation": 4}


def test_several_relations_add_up_and_each_is_reported(tmp_path: Path) -> None:
    _, watch = train(small("several_relations"), tmp_path)
    relations = {
        "depth": {"scene", "classes", "surfaces"},
        "normals": {"surfaces"},
        "motion": {"scene", "classes"},
        "segmentation": {"classes"},  # colours say nothing of what can move
    }
    for name, expected in relations.items():
        found = {loss.split("/")[1] for loss in losses(watch, name) if "/" in loss}
        assert found == expected


def test_a_task_with_neither_labels_nor_a_relation_is_refused_before_anything_runs() -> None:
    job = load_job(ROOT / "jobs/depth_ego_motion.yaml", ["consistency.scene=null"])
    with pytest.raises(InputError, match=r"tasks\.depth: has no labels and no relation"):
        check(job)
    job = load_job(ROOT / "jobs/depth_ego_motion.yaml", ["tasks.depth.consistency_weight=0"])
    with pytest.raises(InputError, match=r"tasks\.depth: has no labels and no relation"):
        check(job)


def test_augmentation_of_point_clouds_is_refused_not_ignored() -> None:
    job = load_job(ROOT / "jobs/detection_flow.yaml", ["tasks.detection.augment.flip=true"])
    with pytest.raises(InputError, match=r"tasks\.detection\.augment: only images"):
        check(job)
