"""The relation of detections and box flow: on the truth, at its edges, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from taskray.errors import InputError
from taskray.geometry.grid import Grid
from taskray.relations.motion_consistency import DIRECTION, LOGIT, MotionConsistency
from taskray.tasks.anchors import Anchor, Anchors, wrap
from taskray.tasks.box_flow import BoxFlow
from taskray.tasks.detection import Detection

Columns = dict[str, Tensor]
GRID = Grid(x=(-8.0, 8.0), y=(-6.0, 6.0), cell=0.5)
ANCHORS = Anchors(GRID, [Anchor(label=8), Anchor(label=7, l=0.8, w=0.8)])
FRAMES = ("", "_2", "_3")
RELATION = MotionConsistency(GRID, min_confidence=0.0)


def tracks(*poses: list[tuple[float, float, float]]) -> list[Tensor]:
    """Boxes ``[n, 7]`` of each of three frames, from (x, y, degrees) of each box in each."""
    frames = []
    for time in range(3):
        rows = [
            [track[time][0], track[time][1], -0.9, 4.0 + n, 2.0, 1.5, math.radians(track[time][2])]
            for n, track in enumerate(poses)
        ]
        frames.append(torch.tensor(rows, dtype=torch.float64))
    return frames


CROSSING = [(-3.0, -2.0, 170.0), (-2.3, -1.5, 178.0), (-1.4, -1.2, -174.0)]
TURNING = [(3.0, 3.0, 30.0), (3.5, 2.9, 60.0), (3.8, 2.4, 95.0)]
STANDING = [(4.0, -3.0, -60.0)] * 3


def maps(boxes: Tensor, anchors: Anchors = ANCHORS) -> tuple[Tensor, Tensor]:
    """What is right to predict everywhere: each anchor's difference to the nearest box, with a
    logit of the track's own; and which box that is. ``[1, A, 9, Y, X]``, ``[A, Y, X]``."""
    rows, columns = anchors.grid.shape
    axes = [torch.arange(n) for n in (anchors.per_cell, rows, columns)]
    where = [index.flatten() for index in torch.meshgrid(*axes, indexing="ij")]
    centre = anchors.boxes_at(where, boxes)
    nearest = torch.cdist(centre[:, :2], boxes[:, :2]).argmin(dim=1)
    encoded = anchors.encode(boxes[nearest], where)
    logits = [3 * encoded[:, 7:], 1.0 + nearest[:, None]]
    values = torch.cat([encoded[:, :7], *logits], dim=1)
    shape = (anchors.per_cell, rows, columns)
    return values.T.reshape(9, *shape).movedim(0, 1)[None], nearest.reshape(shape)


def truth(frames: list[Tensor], reach: float | None = None) -> Columns:
    """Detections and flow of the last frame's boxes, all true. With ``reach`` the anchors farther
    from their box in the last frame are given a logit of -9 there."""
    predictions = {f"detection{s}": maps(b)[0] for s, b in zip(FRAMES, frames, strict=True)}
    nearest = maps(frames[2])[1]
    flows = []
    for past in (frames[1], frames[0]):
        shift = past[:, [0, 1, 6]] - frames[2][:, [0, 1, 6]]
        shift[:, 2] = wrap(shift[:, 2])
        flows.append(shift[nearest].movedim(-1, 1))
    predictions["box_flow_3"] = torch.cat(flows, dim=1)[None]
    if reach is not None:
        detection = predictions["detection_3"]
        far = detection[:, :, :2].norm(dim=2) > reach
        detection[:, :, LOGIT][far] = -9.0
    return predictions


def total(predictions: Columns, relation: MotionConsistency = RELATION) -> Tensor:
    return torch.stack(list(relation(predictions, {}).values())).sum()


def disturbed(frames: list[Tensor], amount: float = 0.05) -> Columns:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + amount * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in truth(frames).items()
    }


@pytest.mark.parametrize("track", [CROSSING, TURNING, STANDING], ids=["moves", "turns", "stands"])
def test_the_relation_vanishes_on_true_boxes_and_flows(
    track: list[tuple[float, float, float]],
) -> None:
    terms = RELATION(truth(tracks(track)), {})
    assert terms.keys() == {"class", "residual", "direction"}
    assert terms["class"] == 0
    assert terms["direction"] == 0
    assert terms["residual"] < 1e-20


def test_with_several_boxes_it_vanishes_around_each() -> None:
    predictions = truth(tracks(CROSSING, TURNING, STANDING), reach=1.0)
    assert total(predictions, MotionConsistency(GRID, min_confidence=0.5)) < 1e-20
    assert total(predictions, RELATION) > 1e-3  # halfway between two boxes the nearest changes


def test_the_printed_sign_of_the_remainder_would_not_vanish() -> None:
    predictions = truth(tracks(CROSSING))
    mirrored = {n: v.clone() for n, v in predictions.items()}
    for name in ("detection", "detection_2", "detection_3"):
        mirrored[name][:, :, :2] *= -1
        mirrored[name][:, :, 6] *= -1
    assert total(predictions) < 1e-20
    assert total(mirrored) > 1e-2  # anchor minus box is not the convention


def test_flow_of_less_than_a_cell_counts() -> None:
    predictions = truth(tracks(STANDING))
    predictions["box_flow_3"][:, :, 0] += 0.1
    term = RELATION(predictions, {})["residual"]
    assert float(term) == pytest.approx(0.01 / 2)  # in one of two past frames


def test_an_error_in_any_channel_raises_the_loss() -> None:
    frames = tracks(CROSSING)
    for name, channels in (("detection", 9), ("detection_2", 9), ("detection_3", 9)):
        for channel in range(channels):
            wrong = truth(frames)
            wrong[name][:, :, channel] += 0.1
            assert total(wrong) > 1e-3
    for channel in range(6):
        wrong = truth(frames)
        wrong["box_flow_3"][:, :, channel] += 0.1
        assert total(wrong) > 1e-3


def test_a_heading_that_passes_half_a_turn_is_no_error() -> None:
    predictions = truth(tracks(CROSSING))
    for name in ("detection", "detection_2", "detection_3"):
        predictions[name][:, :, 6] += math.pi
        predictions[name][:, :, DIRECTION] *= -1
        assert total(predictions) < 1e-20


def test_a_box_that_points_the_other_way_is_an_error_of_direction_alone() -> None:
    predictions = truth(tracks(STANDING))
    predictions["detection_2"][:, :, DIRECTION] *= -1
    terms = RELATION(predictions, {})
    assert terms["residual"] < 1e-20
    assert float(terms["direction"]) == pytest.approx(36.0 / 2)  # in one of two past frames
    paper = MotionConsistency(GRID, min_confidence=0.0, direction_weight=0.0)
    assert paper(predictions, {})["direction"] == 0


def test_flow_that_leaves_the_grid_does_not_count() -> None:
    predictions = truth(tracks(STANDING))
    predictions["box_flow_3"][:, :, 0] = 100.0
    predictions["box_flow_3"][:, :, 4] = -100.0
    assert total(predictions) == 0
    predictions["box_flow_3"][:, :, 0] = 0.5  # of 32 columns the last one leaves
    predictions["box_flow_3"][..., :-1] = 0.0
    assert total(predictions) == pytest.approx(0, abs=1e-12)


def test_only_anchors_that_are_sure_count() -> None:
    predictions = truth(tracks(STANDING))
    predictions["detection_3"][:, :, LOGIT] = -4.0
    predictions["detection_2"][:, :, LOGIT] = -4.0
    predictions["detection"][:, :, LOGIT] = -4.0
    predictions["detection_3"][0, 1, LOGIT, 3, 5] = 2.0
    strict = MotionConsistency(GRID, min_confidence=0.5)
    assert float(strict(predictions, {})["class"]) == pytest.approx(36.0)
    halved = MotionConsistency(GRID, min_confidence=0.5, class_weight=0.5)
    assert float(halved(predictions, {})["class"]) == pytest.approx(18.0)
    predictions["detection_3"][:, :, LOGIT] = -4.0
    assert total(predictions, strict) == 0


def test_where_nothing_counts_the_gradient_is_zero() -> None:
    strict = MotionConsistency(GRID, min_confidence=0.999)
    for live in strict.quantities:
        predictions = truth(tracks(CROSSING))
        predictions[live].requires_grad_()
        loss = total(predictions, strict)
        loss.backward()
        assert loss == 0
        assert torch.equal(predictions[live].grad, torch.zeros_like(predictions[live]))


def test_the_gradient_reaches_the_live_prediction_alone() -> None:
    for live in RELATION.quantities:
        predictions = disturbed(tracks(CROSSING, TURNING))
        predictions[live].requires_grad_()
        total(predictions).backward()
        gradient = predictions[live].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()
        assert all(v.grad is None for n, v in predictions.items() if n != live)


def test_the_gradient_equals_finite_differences() -> None:
    grid = Grid(x=(-2.0, 2.0), y=(-1.5, 1.5), cell=1.0)
    relation = MotionConsistency(grid, min_confidence=0.3)
    generator = torch.Generator().manual_seed(1)
    predictions = {
        name: torch.randn(
            1, 2, 6 if "flow" in name else 9, *grid.shape, generator=generator, dtype=torch.float64
        )
        for name in relation.quantities
    }
    for live in relation.quantities:

        def loss(value: Tensor, name: str = live) -> Tensor:
            return total(predictions | {name: value}, relation)

        assert torch.autograd.gradcheck(loss, predictions[live].clone().requires_grad_())


def test_descending_the_gradient_of_any_live_prediction_lowers_the_loss() -> None:
    for live in RELATION.quantities:
        predictions = disturbed(tracks(CROSSING))
        value = predictions[live].requires_grad_()
        before = total(predictions)
        (gradient,) = torch.autograd.grad(before, value)
        after = predictions | {live: value - 1e-3 * gradient / gradient.abs().max()}
        assert total(after) < before


def test_of_two_frames_the_second_is_the_current_one() -> None:
    relation = MotionConsistency(GRID, frames=2, min_confidence=0.0)
    assert relation.quantities == ("detection_2", "detection", "box_flow_2")
    three = truth(tracks(CROSSING))
    two = {
        "detection": three["detection_2"],
        "detection_2": three["detection_3"],
        "box_flow_2": three["box_flow_3"][:, :, :3],
    }
    assert total(two, relation) < 1e-20


def test_maps_of_another_grid_are_refused() -> None:
    with pytest.raises(InputError, match=r"grid: got \(468, 468\) cells, expected"):
        total(truth(tracks(CROSSING)), MotionConsistency())


def test_tasks_of_another_grid_or_other_classes_are_refused_before_anything_runs() -> None:
    cars, people = [Anchor(label=8)], [Anchor(label=7)]
    tasks = {"boxes": Detection(GRID, cars), "flow": BoxFlow(GRID, cars)}
    RELATION.check_tasks(tasks)
    as_many_cells = Grid(x=(-16.0, 16.0), y=(-12.0, 12.0), cell=1.0)
    with pytest.raises(InputError, match=r"grid: got .*, expected that of task 'flow'"):
        RELATION.check_tasks({**tasks, "flow": BoxFlow(as_many_cells, cars)})
    with pytest.raises(InputError, match=r"classes: tasks .* differ in them"):
        RELATION.check_tasks({**tasks, "flow": BoxFlow(GRID, people)})
