"""Segmentation: class maps, loss and metrics, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taskray.data.readers.class_map import FOLDER, ClassMap, class_map
from taskray.data.world import CLASSES, MOVABLE
from taskray.errors import InputError, TaskrayError
from taskray.job import plugins
from taskray.schema import IGNORE
from taskray.tasks.segmentation import Segmentation
from taskray.tasks.segmentation_metrics import SegmentationMetrics

BUILT_IN = sorted(file.stem for file in FOLDER.glob("*.yaml"))
OF_ROOMS = {"nyu_13"}
"""Maps without a class that moves."""


def labels(*rows: list[int]) -> dict[str, Tensor]:
    return {"segmentation": torch.tensor(rows)[None, None]}


def logits(*rows: list[int], classes: int = 3) -> dict[str, Tensor]:
    one_hot = torch.nn.functional.one_hot(torch.tensor(rows)[None], classes)
    return {"segmentation": 5.0 * one_hot.movedim(-1, 1).float()}


def values_of(metric: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


# ---- class maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_map_is_sound(name: str) -> None:
    found = class_map(name)
    assert bool(found.movable_indices) == (name not in OF_ROOMS)
    assert len(found.movable_indices) < len(found.classes)
    for dataset in found.ids:
        table = found.table(dataset)
        assert table.shape == (256,)
        assert table.dtype == np.uint8
        assert table[IGNORE] == IGNORE
        assert set(table) - {IGNORE} == set(range(len(found.classes)))


def test_the_worlds_map_is_the_world() -> None:
    found = class_map("world")
    assert found.classes == CLASSES
    assert set(found.movable) == MOVABLE


def test_the_papers_table_4_stands_as_printed() -> None:
    found = class_map("taskology")
    coco, cityscapes = found.table("coco"), found.table("cityscapes")
    printed = {
        "person": (1, [1], [24, 25]), "bicycle": (2, [2], [33]), "car": (3, [3], [26]),
        "motorcycle": (4, [4], [32]), "traffic_light": (5, [10], [19]), "bus": (6, [6], [28]),
        "truck": (7, [8], [27]),
    }  # fmt: skip
    for name, (number, in_coco, in_cityscapes) in printed.items():
        index = found.classes.index(name)
        assert index == number - 1
        assert np.flatnonzero(coco == index).tolist() == in_coco
        assert np.flatnonzero(cityscapes == index).tolist() == in_cityscapes
        assert index in found.movable_indices
    others = found.classes.index("other")
    assert others == 7
    assert others not in found.movable_indices
    assert coco[17] == cityscapes[7] == others


def test_ids_that_a_map_does_not_list_are_ignored_or_the_rest() -> None:
    table = class_map("cityscapes_19").table("cityscapes")
    assert table[7] == 0
    assert table[33] == 18
    assert (table[[0, 4, 29, 30, 200]] == IGNORE).all()


def test_a_map_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("classes: [thing, stuff]\nmovable: [thing]\nids: {mine: {4: thing}}\n")
    found = class_map(str(file))
    assert found.movable_indices == (0,)
    assert found.table("mine")[[4, 5]].tolist() == [0, IGNORE]
    task = Segmentation(class_map=str(file))
    assert task.out_channels == {"segmentation": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a, b]\nmovable: [c]", r"mine\.yaml: movable: no class 'c'"),
        ("classes: [a, b]\nrest: c", r"mine\.yaml: rest: no class 'c'"),
        ("classes: [a, b]\nids: {x: {1: d}}", r"mine\.yaml: ids\.x: no class 'd'"),
        (
            "classes: [a, b]\nids: {x: {300: a}}",
            r"mine\.yaml: ids\.x\.300: got '300', expected less",
        ),
        ("classes: [a, a]", r"mine\.yaml: classes: duplicate name 'a'"),
        ("classes: [a]", r"mine\.yaml: classes: got \['a'\], expected at least 2"),
        ("klasses: [a, b]", r"mine\.yaml"),
    ],
)
def test_a_wrong_map_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        class_map(str(file))
    assert "\n" not in str(caught.value)


def test_unknown_maps_and_datasets_are_named() -> None:
    with pytest.raises(InputError, match=r"class_map: unknown 'taskolgy'; did you mean 'taskology"):
        class_map("taskolgy")
    with pytest.raises(InputError, match=r"no ids of 'kitti' \(it has: cityscapes, coco\)"):
        class_map("taskology").table("kitti")
    with pytest.raises(InputError, match="no such file"):
        class_map("nowhere.yaml")


# ---- the task ---------------------------------------------------------------------------------


def test_the_task_has_the_classes_of_its_map() -> None:
    assert Segmentation().out_channels == {"segmentation": len(CLASSES)}
    assert Segmentation(class_map="taskology").out_channels == {"segmentation": 8}
    assert Segmentation(num_classes=5).out_channels == {"segmentation": 5}
    assert Segmentation().per_frame


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 4, "class_map": "world"}, r"\.num_classes: got a class_map as well"),
        ({"num_classes": 1}, r"\.num_classes: got 1, expected at least 2"),
        (
            {"num_classes": 4, "metric_classes": "movable"},
            r"\.metric_classes: got movable, expected",
        ),
        ({"class_map": "wrld"}, r"\.class_map: unknown 'wrld'; did you mean 'world'"),
        ({"metric_classes": "some"}, r"\.metric_classes: got 'some', expected 'all' or"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"tasks\.s\.task{message}"):
        plugins.build("task", "segmentation", arguments, "tasks.s.task")


def test_the_loss_is_the_cross_entropy_of_labelled_pixels() -> None:
    task = Segmentation(num_classes=3)
    prediction = {"segmentation": torch.zeros(1, 3, 1, 3)}
    prediction["segmentation"][0, :, 0, 0] = torch.tensor([1.0, 2.0, 0.0])
    prediction["segmentation"][0, :, 0, 2] = 100.0
    terms = task.loss(prediction, labels([1, 0, IGNORE]))
    first = math.log(math.exp(1) + math.exp(2) + 1) - 2
    assert float(terms["cross_entropy"]) == pytest.approx((first + math.log(3)) / 2)


def test_a_batch_without_labels_gives_zero_and_a_gradient_of_zeros() -> None:
    prediction = logits([0, 1, 2])
    prediction["segmentation"].requires_grad_()
    loss = Segmentation(num_classes=3).loss(prediction, labels([IGNORE] * 3))["cross_entropy"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert not prediction["segmentation"].grad.any()


def test_a_label_beyond_the_classes_is_named() -> None:
    with pytest.raises(TaskrayError, match="got class 7 in the labels, expected less than 3"):
        Segmentation(num_classes=3).check_batch(labels([0, 7, IGNORE]))
    Segmentation(num_classes=3).check_batch(labels([0, 2, IGNORE]))


# ---- metrics ----------------------------------------------------------------------------------


def test_iou_comes_from_one_confusion_matrix_over_the_whole_set() -> None:
    metric = SegmentationMetrics(["a", "b", "c"])
    metric.update(logits([0, 0, 1, 1]), labels([0, 0, 0, 1]))
    metric.update(logits([1, 1, 1, 2]), labels([1, 1, IGNORE, 1]))
    values = values_of(metric)
    # a: 2 right, 1 missed; b: 3 right, 1 false, 1 missed; c: 1 false
    expected = {"a": 2 / 3, "b": 3 / 5, "c": 0.0}
    for name, value in expected.items():
        assert values[f"iou/{name}"] == pytest.approx(value)
    assert values["miou"] == pytest.approx(sum(expected.values()) / 3)
    assert values["pixel_accuracy"] == pytest.approx(5 / 7)


def test_a_class_that_never_occurs_does_not_count() -> None:
    metric = SegmentationMetrics(["a", "b", "c"])
    metric.update(logits([0, 1, 1]), labels([0, 0, 1]))
    values = values_of(metric)
    assert math.isnan(values["iou/c"])
    assert values["miou"] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_some_classes_are_measured_among_all() -> None:
    metric = SegmentationMetrics(["a", "b", "c"], ["c"])
    metric.update(logits([0, 2, 2, 1]), labels([0, 0, 2, 2]))
    assert values_of(metric) == {
        "miou": pytest.approx(1 / 3), "pixel_accuracy": pytest.approx(1 / 2),
        "iou/c": pytest.approx(1 / 3),
    }  # fmt: skip
    task = Segmentation(metric_classes="movable")
    metric = task.metric()
    metric.update(logits([0, 6], classes=10), labels([0, 6]))
    names = {"miou", "pixel_accuracy", *(f"iou/{name}" for name in MOVABLE)}
    assert set(values_of(metric)) == names


def test_the_map_from_vkitti2_to_cityscapes_is_that_of_the_paper() -> None:
    known = class_map("vkitti2_cityscapes")
    names = {  # in the order of VKITTI2's colors.txt; None: ignored
        "terrain": None, "sky": "sky", "tree": "vegetation", "vegetation": "vegetation",
        "building": "building", "road": "road", "guardrail": None, "sign": "sign",
        "light": "light", "pole": "pole", "misc": None, "truck": "vehicle", "car": "vehicle",
        "van": "vehicle",
    }  # fmt: skip
    expected = [IGNORE if n is None else known.classes.index(n) for n in names.values()]
    assert known.table("vkitti2")[: len(names)].tolist() == expected
    labels = class_map("cityscapes_19")
    as_19 = {i: labels.classes[c] for i, c in enumerate(labels.table("cityscapes")) if c != IGNORE}
    mapped = {as_19[i]: known.classes[c] for i, c in enumerate(known.table("cityscapes"))
              if c != IGNORE}  # fmt: skip
    assert mapped == {
        "road": "road", "building": "building", "wall": "vegetation", "pole": "pole",
        "traffic_light": "light", "traffic_sign": "sign", "vegetation": "vegetation",
        "sky": "sky", "car": "vehicle", "bus": "vehicle",
    }  # fmt: skip


def test_synthia_and_cityscapes_have_the_same_sixteen_classes() -> None:
    known, all_19 = class_map("cityscapes_16"), class_map("cityscapes_19")
    assert set(all_19.classes) - set(known.classes) == {"terrain", "truck", "train"}
    for dataset in ("synthia", "cityscapes"):
        assert set(known.table(dataset).tolist()) == {*range(16), IGNORE}


def test_class_maps_are_plain_values() -> None:
    assert ClassMap(classes=("a", "b")).movable_indices == ()


# ---- class weights ----------------------------------------------------------------------------


def test_class_weights_are_those_of_cross_entropy() -> None:
    task = Segmentation(class_weights={"ball": 8.0, "car": 0.5})
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, len(CLASSES), (2, 1, 4, 5), generator=generator)
    label[0, 0, 0] = IGNORE
    predicted = torch.randn(2, len(CLASSES), 4, 5, generator=generator)
    weights = torch.tensor([{"ball": 8.0, "car": 0.5}.get(name, 1.0) for name in CLASSES])
    expected = torch.nn.functional.cross_entropy(
        predicted, label[:, 0], weights, ignore_index=IGNORE
    )
    loss = task.loss({"segmentation": predicted}, {"segmentation": label})["cross_entropy"]
    torch.testing.assert_close(loss, expected)


def test_a_batch_without_a_label_has_a_weighted_loss_of_zero() -> None:
    task = Segmentation(class_weights={"ball": 8.0})
    nothing = torch.full((1, 1, 2, 2), IGNORE)
    loss = task.loss(
        {"segmentation": torch.randn(1, len(CLASSES), 2, 2)}, {"segmentation": nothing}
    )
    assert loss["cross_entropy"] == 0


def test_a_weight_of_an_unknown_class_is_named() -> None:
    with pytest.raises(InputError, match="class_weights: got 'bal', expected one of ground, wall"):
        Segmentation(class_weights={"bal": 2.0})
