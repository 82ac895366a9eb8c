"""Depth from video beside labelled segmentation, in one task: one network for frames and for
pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import Watch, run
from predicting import predict
from scenes import world_pairs

from taskray.errors import InputError
from taskray.job import plugins
from taskray.job.config import Job, Plugin, load_job
from taskray.loop.network import frames_of, inputs_of
from taskray.loop.wiring import wire
from taskray.models.frames_and_pairs import FramesAndPairs
from taskray.relations.scene_photometric import ScenePhotometric
from taskray.tasks.depth import Depth
from taskray.tasks.ego_motion import EgoMotion
from taskray.tasks.multi import Multi
from taskray.tasks.segmentation import Segmentation

JOB = Path(__file__).parents[1] / "jobs/self_supervised_depth.yaml"
FRAME = Plugin(name="unet", base=8, depth=2)  # type: ignore[call-arg]
PAIR = Plugin(name="motion_net", base=8, depth=2)  # type: ignore[call-arg]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread for such small frames only waits, on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def video_task(**camera: Any) -> Multi:
    heads = {"classes": Segmentation(), "depth": Depth(), "camera": EgoMotion(**camera)}
    return Multi(heads, each_frame=True)


def network_of(task: Multi) -> FramesAndPairs:
    torch.manual_seed(0)
    return FramesAndPairs(task.in_channels, task.out_channels, ["camera"], FRAME, PAIR)


def small_job(*overrides: str) -> Job:
    tiny = ["steps=4", "tasks.shared.batch_size=2", "mediator.batch_size=2"]
    tiny += ["tasks.shared.model.frame.base=8", "tasks.shared.model.frame.depth=2"]
    tiny += ["tasks.shared.model.pair.base=8"]
    for data in ("video", "labelled", "test"):
        sizes = {"height": 32, "width": 48, "num_samples": 8}
        tiny += [f"data.{data}.reader.{key}={value}" for key, value in sizes.items()]
    return load_job(JOB, [*tiny, *overrides])


@pytest.mark.parametrize("direction_back", ["inverted", "predicted"])
def test_a_head_of_one_frame_predicts_on_both_frames_of_a_pair(direction_back: Any) -> None:
    task = video_task(direction_back=direction_back)
    wanted = ("depth", "depth_2", "camera_motion", "camera_motion_back_2", "segmentation_2")
    assert all(map(task.predicts, wanted))
    assert not task.predicts("camera_motion_2")
    frames = frames_of(task, wanted)
    assert frames == ("", "_2")
    assert inputs_of(task, frames) == ("image", "image_2")
    batch, network = world_pairs("sim", count=2), network_of(task)
    found = predict(task, network, batch, frames)
    assert set(found) == {*wanted, "segmentation"}
    swapped = predict(task, network, {"image": batch["image_2"], "image_2": batch["image"]})
    for quantity in ("depth", "segmentation"):
        torch.testing.assert_close(found[f"{quantity}_2"], swapped[quantity])
        assert not torch.equal(found[f"{quantity}_2"], found[quantity])
    if direction_back == "predicted":
        torch.testing.assert_close(swapped["camera_motion"], found["camera_motion_back_2"])


def test_without_the_setting_it_predicts_on_the_first_frame_alone() -> None:
    heads = {"depth": Depth(), "camera": EgoMotion()}
    assert not Multi(heads).predicts("depth_2")
    built: Any = plugins.build(
        "task", "multi", {"heads": {"d": "depth", "c": "ego_motion"}, "each_frame": True}, "task"
    )
    assert built.predicts("depth_2")


def test_the_photometric_loss_reaches_both_networks_and_labels_the_frames_alone() -> None:
    task, batch = video_task(direction_back="inverted"), world_pairs(count=2)
    network = network_of(task)
    frames = frames_of(task, ["depth_2"])
    relation = ScenePhotometric(object_motion=False, segmentation=False)
    prediction = predict(task, network, batch, ("", *frames))
    torch.stack(list(relation(prediction, batch).values())).sum().backward()

    def reached(*names: str) -> bool:
        weights = [p for n, p in network.named_parameters() if n.startswith(names)]
        assert weights
        return any(p.grad is not None and bool(p.grad.any()) for p in weights)

    assert reached("frame.encoder")
    assert reached("frame.head.depth")
    assert reached("pair.")
    assert not reached("frame.head.classes")
    network.zero_grad()
    labels = {"segmentation": batch["segmentation"].long()}
    (loss,) = task.loss(predict(task, network, batch), labels).values()
    loss.backward()
    assert reached("frame.encoder")
    assert not reached("pair.")


@pytest.mark.parametrize(
    ("pair_heads", "message"),
    [
        (["motion"], "pair_heads: got 'motion', expected some of classes, depth, camera"),
        ([], "pair_heads: expected some of the heads, not all and not none"),
        (["classes", "depth", "camera"], "pair_heads: expected some of the heads, not all"),
        (["depth", "camera"], "pair: motion_net: got heads of 1, 6 channels"),
    ],
)
def test_heads_that_do_not_fit_the_two_networks_are_refused(
    pair_heads: list[str], message: str
) -> None:
    task = video_task()
    with pytest.raises(InputError) as caught:
        FramesAndPairs(task.in_channels, task.out_channels, pair_heads, FRAME, PAIR)
    assert message in str(caught.value)


def test_labels_of_one_head_and_video_for_the_others_in_every_step(tmp_path: Path) -> None:
    job = small_job()
    role = wire(job).roles["shared"]
    assert role.labels == {"labelled": ("image", "image_2", "segmentation")}
    assert role.reads == ("image", "image_2", "intrinsics")
    assert not role.wants  # it is consistent with itself
    result = run(job, tmp_path, watch := Watch(), inline=True, measured=True)
    task = result["tasks"]["shared"]
    assert (task["supervised_steps"], task["consistency_steps"]) == (0, 4)
    assert task["replaced_by_supervised"] == task["skipped_consistency_steps"] == 0
    assert {"miou", "abs_rel"} <= task["metrics"].keys()
    names = {name for _, report in watch.reports for name in report.values}
    assert {"loss/consistency/scene/rgb", "loss/segmentation/cross_entropy"} <= names
    assert "loss/depth/mse" not in names
