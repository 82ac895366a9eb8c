"""Anchors, targets and losses of detection and box flow, and average precision by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from predicting import predict
from torch import Tensor

from taskray.data.readers.kitti_tracking import KittiTracking
from taskray.data.world import World
from taskray.errors import InputError, TaskrayError
from taskray.geometry.grid import Grid
from taskray.job import plugins
from taskray.job.config import load_job
from taskray.models.pillars import Pillars
from taskray.run.checks import check
from taskray.tasks.anchor_maps import Detections
from taskray.tasks.anchors import BACKGROUND, IGNORED, Anchor, Anchors, wrap
from taskray.tasks.box_flow import BoxFlow, true_flow
from taskray.tasks.detection import (
    CHANNELS,
    DIRECTION,
    LOGIT,
    Detection,
    focal_loss,
)
from taskray.tasks.detection_metrics import (
    DetectionMetrics,
    average_precision,
    greedy_match,
    overlaps,
)
from taskray.tasks.task import Task

Columns = dict[str, Tensor]
NAN = float("nan")
GRID = Grid(x=(-8.0, 8.0), y=(-6.0, 6.0), cell=0.5)
CAR = Anchor(label=8, l=4.0, w=2.0, h=1.6, z=-0.8)
WALKER = Anchor(label=7, l=0.8, w=0.8, h=1.8, z=-0.7, matched=0.5, unmatched=0.35, iou=0.5)
ANCHORS = Anchors(GRID, [WALKER, CAR])


def box(
    x: float, y: float, degrees: float = 0.0, track: int = 0, label: int = 8, **other: float
) -> list[float]:
    """A car as long, wide and high as its anchor, or as ``other`` says."""
    kind = {7: WALKER, 8: CAR}.get(label, CAR)
    size = {"z": kind.z, "l": kind.l, "w": kind.w, "h": kind.h} | other
    theta = math.radians(degrees)
    return [x, y, size["z"], size["l"], size["w"], size["h"], theta, label, track]


def channels_of(task: Task) -> int:
    (channels,) = task.out_channels.values()
    return channels


def frame(*boxes: list[float], rows: int = 4) -> Tensor:
    """Boxes of one frame, ``[1, rows, 9]``, padded."""
    padded = torch.full((1, rows, 9), NAN)
    for number, values in enumerate(boxes):
        padded[0, number] = torch.tensor(values)
    return padded


def certain(task: Detection, boxes: Tensor) -> Columns:
    """The prediction that is right everywhere: confidence where anchors answer for a box."""
    rows, columns = task.anchors.grid.shape
    detection = torch.zeros(len(boxes), task.anchors.per_cell, CHANNELS, rows, columns)
    detection[:, :, LOGIT] = -15.0
    assigned = task.anchors.assign(boxes)
    sample, *where = torch.where(assigned >= 0)
    target = task.anchors.encode(boxes[sample, assigned[(sample, *where)], :7], where)
    anchor, row, column = where
    detection[sample, anchor, :7, row, column] = target[:, :7]
    detection[sample, anchor, DIRECTION, row, column] = 15 * target[:, 7]
    detection[sample, anchor, LOGIT, row, column] = 15.0
    return {"detection": detection}


def measured(task: Detection, prediction: Columns, boxes: Tensor) -> dict[str, float]:
    metric = task.metric()
    metric.update(prediction, {"boxes": boxes})
    return {name: float(value) for name, value in metric.compute().items()}


def rays(boxes: Tensor, number: int = 3000, seed: int = 0) -> Tensor:
    """Sweeps ``[B, number, 4]``: half of the points on the ground, half in the boxes."""
    generator = torch.Generator().manual_seed(seed)
    sweeps = []
    for own in boxes:
        own = own[~own.isnan().any(dim=1)]
        ground = torch.rand(number // 2, 4, generator=generator)
        ground[:, :3] = (ground[:, :3] - 0.5) * torch.tensor([16.0, 12.0, 0.1])
        ground[:, 2] -= 1.7
        inside = torch.rand(number - number // 2, 4, generator=generator)
        chosen = own[torch.randint(len(own), (len(inside),), generator=generator)]
        offset = (inside[:, :3] - 0.5) * chosen[:, 3:6]
        cos, sin = chosen[:, 6].cos(), chosen[:, 6].sin()
        inside[:, 0] = chosen[:, 0] + cos * offset[:, 0] - sin * offset[:, 1]
        inside[:, 1] = chosen[:, 1] + sin * offset[:, 0] + cos * offset[:, 1]
        inside[:, 2] = chosen[:, 2] + offset[:, 2]
        sweeps.append(torch.cat([ground, inside]))
    return torch.stack(sweeps)


# ---- anchors ----------------------------------------------------------------------------------


def test_a_box_is_its_anchor_plus_what_is_predicted() -> None:
    boxes = frame(box(1.3, -2.1, 170, l=4.4, w=1.7, z=-0.6), box(-3, 3, -100))[0, :2, :7]
    where = tuple(torch.tensor(index) for index in ([2, 3], [7, 18], [19, 9]))
    residual = ANCHORS.encode(boxes, where)
    torch.testing.assert_close(ANCHORS.decode(residual, where), boxes, atol=1e-5, rtol=1e-5)
    x, y = -8 + 19.5 * 0.5, -6 + 7.5 * 0.5
    expected = [1.3 - x, -2.1 - y, 0.2, math.log(4.4 / 4), math.log(1.7 / 2), 0, math.radians(-10)]
    torch.testing.assert_close(residual[0, :7], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert float(residual[1, 6]) == pytest.approx(math.radians(-10))  # -100 - 90 and half a turn
    assert residual[:, 7].tolist() == [-1, -1]  # both against the axis
    ahead = frame(box(0, 0, 80))[0, :1, :7]
    assert ANCHORS.encode(ahead, [w[:1] for w in where])[0, 7] == 1


def test_angles_are_wrapped_into_one_turn_and_keep_their_gradient() -> None:
    angles = torch.tensor([0.0, math.pi - 1e-3, math.pi + 1e-3, -7.0, 100.0], dtype=torch.float64)
    angles.requires_grad_()
    wrapped = wrap(angles)
    assert ((wrapped > -math.pi) & (wrapped <= math.pi)).all()
    torch.testing.assert_close(wrapped.sin(), angles.sin())
    torch.testing.assert_close(wrapped.cos(), angles.cos())
    wrapped.sum().backward()
    assert angles.grad is not None
    assert (angles.grad == 1).all()


def test_an_anchor_answers_for_the_box_it_overlaps_enough() -> None:
    assigned = ANCHORS.assign(frame(box(0.25, 0.25)))  # in the middle of row 12, column 16
    assert assigned.shape == (1, 4, 24, 32)
    cars = assigned[0, 2]
    assert cars[12, 16] == 0
    assert cars[12, 17] == 0  # 3.5 of 4 m: IoU 7 / 9
    assert cars[12, 18] == 0  # 3 of 4 m: IoU 6 / 10
    assert cars[12, 19] == IGNORED  # 2.5 of 4 m: IoU 5 / 11
    assert cars[12, 20] == BACKGROUND  # 2 of 4 m: IoU 1 / 3
    assert cars[13, 16] == 0  # 1.5 of 2 m: IoU 6 / 10
    assert (assigned[0, :2] == BACKGROUND).all()  # anchors of walkers
    assert (assigned[0, 3] < 0).all()  # those of cars across share 4 of 12 square metres


def test_a_box_counts_as_turned_to_the_nearer_axis() -> None:
    for degrees, anchor in ((44, 2), (46, 3), (134, 3), (136, 2), (-170, 2), (-91, 3)):
        assigned = ANCHORS.assign(frame(box(0.25, 0.25, degrees)))[0]
        assert assigned[anchor, 12, 16] == 0
        assert (assigned[5 - anchor] < 0).all()


def test_the_nearest_anchor_answers_for_a_box_that_none_overlaps_enough() -> None:
    small = box(0.25, 0.25, l=1.0, w=0.5)
    assigned = ANCHORS.assign(frame(box(5, 5), small))[0, 2:]
    assert (assigned == 1).sum() >= 1
    assert assigned[0, 12, 16] == 1


def test_boxes_of_other_classes_padding_and_boxes_off_the_grid_are_left_out() -> None:
    others = frame(box(0, 0, label=3), box(8.1, 0), box(0, -6.1))
    assert (ANCHORS.assign(others) == BACKGROUND).all()
    assert (ANCHORS.assign(frame()) == BACKGROUND).all()


def test_each_class_has_anchors_of_its_own() -> None:
    assigned = ANCHORS.assign(frame(box(0, 0), box(3, 3, label=7)))[0]
    assert set(assigned[:2].unique().tolist()) <= {1, BACKGROUND, IGNORED}
    assert set(assigned[2:].unique().tolist()) == {0, BACKGROUND, IGNORED}
    assert (assigned[:2] == 1).any()


# ---- detection --------------------------------------------------------------------------------


def test_the_losses_vanish_on_the_truth_and_nowhere_else() -> None:
    task = Detection(GRID, [WALKER, CAR])
    boxes = torch.cat([frame(box(1.2, 2.1, 75), box(-4, -3, 200, label=7)), frame(box(0, 0, -170))])
    truth = certain(task, boxes)
    losses = task.loss(truth, {"boxes": boxes})
    assert losses.keys() == {"class", "box", "direction"}
    assert sum(losses.values()) < 1e-4
    assigned = task.anchors.assign(boxes)
    for channel in range(7):
        wrong = {**truth, "detection": truth["detection"].clone()}
        wrong["detection"][:, :, channel][assigned >= 0] += 0.2
        assert task.loss(wrong, {"boxes": boxes})["box"] > 1e-2
    turned = {"detection": truth["detection"].clone()}
    turned["detection"][:, :, DIRECTION] *= -1
    losses = task.loss(turned, {"boxes": boxes})
    assert losses["direction"] > 1.0
    assert losses["box"] < 1e-4


def test_the_focal_loss_is_that_worked_out_by_hand() -> None:
    logits = torch.tensor([0.0, 0.0, 2.0])
    assigned = torch.tensor([0, BACKGROUND, IGNORED])
    expected = (0.25 + 0.75) * 0.25 * math.log(2)
    assert float(focal_loss(logits, assigned)) == pytest.approx(expected)


def test_a_new_network_is_unsure_of_everything() -> None:
    task = Detection(GRID, [CAR])
    prediction = task.predict(torch.zeros(1, channels_of(task), *GRID.shape))
    confidence = prediction["detection"][:, :, LOGIT].sigmoid()
    torch.testing.assert_close(confidence, torch.full_like(confidence, 0.01))


def test_whatever_the_network_gives_the_prediction_is_finite_in_float16() -> None:
    task = Detection(GRID, [WALKER, CAR])
    flow = BoxFlow(GRID, [CAR])
    for value in (0.0, 1e30, -1e30):
        for some in (task, flow):
            raw = torch.full((1, channels_of(some), *GRID.shape), value, requires_grad=True)
            prediction = some.predict(raw)
            quantity = prediction[some.quantities[0]]
            assert quantity.half().isfinite().all()
            quantity.sum().backward()
            assert raw.grad is not None
            assert raw.grad.isfinite().all()


@pytest.mark.parametrize("boxes", [frame(), frame(box(9.0, 0.0))], ids=["none", "off the grid"])
def test_a_batch_without_one_box_gives_finite_losses(boxes: Tensor) -> None:
    detection, flow = Detection(GRID, [CAR]), BoxFlow(GRID, [CAR])
    for task in (detection, flow):
        raw = torch.randn(1, channels_of(task), *GRID.shape).requires_grad_()
        batch = {"boxes": boxes, "boxes_2": boxes, "boxes_3": boxes}
        loss = torch.stack(list(task.loss(task.predict(raw), batch).values())).sum()
        loss.backward()
        assert loss.isfinite()
        assert raw.grad is not None
        assert raw.grad.isfinite().all()
    assert float(loss.detach()) == 0
    values = measured(detection, certain(detection, boxes), boxes)
    assert all(math.isnan(value) for value in values.values())


def test_a_map_of_another_grid_is_refused() -> None:
    task = Detection(GRID, [CAR])
    with pytest.raises(TaskrayError, match="returns 18x24x30, expected 18x24x32, from the task's"):
        task.predict(torch.zeros(1, 18, 24, 30))


def test_the_network_is_given_the_grid_of_its_task() -> None:
    arguments: dict[str, Any] = {"grid": {"x": [-8, 8], "y": [-6, 6], "cell": 0.5}}
    task = plugins.build("task", "box_flow", arguments, "task")
    model = plugins.build(
        "model", "pillars", {"channels": 4, "layers": [1]}, "model", in_channels=task.in_channels,
        out_channels=task.out_channels, **task.network_arguments,
    )  # fmt: skip
    sweeps = rays(frame(box(0, 0))).expand(2, -1, -1)
    columns = {"points": sweeps, "points_2": sweeps, "points_3": sweeps}
    prediction = predict(task, model, columns)
    assert prediction["box_flow_3"].shape == (2, 2, 6, 24, 32)
    with pytest.raises(InputError, match="unknown key"):
        plugins.check_arguments(Pillars, {"grid": {}}, "model", ("grid",))


def test_one_network_detects_on_every_frame_of_a_row() -> None:
    task = Detection(GRID, [CAR])
    model = Pillars(4, task.out_channels, GRID, channels=4, layers=[1]).eval()
    sweeps = [rays(frame(box(x, 0))) for x in (0, 1, 2)]
    columns = dict(zip(("points", "points_2", "points_3"), sweeps, strict=True))
    together = predict(task, model, columns, ("", "_2", "_3"))
    alone = predict(task, model, {"points": sweeps[2]})
    torch.testing.assert_close(together["detection_3"], alone["detection"])
    assert together["detection_2"].shape == (1, 2, 9, 24, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": []}, r"task.classes: got \[\], expected at least 1"),
        ({"classes": [{"unmatched": 0.7}]}, "unmatched: got 0.7, expected at most matched, 0.6"),
        ({"classes": [{"length": 4}]}, "length: unknown key"),
        ({"max_overlap": 1.5}, "task.max_overlap: got 1.5, expected at most 1"),
    ],
)
def test_what_a_job_has_wrong_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plugins.build("task", "detection", arguments, "task")


@pytest.mark.parametrize("task", ["detection", "box_flow"])
def test_two_classes_with_one_label_are_refused(task: str) -> None:
    classes = [{"label": 1}, {"label": 1, "l": 0.8}]
    with pytest.raises(InputError, match=r"task\.classes: got the labels \[1, 1\], expected"):
        plugins.build("task", task, {"classes": classes}, "task")


def test_a_detection_is_not_given_sweeps_that_lost_their_boxes() -> None:
    """Their boxes are NaN, as those of an empty sweep: all in them would be background."""
    sweeps: dict[str, Any] = {"lidar": True, "cameras": False, "label_fraction": 0.1}
    for rows in ("all", "unlabelled"):
        with pytest.raises(InputError, match="rows: expected 'labelled' where label_fraction is"):
            Detection().check_labels(World(**sweeps, rows=rows))
        with pytest.raises(InputError, match="rows: expected 'labelled'"):
            Detection().check_labels(KittiTracking("", label_fraction=0.1, rows=rows))
        BoxFlow().check_labels(World(**sweeps, rows=rows))  # learns where there are boxes alone
    for fitting in (sweeps | {"rows": "labelled"}, {"lidar": True}, {"label_fraction": 0.1}):
        Detection().check_labels(World(**fitting))


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("data.labelled.reader.rows=all", r"data\.labelled\.reader\.rows: "),
        ("data.test.reader.label_fraction=0.5", r"data\.test\.reader\.rows: "),
    ],
)
def test_a_job_that_would_learn_from_or_be_measured_on_such_sweeps_is_refused(
    setting: str, key: str
) -> None:
    job = Path(__file__).parents[1] / "jobs" / "detection_flow.yaml"
    check(load_job(job, ["data.sweeps.reader.label_fraction=0.5"]))  # a mediator's are never read
    with pytest.raises(InputError, match=f"{key}expected 'labelled'"):
        check(load_job(job, [setting]))


def test_detection_and_flow_can_overfit_a_few_sweeps() -> None:
    boxes = [
        torch.cat([frame(box(1 + t, 2, 20), box(-4, -2, 100 + 10 * t, 1)),
                   frame(box(-2, t - 1, 185), box(4, -3 - t, -95, 1))])
        for t in (0, 1, 2)
    ]  # fmt: skip
    batch = {f"boxes{s}": b for s, b in zip(("", "_2", "_3"), boxes, strict=True)}
    batch |= {f"points{s}": rays(b) for s, b in zip(("", "_2", "_3"), boxes, strict=True)}
    for task in (Detection(GRID, [CAR]), BoxFlow(GRID, [CAR])):
        torch.manual_seed(0)
        model = Pillars(4, task.out_channels, channels=16, layers=[2, 2], **task.network_arguments)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            prediction = predict(task, model, batch)
            torch.stack(list(task.loss(prediction, batch).values())).sum().backward()
            optimizer.step()
        metric = task.metric()
        metric.update(predict(task, model, batch), batch)  # the batch's own statistics
        values = metric.compute()
        if isinstance(task, Detection):
            assert values["ap_bev"] > 0.7
            assert values["aph_bev"] > 0.6
        else:
            assert values["flow_error"] < 0.3 * values["still_error"]


# ---- flow -------------------------------------------------------------------------------------


def test_the_true_flow_leads_to_the_box_of_the_same_track() -> None:
    now = frame(box(1, 2, 175, 5), box(0, 0, 0, 6))[0, :2]
    before = frame(box(3, 3, 0, 6), box(1.5, 1, -175, 5))
    flow = true_flow(now, before.expand(2, -1, -1))
    expected = torch.tensor([[0.5, -1.0, math.radians(10)], [3.0, 3.0, 0.0]])
    torch.testing.assert_close(flow, expected, atol=1e-5, rtol=1e-5)
    assert true_flow(now, frame(box(0, 0, 0, 7)).expand(2, -1, -1)).isnan().all()


def test_flow_is_that_of_boxes_of_the_last_frame_to_the_frames_before() -> None:
    task = BoxFlow(GRID, [CAR])
    assert task.quantities == ("box_flow_3",)
    batch = {"boxes": frame(box(-1, 0)), "boxes_2": frame(box(0, 1)), "boxes_3": frame(box(1, 3))}
    flow = torch.zeros(1, 2, 6, *GRID.shape)
    where, _, true = task.at_boxes({"box_flow_3": flow}, batch)
    assert (true == torch.tensor([[-1.0, -2.0, 0.0], [-2.0, -3.0, 0.0]])).all()
    assert (where[1] == 0).all()
    right = flow + torch.tensor([-1.0, -2, 0, -2, -3, 0])[:, None, None]
    assert task.loss({"box_flow_3": right}, batch)["flow"] == 0
    assert task.loss({"box_flow_3": flow}, batch)["flow"] > 0.1
    metric = task.metric()
    metric.update({"box_flow_3": right}, batch)
    values = metric.compute()
    assert values["flow_error"] == 0
    assert float(values["still_error"]) == pytest.approx((math.sqrt(5) + math.sqrt(13)) / 2)


def test_of_two_frames_flow_leads_to_the_one_before() -> None:
    task = BoxFlow(GRID, [CAR], frames=2)
    assert (task.quantities, task.inputs) == (("box_flow_2",), ("points", "points_2"))
    assert task.out_channels == {"box_flow_2": 2 * 3}


def test_a_track_that_is_new_supervises_no_flow() -> None:
    task = BoxFlow(GRID, [CAR])
    batch = {"boxes": frame(), "boxes_2": frame(box(0, 1, 0, 3)), "boxes_3": frame(box(1, 3))}
    prediction = {"box_flow_3": torch.ones(1, 2, 6, *GRID.shape)}
    assert task.loss(prediction, batch)["flow"] == 0


# ---- average precision ------------------------------------------------------------------------


def test_the_truth_has_a_precision_of_one() -> None:
    task = Detection(GRID, [WALKER, CAR])
    boxes = torch.cat([frame(box(1.2, 2.1, 75), box(-4, -3, 200, label=7)), frame(box(0, 0, -170))])
    values = measured(task, certain(task, boxes), boxes)
    names = {"ap_3d", "aph_3d", "ap_bev", "aph_bev"}
    assert values.keys() == names | {f"class_{c}/{n}" for c in (7, 8) for n in names}
    assert all(value == pytest.approx(1.0, abs=1e-4) for value in values.values())


def test_boxes_off_the_grid_are_neither_missed_nor_wrong() -> None:
    task = Detection(GRID, [CAR])
    inside, outside, nothing = box(0, 0), box(GRID.x[1] + 0.1, 0), box(-4, 4)
    boxes = torch.tensor([outside, inside, nothing])[:, :7]
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.1]), torch.full((3,), CAR.label))
    metric = DetectionMetrics(lambda maps: [found], task.anchors)
    metric.update({"detection": torch.zeros(1)}, {"boxes": frame(inside, outside)})
    assert all(float(value) == pytest.approx(1) for value in metric.compute().values())


def test_precision_is_the_area_worked_out_by_hand() -> None:
    # right, wrong, right, right of 4 boxes: precision 1, 1/2, 2/3, 3/4; interpolated 1, 3/4, 3/4
    right = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert average_precision(right, right, 4) == pytest.approx((1 + 0.75 + 0.75) / 4)
    # headings a quarter of a turn off: each gives half of its credit
    assert average_precision(right, right / 2, 4) == pytest.approx((1 + 0.75 + 0.75) / 8)
    assert average_precision(right[:0], right[:0], 3) == 0
    assert math.isnan(average_precision(right, right, 0))


@pytest.mark.parametrize(("degrees", "share"), [(0, 1.0), (90, 0.5), (180, 0.0), (-36, 0.8)])
def test_heading_counts_in_aph_alone(degrees: float, share: float) -> None:
    task = Detection(GRID, [Anchor(label=8, l=2.0, w=2.0, iou=0.7)])
    boxes = frame(box(0.25, 0.25, 10, l=2.0, w=2.0))
    turned = certain(task, boxes)
    turned["detection"][:, :, 6] += math.radians(degrees)
    values = measured(task, turned, boxes)
    assert values["ap_bev"] == pytest.approx(1.0)
    assert values["aph_bev"] == pytest.approx(share, abs=1e-5)


def test_the_threshold_of_overlap_and_the_height_decide() -> None:
    boxes = frame(box(0.25, 0.25))
    for iou, lift, bev, space in ((0.7, 0, 1, 1), (0.7, 0.4, 1, 0), (0.5, 0.4, 1, 1)):
        task = Detection(GRID, [Anchor(label=8, l=4.0, w=2.0, h=1.6, z=-0.8, iou=iou)])
        lifted = certain(task, boxes)
        lifted["detection"][:, :, 2] += lift
        values = measured(task, lifted, boxes)
        assert (values["ap_bev"], values["ap_3d"]) == (bev, space)


def test_a_box_is_found_once_and_the_second_detection_is_wrong() -> None:
    overlap = torch.tensor([[0.8, 0.0], [0.9, 0.75], [0.9, 0.0]])
    assert greedy_match(overlap, 0.7).tolist() == [0, 1, -1]
    assert greedy_match(overlap, 0.85).tolist() == [-1, 0, -1]
    assert greedy_match(torch.zeros(2, 0), 0.5).tolist() == [-1, -1]


def test_precision_pools_over_the_whole_set_however_it_is_cut() -> None:
    task = Detection(GRID, [CAR])
    boxes = torch.cat([frame(box(1, 2), box(-4, -3, 90)), frame(box(0, 0, 30)), frame()])
    prediction = certain(task, boxes)["detection"]
    prediction[0, 0, LOGIT, 4, 4] = 9.0  # not as sure as the true ones, and wrong
    prediction[2, 1, LOGIT, 9, 9] = 15.0
    prediction[1, :, LOGIT] -= 10.0  # true, and the least sure of all
    whole, parts = task.metric(), task.metric()
    whole.update({"detection": prediction}, {"boxes": boxes})
    for n in range(3):
        parts.update({"detection": prediction[n : n + 1]}, {"boxes": boxes[n : n + 1]})
    assert whole.compute() == parts.compute()
    assert 0.5 < float(whole.compute()["ap_bev"]) < 1.0


def test_overlaps_in_evaluation_are_those_of_the_fast_overlap() -> None:
    from taskray.geometry.overlap import ground_iou, height_overlap

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(20, 7, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    space, ground = overlaps(a, b)
    torch.testing.assert_close(ground, ground_iou(a, b), atol=1e-6, rtol=1e-6)
    shared = ground * (a[:, None, 3:5].prod(-1) + b[None, :, 3:5].prod(-1)) / (1 + ground)
    volume = shared * height_overlap(a, b)
    both = a[:, None, 3:6].prod(-1) + b[None, :, 3:6].prod(-1)
    torch.testing.assert_close(space, volume / (both - volume), atol=1e-6, rtol=1e-6)


def test_detections_come_best_first_without_rivals_and_not_too_many() -> None:
    task = Detection(GRID, [CAR], max_boxes=1, min_score=0.3)
    boxes = frame(box(1, 2), box(-4, -3, 90))
    maps = certain(task, boxes)["detection"]
    maps[:, 1, LOGIT] -= 14.0  # the second, less sure
    (found,) = task.detections(maps)
    assert found.boxes.shape == (1, 7)
    torch.testing.assert_close(found.boxes[0], boxes[0, 0, :7], atol=1e-5, rtol=1e-5)
    assert found.labels.tolist() == [8]
    (none,) = task.detections(maps - 40.0)
    assert len(none.boxes) == 0
    assert task.out_channels == {"detection": 2 * CHANNELS}
