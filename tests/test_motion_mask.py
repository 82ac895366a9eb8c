"""The motion mask: what it reads, its loss, constant and metrics in closed form, on true masks."""

from __future__ import annotations

import math

import pytest
import torch
from scenes import world_pairs

from taskray.errors import InputError, TaskrayError
from taskray.job import plugins
from taskray.schema import IGNORE, shape_problem
from taskray.tasks.motion_mask import MotionMask


def logits_of(mask: torch.Tensor, height: float = 50.0) -> dict[str, torch.Tensor]:
    one_hot = torch.nn.functional.one_hot((mask[:, 0] == 1).long(), 2).movedim(-1, 1)
    return {"motion_mask": height * one_hot.float()}


def values_of(task: MotionMask, prediction: object, batch: object) -> dict[str, float]:
    metric = task.metric()
    metric.update(prediction, batch)
    return {name: float(value) for name, value in metric.compute().items()}


def test_it_reads_one_frame_or_a_pair() -> None:
    batch = world_pairs("sim", count=2)
    pair, single = MotionMask(), plugins.build("task", "motion_mask", {"frames": 1}, "task")
    assert (pair.inputs, pair.in_channels) == (("image", "image_2"), 6)
    assert (single.inputs, single.in_channels) == (("image",), 3)
    assert torch.equal(
        pair.network_input(batch), torch.cat([batch["image"], batch["image_2"]], dim=1)
    )
    assert torch.equal(single.network_input(batch), batch["image"])
    assert single.predicts("motion_mask_2")
    assert not pair.predicts("motion_mask_2")
    assert pair.out_channels == {"motion_mask": 2}
    with pytest.raises(InputError, match=r"task\.frames: got 3, expected 1 or 2"):
        plugins.build("task", "motion_mask", {"frames": 3}, "task")


def test_the_true_mask_has_no_loss_and_the_best_metrics() -> None:
    task, batch = MotionMask(), world_pairs("sim", count=8)
    mask = batch["motion_mask"]
    assert set(mask.unique().tolist()) >= {0, 1}
    prediction = task.predict(logits_of(mask)["motion_mask"])
    assert shape_problem("motion_mask", prediction["motion_mask"].shape, {"B": 8}) is None
    task.check_batch(batch)
    assert float(task.loss(prediction, batch)["cross_entropy"]) == pytest.approx(0, abs=1e-6)
    assert values_of(task, prediction, batch) == {
        "miou": 1, "pixel_accuracy": 1, "iou/still": 1, "iou/moving": 1,
    }  # fmt: skip


def test_loss_and_metrics_are_those_worked_out_by_hand() -> None:
    task = MotionMask()
    label = torch.tensor([[[[1, 0, 0, IGNORE]]]], dtype=torch.uint8)
    batch = {"motion_mask": label}
    found = task.predict(torch.tensor([[[[0.0, 2.0, 0.0, 9.0]], [[1.0, 0.0, 3.0, 0.0]]]]))
    terms = [math.log1p(math.exp(-1)), math.log1p(math.exp(-2)), math.log1p(math.exp(3))]
    assert float(task.loss(found, batch)["cross_entropy"]) == pytest.approx(sum(terms) / 3)
    weighted = MotionMask(class_weights={"moving": 4.0}).loss(found, batch)["cross_entropy"]
    assert float(weighted) == pytest.approx((4 * terms[0] + terms[1] + terms[2]) / 6)
    # moving: one right, one too many; still: one right, one missed
    assert values_of(task, found, batch) == {
        "miou": 0.5, "pixel_accuracy": pytest.approx(2 / 3), "iou/still": 0.5, "iou/moving": 0.5,
    }  # fmt: skip


def test_the_constant_is_the_more_frequent_state_of_each_pixel() -> None:
    task = MotionMask()
    constant = task.constant()
    masks = torch.tensor([[1, 0, 255], [1, 0, 255], [0, 0, 1]], dtype=torch.uint8)
    batch = {"image": torch.zeros(3, 3, 1, 3), "motion_mask": masks[:, None, None]}
    constant.update(batch)
    predicted = constant.predict(batch)["motion_mask"]
    assert predicted.shape == (3, 2, 1, 3)
    assert predicted.argmax(dim=1)[0, 0].tolist() == [1, 0, 1]
    assert predicted.softmax(dim=1)[0, 1, 0].tolist() == pytest.approx([2 / 3, 0, 1], abs=1e-5)


def test_without_one_label_the_loss_is_zero_and_its_gradient_too() -> None:
    for task in (MotionMask(), MotionMask(class_weights={"moving": 4.0})):
        output = torch.randn(2, 2, 4, 6, requires_grad=True)
        batch = {"motion_mask": torch.full((2, 1, 4, 6), IGNORE, dtype=torch.uint8)}
        (loss,) = task.loss(task.predict(output), batch).values()
        loss.backward()
        assert loss == 0
        assert output.grad is not None
        assert not output.grad.any()
        (found,) = task.label_values(batch)
        assert not found.valid.any()
        assert (found.label, found.expected) == ("motion_mask", "classes 0 to 1")


def test_a_label_that_is_neither_still_nor_moving_is_refused() -> None:
    with pytest.raises(TaskrayError, match="class 2"):
        MotionMask().check_batch({"motion_mask": torch.full((1, 1, 2, 2), 2, dtype=torch.uint8)})
