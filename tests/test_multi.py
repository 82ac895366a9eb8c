"""A task made of tasks: quantities, labels, losses and metrics by head; frames by quantity."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import Watch, run
from predicting import predict
from rich.console import Console
from scenes import world_pairs
from torch import Tensor

from taskray.errors import InputError, TaskrayError
from taskray.job import plugins
from taskray.job.config import Job, parse_job
from taskray.loop.network import frames_of, inputs_of
from taskray.loop.wiring import wire
from taskray.models.unet import UNet
from taskray.run.train import train
from taskray.tasks.depth import Depth
from taskray.tasks.ego_motion import EgoMotion
from taskray.tasks.head_metrics import HeadMetrics
from taskray.tasks.motion import Motion
from taskray.tasks.multi import Multi
from taskray.tasks.normals import Normals
from taskray.tasks.object_motion import ObjectMotion
from taskray.tasks.segmentation import Segmentation
from taskray.tasks.segmentation_metrics import SegmentationMetrics
from taskray.tasks.task import Task
from taskray.tuning.runs import metric_names

Columns = dict[str, Tensor]


class Saliency(Segmentation):
    """Another task with the metrics of a segmentation, on a quantity of its own, in pairs."""

    quantities = ("saliency",)
    labels = ("saliency",)
    per_frame = False

    def __init__(self) -> None:
        super().__init__(num_classes=2)


def built(**heads: Any) -> Multi:
    """The task as a job describes it."""
    task: Multi = plugins.build("task", "multi", {"heads": heads}, "tasks.shared.task")
    return task


def network_of(task: Task, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(task.in_channels, task.out_channels, base=8, depth=2)


def test_a_job_describes_the_heads_as_it_describes_tasks() -> None:
    task = built(depth="depth", surface={"name": "normals", "loss": "l1"})
    assert task.quantities == ("depth", "normals")
    assert task.labels == ("depth", "normals")
    assert task.out_channels == {"depth": 1, "surface": 3}
    assert {head: type(part) for head, part in task.heads.items()} == {
        "depth": Depth, "surface": Normals,
    }  # fmt: skip
    batch = world_pairs("sim")
    prediction = predict(task, network_of(task), batch)
    assert tuple(prediction) == task.quantities
    assert set(task.loss(prediction, batch)) == {"depth/mse", "surface/l1"}
    values = plugins.build("task", "depth", {}, "task").loss(prediction, batch)
    assert task.loss(prediction, batch)["depth/mse"] == values["mse"]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({}, r"task\.heads: got \{\}, expected at least 1"),
        ({"depth": "dept"}, r"task\.heads\.depth: unknown task 'dept'; did you mean 'depth'"),
        ({"a": {"name": "depth", "los": 1}}, r"task\.heads\.a\.los: unknown key"),
        ({"a.b": "depth"}, r"task\.heads"),
        ({"a": "depth", "b": "depth"}, r"task\.heads\.b: predicts 'depth', as head 'a' does"),
        ({"a": "depth", "b": "detection"}, r"task\.heads\.b: reads points, expected columns that"),
        ({"a": "motion"}, r"task\.heads\.a: got a task with the heads camera, objects, expected"),
        (
            {"a": "detection", "b": {"name": "box_flow", "grid": {"cell": 0.64}}},
            r"task\.heads\.b: needs another grid of the network than the other heads",
        ),
    ],
)
def test_heads_that_do_not_fit_one_network_are_refused_by_name(
    heads: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"^tasks\.shared\.{message}"):
        built(**heads)


def test_a_head_whose_labels_are_absent_has_no_loss_and_no_metric_and_is_not_checked() -> None:
    task = built(depth="depth", classes="segmentation")
    batch = world_pairs("sim")
    prediction = predict(task, network_of(task), batch)
    only_depth = {name: values for name, values in batch.items() if name != "segmentation"}
    assert set(task.loss(prediction, only_depth)) == {"depth/mse"}
    assert set(task.loss(prediction, {"image": batch["image"]})) == set()
    task.check_batch(only_depth)
    wrong = torch.full_like(batch["segmentation"], 77)
    with pytest.raises(TaskrayError, match="class 77"):
        task.check_batch({**batch, "segmentation": wrong})
    metric = task.metric()
    metric.update(prediction, only_depth)
    assert "abs_rel" in metric.compute()
    assert "miou" not in metric.compute()
    metric.reset()
    metric.update(prediction, batch)
    assert {"abs_rel", "miou"} <= set(metric.compute())


def test_metrics_are_those_of_the_heads() -> None:
    batch = world_pairs("sim")
    task = built(depth="depth", normals="normals")
    metric, parts = task.metric(), [Depth().metric(), Normals().metric()]
    job = two_datasets({"depth": "near", "normals": "far"})
    assert metric_names(job, "scene") == [n for part in parts for n in names_of(part)]
    prediction = predict(task, network_of(task), batch)
    for each in (metric, *parts):
        each.update(prediction, batch)
    assert metric.compute() == {n: v for part in parts for n, v in part.compute().items()}


def test_metrics_of_one_name_have_their_heads_before_it_whatever_labels_a_dataset_has() -> None:
    labels = torch.tensor([[[[0, 1, 1]]]])
    logits = torch.zeros(1, 2, 1, 3).index_fill_(1, torch.tensor(1), 1.0)
    prediction = {"segmentation": logits, "saliency": logits}
    task = Multi({"a": Segmentation(num_classes=2), "b": Saliency()})
    metric = task.metric()
    metric.update(prediction, {"segmentation": labels, "saliency": labels})
    assert float(metric.compute()["a/miou"]) == float(metric.compute()["b/miou"])
    parts = {head: SegmentationMetrics(["x", "y"]) for head in ("a", "b")}
    metric = HeadMetrics(parts, {"a": ["segmentation"], "b": ["mask"]})
    metric.update(prediction, {"segmentation": labels})
    assert set(metric.compute()) == {"a/miou", "a/pixel_accuracy", "a/iou/x", "a/iou/y"}


def test_a_head_that_sees_one_frame_shares_the_network_of_one_that_sees_a_pair() -> None:
    task = Multi({"depth": Depth(), "camera": EgoMotion(), "objects": ObjectMotion()})
    assert (task.in_channels, task.passes) == (6, 2)
    assert task.inputs == ("image", "image_2")
    assert task.predicts("depth")
    assert not task.predicts("depth_2")  # the network gets pairs, never the second frame first
    batch = world_pairs("sim", count=3)
    network = network_of(task)
    prediction = predict(task, network, batch)
    assert tuple(prediction) == task.quantities
    assert prediction["depth"].shape == batch["depth"].shape
    first = {name: batch[name] for name in ("image", "image_2")}
    alone = task.heads["depth"].predict(network(torch.cat(list(first.values()), dim=1))["depth"])
    torch.testing.assert_close(prediction["depth"], alone["depth"], atol=1e-4, rtol=1e-4)


def test_heads_that_read_one_frame_may_get_a_network_of_pairs() -> None:
    heads = {"depth": Depth(), "normals": Normals()}
    task, batch = Multi(heads, frames=2), world_pairs("sim", count=2)
    assert (task.inputs, task.in_channels) == (("image", "image_2"), 6)
    assert not task.predicts("depth_2")
    stacked = torch.cat([batch["image"], batch["image_2"]], dim=1)
    assert torch.equal(task.network_input(batch), stacked)
    assert set(predict(task, network_of(task), batch)) == {"depth", "normals"}
    pair = Multi({"depth": Depth(), "camera": EgoMotion()}, frames=2)  # pairs already
    assert (pair.inputs, pair.in_channels) == (task.inputs, 6)
    with pytest.raises(InputError, match=r"task\.frames: got 2 with heads that read points"):
        plugins.build("task", "multi", {"heads": {"a": "detection"}, "frames": 2}, "task")


def test_frames_are_asked_for_by_quantity() -> None:
    task = Multi({"depth": Depth(), "saliency": Saliency()})
    assert not task.per_frame
    assert task.is_per_frame("depth")
    assert not task.is_per_frame("saliency")
    assert task.predicts("depth_2")
    assert not task.predicts("saliency_2")
    wanted = ("depth_2", "saliency")
    frames = frames_of(task, wanted)
    assert frames == ("", "_2")
    assert inputs_of(task, frames) == ("image", "image_2")
    assert frames_of(task, ["depth_2"]) == ("_2",)
    batch = world_pairs("sim", count=2)
    network = network_of(task)
    prediction = predict(task, network, batch, frames)
    assert set(prediction) == {"depth", "depth_2", "saliency"}
    second = predict(task, network, {"image": batch["image_2"]})
    torch.testing.assert_close(prediction["depth_2"], second["depth"], atol=1e-4, rtol=1e-4)
    assert frames_of(Motion(), ["camera_motion_back_2", "object_motion"]) == ("",)


def test_a_network_without_an_output_for_each_head_is_refused() -> None:
    task = Multi({"depth": Depth(), "normals": Normals()})
    maps = torch.zeros(1, 3, 4, 4)
    with pytest.raises(TaskrayError, match="returns depth, expected a tensor for each head: depth"):
        task.predict({"depth": maps[:, :1]})
    with pytest.raises(TaskrayError, match="expected a tensor for each head: depth, normals"):
        task.predict(maps)
    alone = Multi({"depth": Depth()})  # one head: the network returns one tensor
    assert math.isfinite(float(alone.predict(maps[:, :1])["depth"].mean()))


def test_a_relation_checks_the_heads_as_it_checks_tasks() -> None:
    heads = {"depth": "depth", "classes": {"name": "segmentation", "class_map": "cityscapes_19"}}
    job = Job.model_validate(
        {
            "name": "job",
            "steps": 1,
            "data": {"pairs": {"reader": {"name": "world", "frames": 2}}},
            "mediator": {"data": "pairs"},
            "tasks": {
                "scene": {"task": {"name": "multi", "heads": heads}},
                "motion": {"task": "motion", "model": "motion_net"},
            },
            "consistency": {"warp": {"relation": "segmentation_warp"}},
        }
    )
    with pytest.raises(InputError, match=r"movable: the classes of 'world'.* 'scene\.classes'"):
        wire(job)


def names_of(metric: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compute() before update()
        return list(metric.compute())


def two_datasets(dedicated: dict[str, str]) -> Job:
    reader = {"name": "world", "height": 32, "width": 48, "num_samples": 8}
    return Job.model_validate(
        {
            "name": "job",
            "steps": 4,
            "data": {
                "near": {"reader": {**reader, "domain": "sim"}},
                "far": {"reader": {**reader, "domain": "sim", "split": "test"}},
            },
            "tasks": {
                "scene": {
                    "task": {"name": "multi", "heads": {"depth": "depth", "normals": "normals"}},
                    "dedicated": dedicated,
                    "batch_size": 2,
                    "model": {"name": "unet", "base": 8, "depth": 2},
                }
            },
            "evaluation": {"data": {"far": "far"}},
        }
    )


def test_of_a_dataset_that_is_named_for_a_head_only_its_labels_are_read() -> None:
    role = wire(two_datasets({"depth": "near", "normals": "far"})).roles["scene"]
    assert role.labels == {"near": ("image", "depth"), "far": ("image", "normals")}
    shared = wire(two_datasets({"depth": "near", "normals": "near"})).roles["scene"]
    assert shared.labels == {"near": ("image", "depth", "normals")}
    with pytest.raises(InputError, match=r"tasks\.scene\.dedicated\.edges: no such head, expected"):
        wire(two_datasets({"edges": "near"}))


def test_a_step_learns_from_a_batch_of_each_heads_dataset(tmp_path: Path) -> None:
    watch = Watch()
    job = two_datasets({"depth": "near", "normals": "far"})
    result = run(job, tmp_path, watch, inline=True, measured=True)
    (report,) = [report for _, report in watch.reports]
    assert {"loss/depth/mse", "loss/normals/cosine", "loss/supervised"} <= report.values.keys()
    assert result["tasks"]["scene"]["supervised_steps"] == 4
    assert {"abs_rel", "mean_deg"} <= result["tasks"]["scene"]["metrics"].keys()
    alone = run(two_datasets({"depth": "near"}), tmp_path / "alone", other := Watch(), inline=True)
    assert "loss/normals/cosine" not in other.reports[0][1].values
    assert alone["status"] == "finished"


def test_a_run_with_a_dataset_for_each_head_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    job = two_datasets({"depth": "near", "normals": "far"})
    train(job, tmp_path, inline=True, console=Console(quiet=True))
    longer = job.model_copy(update={"steps": 6})
    result = train(longer, tmp_path, inline=True, console=Console(quiet=True))
    assert result["tasks"]["scene"]["supervised_steps"] == 6


@pytest.mark.parametrize(
    ("dedicated", "problem"),
    [
        ({"depth": 3}, r"tasks\.scene\.dedicated\.depth: got 3, expected text"),
        (3, r"tasks\.scene\.dedicated: got 3, expected text or a section of keys"),
        ({"depth": "nowhere"}, r"tasks\.scene\.dedicated\.depth: no dataset 'nowhere'"),
    ],
)
def test_a_wrong_dataset_of_a_head_is_named(dedicated: Any, problem: str) -> None:
    values = two_datasets({"depth": "near"}).model_dump(mode="json")
    values["tasks"]["scene"]["dedicated"] = dedicated
    with pytest.raises(InputError, match=problem):
        parse_job(values, "job")
