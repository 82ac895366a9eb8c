"""Constant predictors: what looks at no input, as the yardstick of every metric."""

from __future__ import annotations

import math

import pytest
import torch

from taskray.data.streams.batch import Batch
from taskray.geometry.motion import rigid_motion
from taskray.job import plugins
from taskray.job.config import TaskConfig
from taskray.loop.evaluation import evaluate, learn_constant
from taskray.loop.network import Network
from taskray.report.compare import comparison_table
from taskray.report.render import to_markdown
from taskray.tasks.box_flow import BoxFlow
from taskray.tasks.constant import MeanMap
from taskray.tasks.depth import Depth
from taskray.tasks.detection import Detection
from taskray.tasks.ego_motion import EgoMotion
from taskray.tasks.multi import Multi
from taskray.tasks.normals import Normals
from taskray.tasks.segmentation import Segmentation
from taskray.tuning.runs import value_of


def images(rows: int, height: int = 2, width: int = 3) -> dict[str, torch.Tensor]:
    return {"image": torch.zeros(rows, 3, height, width)}


def constant_of(task, *batches):
    return learn_constant(task, [Batch(batch) for batch in batches])


def test_the_constant_depth_is_the_geometric_mean_of_the_valid_labels_at_each_pixel():
    first, second = torch.full((1, 1, 2, 3), 2.0), torch.full((1, 1, 2, 3), 8.0)
    first[0, 0, 0, 0] = 0.0  # not measured
    first[0, 0, 1, 1] = second[0, 0, 1, 1] = 0.0  # never
    constant = constant_of(Depth(), {"depth": first}, {"depth": second})
    depth = constant.predict(images(4))["depth"]
    assert depth.shape == (4, 1, 2, 3)
    assert depth[3, 0, 0, 0] == pytest.approx(8.0)
    assert depth[0, 0, 1, 2] == pytest.approx(4.0)
    everywhere = math.exp((4 * math.log(2) + 5 * math.log(8)) / 9)
    assert depth[0, 0, 1, 1] == pytest.approx(everywhere)


def test_the_constant_normals_are_the_mean_direction():
    label = torch.zeros(2, 3, 1, 1)
    label[0, 0], label[1, 1] = 1.0, 1.0
    normals = constant_of(Normals(), {"normals": label}).predict(images(1, 1, 1))["normals"]
    assert normals.flatten().tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0.0])


def test_the_constant_segmentation_is_the_most_frequent_class_at_each_pixel():
    labels = torch.tensor([[1, 2], [1, 255], [2, 255]]).view(3, 1, 1, 2)
    constant = constant_of(Segmentation(num_classes=4), {"segmentation": labels})
    logits = constant.predict(images(2, 1, 2))["segmentation"]
    assert logits.shape == (2, 4, 1, 2)
    assert logits.argmax(dim=1).tolist() == [[[1, 2]]] * 2


def test_the_constant_motion_is_rigid_and_comes_with_its_inverse():
    turns = torch.tensor([[0.0, 0.2, 0.0], [0.0, 0.4, 0.0]])
    steps = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    constant = constant_of(EgoMotion(), {"camera_motion": rigid_motion(turns, steps)})
    found = constant.predict(images(3))
    wanted = rigid_motion(torch.tensor([[0.0, 0.3, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]]))
    torch.testing.assert_close(found["camera_motion"], wanted.expand(3, 4, 4))
    torch.testing.assert_close(
        found["camera_motion"] @ found["camera_motion_back_2"], torch.eye(4).expand(3, 4, 4)
    )


def test_the_constant_detector_finds_nothing():
    task = Detection()
    prediction = constant_of(task).predict({"points": torch.zeros(2, 5, 4)})
    assert [len(found.scores) for found in task.detections(prediction["detection"])] == [0, 0]


def test_the_constant_flow_is_the_mean_of_the_boxes_that_are_in_both_frames():
    task = BoxFlow(frames=2)
    now = torch.tensor(
        [[10.0, 2.0, -1.0, 4.0, 1.8, 1.5, 0.0, 0, 7], [20, -4, -1, 4, 1.8, 1.5, 0, 0, 8]]
    )
    before = torch.tensor([[9.0, 2.0, -1.0, 4.0, 1.8, 1.5, 0.0, 0, 7]])
    batch = {task.labels[0]: before[None], task.labels[1]: now[None]}
    flow = constant_of(task, batch).predict({"points": torch.zeros(1, 5, 4)})["box_flow_2"]
    torch.testing.assert_close(flow[0, 0, :, 3, 4], torch.tensor([-1.0, 0.0, 0.0]))
    assert (flow == flow[:, :1, :, :1, :1]).all()


def test_a_task_of_several_heads_has_the_constants_of_those_whose_labels_it_has_seen():
    task = Multi({"depth": Depth(), "normals": Normals()})
    constant = constant_of(task, {"depth": torch.full((1, 1, 2, 3), 5.0)})
    assert constant.predict(images(1)).keys() == {"depth"}


def test_frames_of_another_size_get_the_map_in_their_size():
    constant = constant_of(Depth(), {"depth": torch.full((1, 1, 4, 6), 3.0)})
    depth = constant.predict(images(1, 8, 12))["depth"]
    torch.testing.assert_close(depth, torch.full((1, 1, 8, 12), 3.0))


def test_without_a_valid_label_there_is_no_constant():
    constant = constant_of(Depth(), {"depth": torch.zeros(2, 1, 2, 3)})
    assert constant.predict(images(1)) == {}
    assert MeanMap("depth", lambda batch: (batch["depth"], batch["depth"] > 0)).predict({}) == {}


def test_an_evaluation_measures_the_constant_on_the_same_rows():
    task = Multi({"depth": Depth(), "normals": Normals()})
    batch = {**images(2, 16, 16), "depth": torch.full((2, 1, 16, 16), 4.0)}
    batch["normals"] = torch.zeros(2, 3, 16, 16)
    batch["normals"][:, 2] = -1.0
    model = plugins.build(
        "model", "unet", {"base": 8}, "model", in_channels=3, out_channels=task.out_channels
    )
    network = Network(task, model, TaskConfig(task="depth", dedicated="labels"), "cpu")
    constant = learn_constant(task, [Batch({"depth": torch.full((1, 1, 16, 16), 2.0)})])
    found = evaluate(network, [Batch(batch)], constant=constant)
    assert found.constant["abs_rel"] == pytest.approx(0.5)
    assert "within_11_25" in found.metrics
    assert "within_11_25" not in found.constant  # no label of normals was seen
    assert evaluate(network, [Batch(batch)]).constant == {}


def test_tables_show_the_constant_beside_the_runs_and_without_a_change():
    tasks = {
        "depth": {"evaluations": {"test": {"abs_rel": 0.2}}, "constant": {"test": {"abs_rel": 0.3}}}
    }
    better = {"depth": {"evaluations": {"test": {"abs_rel": 0.1}}}}
    table = to_markdown(
        comparison_table({"alone": {"tasks": tasks}, "collective": {"tasks": better}})
    )
    header = table.splitlines()[0]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == [
        "constant",
        "alone",
        "collective",
        "change",
    ]
    assert "0.300" in table
    assert value_of({"tasks": tasks}, "depth/test/abs_rel", "constant") == 0.3
    assert value_of({"tasks": better}, "depth/test/abs_rel", "constant") is None
