"""PointPillars: the encoder against the definition, sweeps of any kind, grids of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskray.errors import InputError
from taskray.geometry.grid import Grid
from taskray.job import plugins
from taskray.models.pillar_encoder import PillarEncoder
from taskray.models.pillars import Pillars

SMALL = Grid(x=(-4.0, 4.0), y=(-3.0, 3.0), z=(-2.0, 2.0), cell=0.5)
NAN = float("nan")


def sweep(number: int, seed: int = 0, reach: float = 6.0) -> Tensor:
    """Random points ``[1, number, 4]``, some of them off the small grid."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(1, number, 4, generator=generator)
    points[..., :3] = (points[..., :3] - 0.5) * 2 * reach
    return points


def by_definition(encoder: PillarEncoder, points: Tensor) -> Tensor:
    """One sweep, pillar by pillar, in evaluation mode."""
    grid = encoder.grid
    rows, columns = grid.shape
    canvas = torch.zeros(encoder.linear.out_features, rows, columns)
    pillars: dict[tuple[int, int], list[Tensor]] = {}
    for point in points:
        column = int((point[0] - grid.x[0]) // grid.cell) if point[0] == point[0] else -1
        row = int((point[1] - grid.y[0]) // grid.cell) if point[1] == point[1] else -1
        if 0 <= row < rows and 0 <= column < columns and grid.z[0] <= point[2] < grid.z[1]:
            pillars.setdefault((row, column), []).append(point)
    for (row, column), own in pillars.items():
        stack = torch.stack(own)
        centre = torch.tensor(
            [grid.x[0] + (column + 0.5) * grid.cell, grid.y[0] + (row + 0.5) * grid.cell]
        )
        offsets = [stack[:, :3] - stack[:, :3].mean(dim=0), stack[:, :2] - centre]
        features = encoder.norm(encoder.linear(torch.cat([stack, *offsets], dim=1))).relu()
        canvas[:, row, column] = features.amax(dim=0)
    return canvas


def test_the_encoder_does_what_the_paper_defines() -> None:
    torch.manual_seed(0)
    encoder = PillarEncoder(4, 8, SMALL).eval()
    torch.nn.init.normal_(encoder.norm.bias)
    points = torch.cat([sweep(400, 0), sweep(400, 1)])
    expected = torch.stack([by_definition(encoder, own) for own in points])
    assert (expected != 0).any(dim=1).sum() > 60
    torch.testing.assert_close(encoder(points), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_nan_and_points_off_the_grid_change_nothing() -> None:
    torch.manual_seed(0)
    encoder = PillarEncoder(4, 8, SMALL).train()
    inside = sweep(100, reach=1.5)
    outside = torch.tensor(
        [[[NAN] * 4, [9.0, 0, 0, 1], [0, -3.1, 0, 1], [0, 0, 2.5, 1], [4.0, 0, 0, 1]]]
    )
    both = torch.cat([outside[:, :2], inside, outside[:, 2:]], dim=1)
    torch.testing.assert_close(encoder(both), encoder(inside))


def test_the_order_of_points_does_not_matter() -> None:
    encoder = PillarEncoder(4, 8, SMALL).eval()
    points = sweep(300)
    torch.testing.assert_close(encoder(points.flip(1)), encoder(points))


def test_a_point_on_the_lower_border_is_inside_and_on_the_upper_one_outside() -> None:
    cells, inside = SMALL.cells_of(torch.tensor([[-4.0, -3.0, -2.0], [4.0, 3.0, 0.0]]))
    assert inside.tolist() == [True, False]
    assert cells.tolist() == [0, 0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_sweeps_of_hardly_a_point_give_finite_maps_and_gradients(
    training: bool, number: int
) -> None:
    torch.manual_seed(0)
    model = Pillars(4, 6, SMALL, channels=4, layers=[1, 1]).train(training)
    points = torch.full((2, 5, 4), NAN)
    points[0, :number] = sweep(number, reach=1.0)[0]
    output = model(points)
    assert output.shape == (2, 6, 12, 16)
    assert output.isfinite().all()
    output.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("pillars_per_cell", [1, 2])
@pytest.mark.parametrize("frames", [1, 3])
def test_maps_of_any_size_have_a_value_for_each_cell(pillars_per_cell: int, frames: int) -> None:
    grid = Grid(x=(0.0, 6.5), y=(-4.5, 4.5), cell=0.5)
    model = Pillars(
        4, 5, grid, frames=frames, channels=4, layers=[1, 2, 1], pillars_per_cell=pillars_per_cell
    )
    points = sweep(200).expand(2, -1, -1) if frames == 1 else sweep(200).expand(2, 3, -1, -1)
    assert model(points).shape == (2, 5, 18, 13)


def test_the_defaults_are_the_published_network() -> None:
    model = Pillars(4, 18, Grid())
    assert Grid().shape == (468, 468)
    convolutions = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == 4 * [64] + 6 * [128] + 6 * [256]
    assert [c.stride[0] for c in convolutions if c.stride[0] > 1] == [2, 2]
    assert model.head.in_channels == 3 * 128
    assert model.encoder.linear.in_features == 9


def test_the_gradient_reaches_every_weight() -> None:
    torch.manual_seed(0)
    model = Pillars(4, 6, SMALL, frames=2, channels=4, layers=[1, 1])
    model(torch.stack([sweep(200, 0), sweep(200, 1)], dim=1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_an_error_of_rounding_never_puts_a_point_beyond_the_last_cell() -> None:
    grid = Grid(x=(0.0, 69.12), y=(-39.68, 39.68), cell=0.16)
    edge = torch.nextafter(torch.tensor(39.68), torch.tensor(0.0))
    far = torch.nextafter(torch.tensor(69.12), torch.tensor(0.0))
    cells, _ = grid.cells_of(torch.stack([far, edge, torch.tensor(0.0)])[None])
    assert cells.max() < grid.shape[0] * grid.shape[1]


def test_in_bfloat16_metres_are_not_rounded() -> None:
    torch.manual_seed(0)
    model = Pillars(4, 6, SMALL, channels=4, layers=[1, 1]).eval()
    points = sweep(200)
    expected = model(points)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(points)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"x": [0, 10], "y": [-5, 5], "cell": 0.3},
            "model.grid.x: got 10 m, expected a whole number",
        ),
        ({"x": [5, 5]}, r"model.grid.x: got \[5, 5\], expected \[lower"),
        ({"cell": 0}, "model.grid.cell: got 0, expected more than 0"),
        ({"cells": 4}, "model.grid.cells: unknown key"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        plugins.check_arguments(Pillars, {"grid": arguments}, "model", ())
