"""Consistency energy: closed forms, and a run that measures it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from collectives import tiny_job
from rich.console import Console
from scenes import world_pairs

from taskray.errors import InputError
from taskray.record.folder import read_panels
from taskray.relations.cross_task import CrossTask
from taskray.relations.depth_normals import DepthNormals
from taskray.relations.energy import (
    Standard,
    disagreement,
    energy,
    pearson,
    spearman,
    true_error,
)
from taskray.report.panels import INVALID, colour_energy, compose
from taskray.run.energy import Measured
from taskray.run.train import train
from taskray.schema import IGNORE
from taskray.tasks.depth import Depth
from taskray.tasks.segmentation import Segmentation


def field(*values: float) -> torch.Tensor:
    """``[1, 1, 1, n]``."""
    return torch.tensor(values, dtype=torch.float32)[None, None, None]


def test_disagreement_has_the_closed_form_of_each_quantity() -> None:
    e = math.e
    torch.testing.assert_close(disagreement("depth", field(1, e), field(1, 1)), field(0, 1))
    up, right = torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    up[0, 1], right[0, 0] = 2, 5
    assert disagreement("normals", up, right).item() == pytest.approx(math.pi / 2)
    assert disagreement("normals", up, 3 * up).item() == 0
    sure = torch.tensor([100.0, -100.0])[None, :, None, None]
    assert disagreement("segmentation", sure, -sure).item() == pytest.approx(1)
    assert disagreement("segmentation", sure, 0 * sure).item() == pytest.approx(0.5)
    assert disagreement("edges", field(0.25), field(1)).item() == 0.75


def test_the_error_is_the_disagreement_with_the_label_where_that_is_valid() -> None:
    error, valid = true_error("depth", field(math.e, 5), field(1, 0))
    assert error[..., 0].item() == pytest.approx(1)
    assert valid.flatten().tolist() == [True, False]
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])[None, :, None]
    error, valid = true_error("segmentation", logits, torch.tensor([1, IGNORE])[None, None, None])
    assert error[..., 0].item() == pytest.approx(0.5)  # 1 - the probability of the true class
    assert valid.flatten().tolist() == [True, False]
    _, valid = true_error("normals", torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))
    assert not valid.any()


def test_a_path_is_standardised_by_the_valid_pixels_of_its_reference() -> None:
    standard = Standard()
    for part in (field(1, 3, 99), field(5, 7, 99)):
        standard.add(part, torch.tensor([True, True, False])[None, None, None])
    assert standard.mean == 4
    assert standard.deviation == pytest.approx(math.sqrt(5))
    standardised = standard.standardised(field(1, 3, 5, 7))
    assert standardised.mean().item() == pytest.approx(0)
    assert standardised.std(correction=0).item() == pytest.approx(1)


def test_the_energy_is_the_mean_over_the_paths_that_are_valid_at_a_pixel() -> None:
    unit = Standard(count=2, total=0, squares=2)  # mean 0, deviation 1
    other = Standard(count=2, total=4, squares=10)  # mean 2, deviation 1
    where = torch.tensor([[True, True, False], [True, False, False]])[:, None, None, None]
    found = energy([(field(1, 1, 1), where[0], unit), (field(5, 5, 5), where[1], other)])
    torch.testing.assert_close(found, field(2, 1, math.nan), equal_nan=True)


def test_a_constant_reference_gives_finite_energies() -> None:
    standard = Standard()
    standard.add(field(2, 2), torch.ones(1, 1, 1, 2, dtype=torch.bool))
    assert standard.standardised(field(2, 3)).isfinite().all()


def test_correlations_are_1_where_the_energy_is_the_error() -> None:
    values = torch.rand(2, 1, 8, 8)
    measured = Measured()
    measured.add(3 * values - 1, values, torch.ones_like(values, dtype=torch.bool))
    found = measured.metrics()
    assert found["energy_pearson"] == pytest.approx(1)
    assert found["energy_spearman"] == pytest.approx(1)
    assert pearson(values.flatten(), -values.flatten()) == pytest.approx(-1)
    assert spearman(values.flatten(), values.flatten().exp()) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 3, 2])) == pytest.approx(0)


def test_pixels_without_a_path_or_a_label_do_not_count() -> None:
    measured = Measured()
    label = torch.tensor([True, True, True, False])[None, None, None]
    measured.add(field(1, 2, math.nan, 9), field(1, 2, 7, 0), label)
    assert measured.metrics()["energy_mean"] == 1.5
    constant = Measured()
    constant.add(field(1, 1), field(1, 2), torch.ones(1, 1, 1, 2, dtype=torch.bool))
    assert constant.metrics() == {"energy_mean": 1}  # no correlation


def test_normals_of_true_depth_agree_with_true_normals() -> None:
    world = world_pairs(count=2)
    path = DepthNormals(bend=0.03).paths(world, world)["normals"]
    assert path.valid.float().mean() > 0.5
    angle = disagreement("normals", world["normals"], path.prediction)[path.valid]
    assert math.degrees(angle.median().item()) < 1


def test_a_learned_relation_gives_a_path_in_the_units_of_its_target() -> None:
    relation = CrossTask("segmentation", "depth", widths=[4, 4])
    relation.build_for({"s": Segmentation(num_classes=3), "d": Depth(max_depth=10)})
    found = relation.paths({"segmentation": torch.randn(2, 3, 8, 8)}, {})
    assert found.keys() == {"depth"}
    assert found["depth"].prediction.shape == found["depth"].valid.shape == (2, 1, 8, 8)
    assert found["depth"].prediction.detach().min() >= 0.1


def test_a_run_measures_the_energy_and_keeps_its_map(tmp_path: Path) -> None:
    job = tiny_job(
        "steps=4",
        "evaluation={data: {far: test, near: near}, energy: near}",
        "data.near={reader: {name: world, height: 32, width: 48, num_samples: 8, split: test}}",
    )
    result = train(job, tmp_path, inline=True, console=Console(quiet=True))
    found = result["tasks"]["normals"]["evaluations"]
    assert found["near"]["energy_mean"] == pytest.approx(0, abs=0.5)  # its own reference
    for title in ("near", "far"):
        assert -1 <= found[title]["energy_pearson"] <= 1
        assert -1 <= found[title]["energy_spearman"] <= 1
    assert "energy_mean" not in result["tasks"]["depth"]["metrics"]  # no relation gives depth
    arrays = read_panels(tmp_path)
    maps = arrays["normals/far/normals/energy"]
    assert maps.shape == (4, 1, 32, 48)
    captions = [panel.caption for panel in compose(arrays, "normals/far", "normals", ("a", "b"))[0]]
    assert captions[-2:] == ["error b", "consistency energy"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "consistency energy" in page


def test_the_picture_of_the_energy_is_dark_where_predictions_agree() -> None:
    picture = colour_energy(np.array([[[[-1.0, 3.0, np.nan]]]]))[0, 0]
    assert picture[0].sum() < 10 < 400 < picture[1].sum()
    assert tuple(picture[2]) == INVALID


def test_the_reference_of_the_energy_is_an_evaluation() -> None:
    with pytest.raises(InputError, match=r"evaluation\.energy: no evaluation 'tset'; did you mean"):
        tiny_job("evaluation={data: {test: test}, energy: tset}")
