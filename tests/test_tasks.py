"""Losses and metrics against values worked out by hand, their masks, and how they pool."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taskray.errors import InputError
from taskray.job import plugins
from taskray.schema import QUANTITIES
from taskray.tasks import losses
from taskray.tasks.depth import Depth
from taskray.tasks.metrics import DepthMetrics, NormalsMetrics
from taskray.tasks.normals import Normals
from taskray.tasks.task import Task

Columns = dict[str, Tensor]
TASKS: dict[str, Callable[[], Task]] = {"depth": Depth, "normals": Normals}
LOSSES = {
    name: getattr(losses, name) for name in ("mse", "l1", "huber", "berhu", "log_mse", "cosine")
}


def row(*values: float) -> Tensor:
    """A frame of one row and one channel."""
    return torch.tensor(values).reshape(1, 1, 1, -1)


def vectors(*values: tuple[float, float, float]) -> Tensor:
    """A frame of one row and three channels."""
    return torch.tensor(values).T.reshape(1, 3, 1, -1)


def at_angle(*degrees: float) -> Tensor:
    """Unit vectors at so many degrees from (0, 0, -1)."""
    return vectors(*((math.sin(math.radians(d)), 0.0, -math.cos(math.radians(d))) for d in degrees))


FACING = (0.0, 0.0, -1.0)


def labels_of(name: str, count: int = 6, seed: int = 0) -> Columns:
    """Random labels of a task, some of them invalid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, 5, 7)
    holes = torch.rand(shape, generator=generator) < 0.2
    if name == "depth":
        values = 0.5 + 20 * torch.rand(shape, generator=generator)
    else:
        values = torch.randn(count, 3, 5, 7, generator=generator)
        values = values / values.norm(dim=1, keepdim=True)
    return {name: torch.where(holes, 0.0, values)}


def values_of(metric: DepthMetrics | NormalsMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


# ---- losses -----------------------------------------------------------------------------------


def test_every_built_in_loss_is_tested_here() -> None:
    assert set(LOSSES) == set(plugins.BUILTIN["loss"])


def test_losses_have_the_values_worked_out_by_hand() -> None:
    prediction, label = row(1.0, 4.0, 9.0), row(2.0, 2.0, 0.0)
    valid = label > 0
    expected = {"mse": (1 + 4) / 2, "l1": (1 + 2) / 2, "log_mse": math.log(2) ** 2}
    d = 250 / 256  # MultiNet++, eq. 5: both errors are larger
    expected["huber"] = d * ((1 - d / 2) + (2 - d / 2)) / 2
    for name, value in expected.items():
        assert float(LOSSES[name](prediction, label, valid)) == pytest.approx(value)
    predicted, true = vectors((0, 0, -3), (2, 0, 0), (1, 1, 1)), vectors(FACING, FACING, FACING)
    mask = torch.tensor([True, True, False]).reshape(1, 1, 1, 3)
    assert float(losses.cosine(predicted, true, mask)) == pytest.approx((0 + 1) / 2)


def test_huber_is_that_of_torch_over_the_valid_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, label = 4 * torch.rand(2, 2, 1, 5, 7, generator=generator)
    valid = torch.rand(2, 1, 5, 7, generator=generator) < 0.5
    expected = torch.nn.HuberLoss(delta=losses.HUBER_DELTA)(prediction[valid], label[valid])
    torch.testing.assert_close(losses.huber(prediction, label, valid), expected)


def test_the_reverse_huber_loss_is_linear_up_to_a_fifth_of_the_largest_valid_difference() -> None:
    prediction, label = row(1.0, 3.0, 15.0, 99.0), row(0.0, 1.0, 5.0, 1.0)  # differ by 1, 2, 10, 98
    valid = torch.tensor([True, True, True, False]).reshape(1, 1, 1, 4)
    bound = 0.2 * 10
    expected = (1 + 2 + (10**2 + bound**2) / (2 * bound)) / 3
    assert float(losses.berhu(prediction, label, valid)) == pytest.approx(expected)
    assert float(losses.berhu(label, label, valid)) == 0.0


def test_depth_is_compared_as_inverse_depth_relative_to_the_farthest() -> None:
    task = Depth(loss="l1", loss_on="inverse", min_depth=0.5, max_depth=40.0)
    loss = task.loss({"depth": row(2.0, 10.0, 8.0)}, {"depth": row(4.0, 8.0, 0.0)})
    assert float(loss["l1"]) == pytest.approx((abs(20 - 10) + abs(4 - 5)) / 2)


def test_a_loss_over_several_channels_is_a_mean_over_channels_too() -> None:
    valid = torch.tensor([True, False]).reshape(1, 1, 1, 2)
    loss = losses.l1(vectors((1, 2, 6), (9, 9, 9)), vectors((0, 0, 0), (0, 0, 0)), valid)
    assert float(loss) == pytest.approx(3.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_one_valid_label_is_zero_with_a_gradient_of_zeros(name: str) -> None:
    prediction = torch.rand(2, 3, 4, 5).add(0.1).requires_grad_()
    label = torch.zeros(2, 3, 4, 5)
    loss = LOSSES[name](prediction, label, torch.zeros(2, 1, 4, 5, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert loss.shape == ()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_under_the_mask_does_not_matter(name: str) -> None:
    prediction = torch.rand(2, 3, 4, 5).add(0.1)
    label = torch.rand(2, 3, 4, 5).add(0.1)
    valid = torch.rand(2, 1, 4, 5) < 0.5
    other = torch.where(valid, label, torch.nan)
    changed = torch.where(valid, prediction, 7.0).requires_grad_()
    loss = LOSSES[name](changed, other, valid)
    torch.testing.assert_close(loss, LOSSES[name](prediction, label, valid))
    loss.backward()
    assert not changed.grad.masked_select(~valid).nan_to_num(0.0).any()


# ---- tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_predicts_its_quantities_in_the_shapes_of_the_schema(name: str) -> None:
    task = TASKS[name]()
    output = 50 * torch.randn(2, *task.out_channels.values(), 5, 7)
    prediction = task.predict(output)
    assert tuple(prediction) == task.quantities
    for quantity, value in prediction.items():
        assert value.shape == (2, QUANTITIES[quantity].shape[0], 5, 7)
        assert value.isfinite().all()


@pytest.mark.parametrize("name", TASKS)
def test_training_the_output_alone_brings_the_loss_down(name: str) -> None:
    task = TASKS[name]()
    batch = labels_of(name)
    torch.manual_seed(0)
    output = (0.1 * torch.randn(6, *task.out_channels.values(), 5, 7)).requires_grad_()
    optimizer = torch.optim.Adam([output], lr=0.1)
    start = torch.stack(list(task.loss(task.predict(output), batch).values())).sum().item()
    for _ in range(150):
        loss = torch.stack(list(task.loss(task.predict(output), batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * start


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_without_labels_gives_zero_loss_and_no_nan(name: str) -> None:
    task = TASKS[name]()
    output = torch.randn(2, *task.out_channels.values(), 5, 7, requires_grad=True)
    batch = {name: torch.zeros(2, *labels_of(name)[name].shape[1:])}
    loss = torch.stack(list(task.loss(task.predict(output), batch).values())).sum()
    loss.backward()
    assert loss == 0
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_predicted_depth_stays_between_its_bounds_and_starts_in_their_middle() -> None:
    task = Depth(min_depth=0.5, max_depth=50.0)
    depth = task.predict(torch.tensor([-1e4, 0.0, 1e4]).reshape(1, 1, 1, 3))["depth"].flatten()
    torch.testing.assert_close(depth, torch.tensor([0.5, 5.0, 50.0]))
    metres = Depth(output="metres").predict(row(0.0, 7.0, 1e9))["depth"].flatten()
    torch.testing.assert_close(metres, torch.tensor([0.1, 7.0, 80.0]))


def test_depth_labels_beyond_the_bounds_do_not_count() -> None:
    task = Depth(loss="l1", min_depth=1.0, max_depth=10.0)
    label = row(0.0, 0.5, 4.0, 10.5, math.inf, math.nan)
    loss = task.loss({"depth": torch.full_like(label, 3.0)}, {"depth": label})
    assert {n: float(v) for n, v in loss.items()} == {"l1": 1.0}


def test_a_loss_of_ones_own_is_named_by_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def constant(prediction, label, valid):\n    return prediction.sum() * 0 + 3.0\n"
    (tmp_path / "own_losses.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for task in (Depth(loss="own_losses:constant"), Normals(loss="own_losses:constant")):
        name = task.quantities[0]
        loss = task.loss(labels_of(name), labels_of(name))
        assert [float(v) for v in loss.values()] == [3.0]


def test_an_unknown_loss_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="log_mse"):
        Depth(loss="logmse")


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(InputError, match="max_depth"):
        Depth(min_depth=5.0, max_depth=2.0)


# ---- metrics ----------------------------------------------------------------------------------


def test_depth_metrics_have_the_values_worked_out_by_hand() -> None:
    metric = DepthMetrics()
    metric.update({"depth": row(2.0, 3.0, 9.0, 5.0)}, {"depth": row(1.0, 4.0, 8.0, 0.0)})
    assert values_of(metric) == pytest.approx(
        {
            "abs_rel": (1 + 1 / 4 + 1 / 8) / 3,
            "sq_rel": (1 + 1 / 4 + 1 / 8) / 3,
            "rmse": 1.0,
            "rmse_log": math.sqrt(
                (math.log(2) ** 2 + math.log(4 / 3) ** 2 + math.log(9 / 8) ** 2) / 3
            ),
            "delta_1": 1 / 3,  # ratios 2, 4/3 and 9/8 against 1.25, 1.5625 and 1.953
            "delta_2": 2 / 3,
            "delta_3": 2 / 3,
            "abs_err": 1.0,
        }
    )


def test_a_ratio_of_exactly_the_threshold_is_not_below_it() -> None:
    metric = DepthMetrics()
    metric.update({"depth": row(1.25, 1.0)}, {"depth": row(1.0, 1.25)})
    assert values_of(metric)["delta_1"] == 0.0


def test_median_scaling_makes_depth_of_unknown_scale_comparable() -> None:
    label = torch.cat([row(1.0, 2.0, 3.0), row(2.0, 4.0, 0.0)])
    prediction = label * torch.tensor([0.2, 5.0]).reshape(2, 1, 1, 1)
    scaled, plain = Depth(median_scaling=True).metric(), Depth().metric()
    for metric in (scaled, plain):
        metric.update({"depth": prediction}, {"depth": label})
    assert float(scaled.compute()["abs_rel"]) == pytest.approx(0.0, abs=1e-6)
    assert float(plain.compute()["abs_rel"]) > 1


def test_normals_metrics_have_the_values_worked_out_by_hand() -> None:
    metric = NormalsMetrics()
    angles = (1.0, 10.0, 20.0, 25.0, 130.0)
    invalid = (0.0, 0.0, 0.0)
    metric.update(
        {"normals": 3 * at_angle(*angles, 60.0)}, {"normals": vectors(*[FACING] * 5, invalid)}
    )
    values = values_of(metric)
    assert values.pop("median_deg") == pytest.approx(20.0, abs=0.01)
    assert values == pytest.approx(
        {"mean_deg": 186 / 5, "within_11_25": 0.4, "within_22_5": 0.6, "within_30": 0.8}
    )


def test_small_angles_are_measured_precisely() -> None:
    metric = NormalsMetrics()
    metric.update({"normals": at_angle(0.001)}, {"normals": vectors(FACING)})
    assert values_of(metric)["mean_deg"] == pytest.approx(0.001, rel=1e-3)


def test_a_normal_whose_components_sum_to_zero_counts() -> None:
    half = math.sqrt(0.5)
    metric = NormalsMetrics()
    metric.update({"normals": vectors((half, 0, -half))}, {"normals": vectors((half, -half, 0))})
    assert values_of(metric)["mean_deg"] == pytest.approx(60.0)


def test_a_predicted_normal_without_direction_is_no_success() -> None:
    metric = NormalsMetrics()
    metric.update({"normals": vectors((0, 0, 0))}, {"normals": vectors(FACING)})
    assert values_of(metric)["mean_deg"] == pytest.approx(90.0)


@pytest.mark.parametrize("name", TASKS)
def test_a_metric_is_perfect_on_the_truth(name: str) -> None:
    metric = TASKS[name]().metric()
    truth = labels_of(name)
    metric.update(truth, truth)
    for key, value in metric.compute().items():
        perfect = 1.0 if key.startswith(("delta", "within")) else 0.0
        assert float(value) == pytest.approx(perfect, abs=0.006)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_metric_does_not_depend_on_how_the_set_was_cut(name: str, batch_size: int) -> None:
    label, prediction = labels_of(name)[name], labels_of(name, seed=1)[name]
    prediction = torch.where(prediction == 0, 0.3, prediction)
    whole, cut = TASKS[name]().metric(), TASKS[name]().metric()
    whole.update({name: prediction}, {name: label})
    for start in range(0, len(label), batch_size):
        part = slice(start, start + batch_size)
        cut.update({name: prediction[part]}, {name: label[part]})
    assert values_of(cut) == values_of(whole)


@pytest.mark.parametrize("name", TASKS)
def test_a_metric_without_one_valid_pixel_is_nan(name: str) -> None:
    metric = TASKS[name]().metric()
    truth = labels_of(name)
    metric.update(truth, {name: torch.zeros_like(truth[name])})
    assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize("name", TASKS)
def test_a_reset_metric_has_forgotten_everything(name: str) -> None:
    metric = TASKS[name]().metric()
    truth, other = labels_of(name), labels_of(name, seed=1)
    metric.update(other, truth)
    metric.reset()
    metric.update(truth, truth)
    assert float(metric.compute()["abs_rel" if name == "depth" else "mean_deg"]) < 1e-4


def test_inverse_depth_stays_in_bounds_and_makes_planes_of_linear_outputs():
    depth = Depth(output="inverse", min_depth=0.1, max_depth=80.0)
    values = depth.predict(row(-50.0, 0.0, 3.0, 50.0))["depth"].flatten()
    assert values.min() >= 0.1
    assert values.max() <= 80.0
    output = torch.linspace(1.0, 4.0, 7).view(1, 1, 1, -1)  # nearer than 1 m: linear
    steps = (1 / depth.predict(output)["depth"]).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.5), atol=1e-4, rtol=0)


# ---- the room ---------------------------------------------------------------------------------


def test_no_two_modules_of_the_tasks_need_each_other() -> None:
    folder = Path(losses.__file__).parent
    needs = {
        file.stem: {
            node.module.rpartition(".")[2]
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("taskray.tasks.")
        }
        for file in folder.glob("*.py")
    }
    assert "anchor_maps" in needs["detection"]
    while free := [module for module, others in needs.items() if not others & needs.keys()]:
        for module in free:
            del needs[module]
    assert needs == {}  # what is left is a circle, or needs one
