"""Tasks, network and metrics of the camera's motion and of object motion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from predicting import predict
from scenes import world_pairs
from torch import Tensor

from taskray.data.readers.reader import place_of
from taskray.data.streams.batch import PLACE
from taskray.data.streams.rows import places
from taskray.errors import InputError
from taskray.geometry.motion import rigid_motion, rotation_angle, rotation_matrix, squared_length
from taskray.geometry.warp import invert
from taskray.job import plugins
from taskray.models.motion import Matching, MotionNet
from taskray.models.unet import UNet
from taskray.schema import IGNORE
from taskray.tasks.ego_motion import EgoMotion
from taskray.tasks.motion import Motion
from taskray.tasks.motion_metrics import EgoMotionMetrics, ObjectMotionMetrics, positions
from taskray.tasks.object_motion import ObjectMotion
from taskray.tasks.task import Task

Columns = dict[str, Tensor]
TASKS: dict[str, Callable[..., Task]] = {
    "ego_motion": EgoMotion,
    "object_motion": ObjectMotion,
    "motion": Motion,
}
RIGID = ("camera_motion", "camera_motion_back_2")
FIELDS = ("object_motion", "object_motion_back_2")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_of(metric: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def frames(count: int = 2, height: int = 20, width: int = 33) -> Columns:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return {name: torch.rand(shape, generator=generator) for name in ("image", "image_2")}


def network_of(task: Task, seed: int = 0, **arguments: Any) -> MotionNet:
    torch.manual_seed(seed)
    return MotionNet(task.in_channels, task.out_channels, base=8, depth=3, **arguments)


# ---- geometry ---------------------------------------------------------------------------------


def test_rotations_are_those_of_rodrigues_and_exact_near_the_identity() -> None:
    vectors = torch.cat([draw(20, 3), 1e-3 * draw(20, 3, seed=1), 1e-9 * draw(5, 3, seed=2)])
    vectors = torch.cat([vectors, torch.zeros(1, 3, dtype=torch.float64)])
    for vector, rotation in zip(vectors, rotation_matrix(vectors), strict=True):
        x, y, z = vector.tolist()
        cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
        torch.testing.assert_close(rotation, torch.linalg.matrix_exp(cross), atol=1e-12, rtol=0)
    angles = rotation_angle(rotation_matrix(vectors))
    expected = vectors.norm(dim=1)
    expected = torch.minimum(expected, 2 * math.pi - expected)
    torch.testing.assert_close(angles, expected, atol=1e-12, rtol=1e-9)
    single = rotation_matrix(vectors.float())
    torch.testing.assert_close(single.double(), rotation_matrix(vectors), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-2, 2.0])
def test_the_gradient_of_a_rotation_equals_finite_differences(size: float) -> None:
    vectors = (size * draw(3, 3)).requires_grad_()
    assert torch.autograd.gradcheck(rotation_matrix, vectors)


def test_the_gradient_of_squared_lengths_equals_finite_differences() -> None:
    vectors = draw(2, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(squared_length, vectors)
    torch.testing.assert_close(squared_length(vectors), vectors.square().sum(1, keepdim=True))


# ---- tasks and their network ------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_predicts_its_quantities_of_a_pair_from_its_network(name: str) -> None:
    task = TASKS[name]()
    assert plugins.BUILTIN["task"][name].endswith(TASKS[name].__name__)
    assert not task.per_frame
    batch = frames()
    prediction = predict(task, network_of(task), batch)
    assert tuple(prediction) == task.quantities
    for quantity, value in prediction.items():
        assert task.predicts(quantity)
        assert value.shape == ((2, 4, 4) if quantity in RIGID else (2, 3, 20, 33))
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    assert not task.predicts("camera_motion_2")


@pytest.mark.parametrize("name", ["ego_motion", "motion"])
@pytest.mark.parametrize("back", ["predicted", "inverted"])
def test_the_motion_back_is_predicted_or_the_inverse(name: str, back: str) -> None:
    task = TASKS[name](direction_back=back)
    network = network_of(task)
    batch = frames()
    prediction = predict(task, network, batch)
    there, motion_back = (prediction[q] for q in RIGID)
    identity = torch.eye(4).expand(2, 4, 4)
    rotation = there[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, identity[:, :3, :3])
    undone = motion_back @ there
    if back == "inverted":
        torch.testing.assert_close(undone, identity, atol=1e-6, rtol=0)
    else:
        assert (undone - identity).abs().max() > 1e-5
        exchanged = {"image": batch["image_2"], "image_2": batch["image"]}
        swapped = predict(task, network, exchanged)
        torch.testing.assert_close(swapped["camera_motion"], motion_back)
    if name == "motion":
        exchanged = {"image": batch["image_2"], "image_2": batch["image"]}
        swapped = predict(task, network, exchanged)
        torch.testing.assert_close(swapped["object_motion"], prediction["object_motion_back_2"])


@pytest.mark.parametrize("name", TASKS)
def test_training_begins_close_to_no_motion(name: str) -> None:
    task = TASKS[name]()
    for quantity, value in predict(task, network_of(task), frames()).items():
        rest = torch.eye(4) if quantity in RIGID else torch.zeros(())
        assert (value - rest).abs().max() < 0.05, quantity


@pytest.mark.parametrize("name", TASKS)
def test_any_network_of_maps_will_do(name: str) -> None:
    task = TASKS[name]()
    network = UNet(task.in_channels, task.out_channels, base=8, depth=2)
    prediction = predict(task, network, frames())
    assert tuple(prediction) == task.quantities


@pytest.mark.parametrize("scales", [0, 1, 3])
@pytest.mark.parametrize("size", [(8, 8), (20, 33), (64, 96)])
def test_the_network_takes_frames_of_any_size(scales: int, size: tuple[int, int]) -> None:
    network = MotionNet(6, {"camera": 6, "field": 3}, base=8, depth=3, scales=scales)
    output = network(torch.rand(2, 6, *size))
    assert output["camera"].shape == (2, 6)
    assert output["field"].shape == (2, 3, *size)
    sum(part.sum() for part in output.values()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name


def test_the_network_has_the_heads_of_its_task_in_any_order() -> None:
    pair = torch.rand(1, 6, 32, 32)
    assert MotionNet(6, {"a": 6})(pair).shape == (1, 6)
    assert MotionNet(6, {"a": 3})(pair).shape == (1, 3, 32, 32)
    both = MotionNet(6, {"b": 3, "a": 6})(pair)
    assert {head: values.shape[1] for head, values in both.items()} == {"b": 3, "a": 6}


@pytest.mark.parametrize("heads", [{"a": 1}, {"a": 6, "b": 6}, {"a": 6, "b": 3, "c": 3}])
def test_other_heads_than_motions_are_refused(heads: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"model.*motion_net: got heads of [\d, ]+ channels, exp"):
        plugins.build("model", "motion_net", {}, "tasks.x.model", in_channels=6, out_channels=heads)


def test_the_matching_finds_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(1, 3, 40, 60, generator=generator)
    first, second = wide[..., 4:36, 4:56], wide[..., 3:35, 6:58]  # the scene moves by (-2, +1)
    network = MotionNet(6, {"a": 6}, scales=1)
    (matching,) = network.matching
    column, row = matching(first, second).detach()[0, :2, 8:-8, 8:-8] * matching.radius
    assert float(column.mean()) == pytest.approx(-2, abs=0.2)
    assert float(row.mean()) == pytest.approx(1, abs=0.2)


def test_the_network_learns_to_tell_turns_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(32, 3, 24, 40, generator=generator)
    wide = torch.nn.functional.avg_pool2d(wide, 3, stride=1)
    shift = torch.randint(-2, 3, (32,), generator=generator)
    first = wide[..., 2:-2]
    pairs = zip(wide, shift.tolist(), strict=True)
    second = torch.stack([frame[..., 2 - s : frame.shape[-1] - 2 - s] for frame, s in pairs])
    task = EgoMotion("inverted")
    network = network_of(task)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    label = rigid_motion(
        0.01 * torch.stack([torch.zeros(32), shift, torch.zeros(32)], dim=1), torch.zeros(32, 3)
    )
    batch = {"image": first, "image_2": second, "camera_motion": label}
    losses = []
    for _ in range(40):
        loss = torch.stack(list(task.loss(predict(task, network, batch), batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


# ---- supervised losses ------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("width", [96, 97, 99])
def test_matching_finds_a_movement_where_it_is_whatever_the_size(width: int, stride: int) -> None:
    first = torch.randn(1, 3, 48, width, generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[..., 64:88] = first[..., 64:88].roll(stride, dims=2)
    moved = Matching(2, stride)(first, second)[0, 1].mean(dim=0)  # by rows, in each column
    (columns,) = torch.where(moved > moved.max() / 2)
    assert float(columns.double().mean()) == pytest.approx(75.5, abs=1.0)


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_vanishes_on_the_worlds_truth_and_its_gradient_reaches_the_prediction(
    name: str,
) -> None:
    task = TASKS[name]()
    batch = world_pairs("sim")
    truth = {q: batch[q] for q in task.quantities}
    for term, value in task.loss(truth, batch).items():
        assert float(value) == pytest.approx(0, abs=1e-6), term
    wrong = {q: (v + 0.1).requires_grad_() for q, v in truth.items()}
    sum(task.loss(wrong, batch).values()).backward()
    for quantity, value in wrong.items():
        assert value.grad is not None, quantity
        assert value.grad.any(), quantity


def test_the_losses_have_the_values_worked_out_by_hand() -> None:
    label = rigid_motion(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
    predicted = rigid_motion(torch.tensor([[0.0, 0.0, math.pi / 2]]), torch.tensor([[0.5, 0, 1]]))
    terms = EgoMotion("inverted", rotation_weight=2.0).loss(
        {"camera_motion": predicted, "camera_motion_back_2": invert(predicted)},
        {"camera_motion": label},
    )
    assert float(terms["rotation"]) == pytest.approx(2 * 4)
    assert float(terms["translation"]) == pytest.approx(0.5)
    batch = still_and_moving()
    flat = {q: torch.zeros_like(batch[q]) for q in FIELDS}
    terms = ObjectMotion().loss(flat, batch)
    assert float(terms["moving"]) == pytest.approx((0.3 + 0 + 0.4) / 3)
    assert float(terms["still"]) == 0


def still_and_moving() -> Columns:
    """One row of a moving, a still and an unlabelled pixel, in both frames."""
    motion = torch.zeros(1, 3, 1, 3)
    motion[0, :, 0, 0] = torch.tensor([0.3, 0.0, 0.4])
    motion[0, :, 0, 2] = 9.0
    mask = torch.tensor([1, 0, IGNORE]).reshape(1, 1, 1, 3)
    return {
        "object_motion": motion, "object_motion_back_2": -motion,
        "motion_mask": mask, "motion_mask_2": mask,
    }  # fmt: skip


def test_without_a_labelled_pixel_the_loss_is_zero_and_has_a_gradient() -> None:
    batch = still_and_moving()
    batch |= {m: torch.full_like(batch[m], IGNORE) for m in ("motion_mask", "motion_mask_2")}
    prediction = {q: torch.ones_like(batch[q]).requires_grad_() for q in FIELDS}
    total = sum(ObjectMotion().loss(prediction, batch).values())
    total.backward()
    assert float(total.detach()) == 0
    assert all(not value.grad.any() for value in prediction.values())


def test_motion_without_object_labels_needs_the_cameras_alone() -> None:
    assert Motion(object_labels=False).labels == ("camera_motion",)
    assert set(Motion().labels) > {"camera_motion", *FIELDS}
    batch = world_pairs("sim", count=2)
    task = Motion(object_labels=False)
    assert set(task.loss({q: batch[q] for q in task.quantities}, batch)) == {
        "camera/rotation", "camera/translation",
    }  # fmt: skip


# ---- metrics ----------------------------------------------------------------------------------


def walk(count: int, seed: int = 0) -> Tensor:
    return rigid_motion(
        0.05 * draw(count, 3, seed=seed), 0.3 * draw(count, 3, seed=seed + 1)
    ).float()


def measured(predicted: Tensor, true: Tensor, snippet: int = 5, parts: int = 1) -> dict[str, float]:
    metric = EgoMotionMetrics(snippet)
    for p, t in zip(predicted.chunk(parts), true.chunk(parts), strict=True):
        metric.update({"camera_motion": p}, {"camera_motion": t})
    return values_of(metric)


def test_positions_follow_the_cameras_way() -> None:
    steps = rigid_motion(torch.zeros(2, 3), torch.tensor([[0.0, 0, -1.0], [0.0, 0, -2.0]]))
    (way,) = positions(steps, 3)  # points come closer: the camera goes forward
    assert way.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 3]]
    turn = rigid_motion(torch.tensor([[0.0, math.pi / 2, 0.0]]), torch.zeros(1, 3))
    steps = torch.cat([turn, steps[:1]])
    (way,) = positions(steps, 3)
    assert torch.allclose(way[2].abs(), torch.tensor([1.0, 0, 0]), atol=1e-6)


def test_the_truth_has_no_error_whatever_its_scale() -> None:
    true = walk(9)
    scaled = true.clone()
    scaled[:, :3, 3] *= 0.2
    for name, value in measured(scaled, true).items():
        assert value == pytest.approx(0, abs=1e-4), name


def test_the_trajectory_error_is_that_of_numpy_poses() -> None:
    true, predicted = walk(7), walk(7, seed=5)
    errors = []
    for start in range(7 - 3):
        ways = []
        for motions in (true, predicted):
            pose, way = np.eye(4), [np.zeros(3)]
            for motion in motions[start : start + 4].double().numpy():
                pose = motion @ pose  # first camera to this one
                way.append(np.linalg.inv(pose)[:3, 3])
            ways.append(np.stack(way))
        scale = (ways[0] * ways[1]).sum() / (ways[1] ** 2).sum()
        errors.append(np.sqrt(((scale * ways[1] - ways[0]) ** 2).sum()) / 5)
    assert measured(predicted, true)["ate"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_angles_are_those_between_rotations_and_directions() -> None:
    true = rigid_motion(torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0.0, 0, 0]]))
    degrees = torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    predicted = rigid_motion(torch.deg2rad(degrees), torch.tensor([[2.0, 2.0, 0], [1.0, 0, 0]]))
    values = measured(predicted, true, snippet=2)  # the camera at rest has no direction
    assert values["rotation_deg"] == pytest.approx(2.0, abs=1e-4)
    assert values["translation_deg"] == pytest.approx(45.0, abs=1e-4)


def test_the_metrics_do_not_depend_on_the_batches() -> None:
    true, predicted = walk(12), walk(12, seed=3)
    assert measured(predicted, true, parts=1) == measured(predicted, true, parts=4)


def test_metrics_that_are_reset_have_seen_nothing() -> None:
    metric, fresh = (Motion(object_labels=False).metric() for _ in range(2))
    seen, true = ({"camera_motion": walk(6, seed=seed)} for seed in (3, 0))
    metric.update(seen, true)
    metric.reset()
    for each in (metric, fresh):
        each.update(true, true)
    assert values_of(metric) == values_of(fresh)


def drive(rows: int, speed: float) -> Tensor:
    return rigid_motion(torch.zeros(rows, 3), torch.tensor([[0.0, 0.0, -speed]]).repeat(rows, 1))


def ate_of(predicted: Tensor, true: Tensor, keys: list[str], batch_size: int = 7) -> float:
    metric, sequences = EgoMotionMetrics(), dict[str, int]()
    for start in range(0, len(true), batch_size):
        part = slice(start, start + batch_size)
        labels = {"camera_motion": true[part], PLACE: places(keys[part], sequences)}
        metric.update({"camera_motion": predicted[part]}, labels)
    return values_of(metric)["ate"]


def test_a_trajectory_stays_within_its_sequence() -> None:
    """Right up to one scale in each sequence: no error, whatever the scale of the other."""
    true = torch.cat([drive(20, 2.0), drive(20, 0.2)])
    predicted = torch.cat([drive(20, 1.0), drive(20, 0.4)])
    keys = [f"{sequence}/{row:06d}" for sequence in ("00", "01") for row in range(20)]
    assert measured(predicted, true)["ate"] > 0.01  # as if of one sequence
    assert ate_of(predicted, true, keys) == pytest.approx(0, abs=1e-6)


def test_a_trajectory_does_not_skip_a_row_that_is_missing() -> None:
    true, predicted = drive(12, 1.0), drive(12, 1.0)
    true[6:], predicted[6:] = drive(6, 3.0), drive(6, 1.0)
    whole = [f"seq-01/frame-{2 * row:06d}" for row in range(12)]
    without = [f"seq-01/frame-{2 * (row + (row >= 6)):06d}" for row in range(12)]
    assert ate_of(predicted, true, whole) > 0.05
    assert ate_of(predicted, true, without) == pytest.approx(0, abs=1e-6)


def test_rows_of_separate_scenes_have_no_trajectory() -> None:
    keys = [f"real-test-0-{row:06d}-0000" for row in range(9)]
    assert math.isnan(ate_of(walk(9), walk(9), keys))
    assert place_of("seq-01/frame-000003") == ("seq-01", 3)
    assert place_of("a/b/07") == ("a/b", 7)
    assert place_of("a/b") == ("a/b", 0)
    assert place_of("bonn_000000_000019") == ("bonn_000000_000019", 0)


def test_too_short_a_set_has_no_trajectory() -> None:
    values = measured(walk(3), walk(3))
    assert math.isnan(values["ate"])
    assert values["rotation_deg"] == pytest.approx(0, abs=1e-4)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_measured_is_nan() -> None:
    for metric in (EgoMotionMetrics(), ObjectMotionMetrics(), Motion().metric()):
        values = values_of(metric)
        assert values
        assert all(math.isnan(v) for v in values.values())


def test_object_motion_is_measured_where_things_move_and_where_they_stand() -> None:
    batch = still_and_moving()
    metric = ObjectMotionMetrics()
    metric.update({"object_motion": torch.zeros(1, 3, 1, 3)}, batch)
    assert values_of(metric) == {"moving_error": pytest.approx(0.5), "still_error": 0.0}


def test_motion_measures_both() -> None:
    batch: Mapping[str, Tensor] = world_pairs("sim", count=5)
    for labels in (True, False):
        task = Motion(object_labels=labels)
        metric = task.metric()
        metric.update({q: batch[q] for q in task.quantities}, batch)
        values = values_of(metric)
        assert ("moving_error" in values) == labels
        assert values["ate"] == pytest.approx(0, abs=1e-5)
