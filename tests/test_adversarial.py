"""Adversarial domain adaptation: maps, the two losses and their gradients, a toy, the loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from collectives import Watch, run
from torch import Tensor, nn

from taskray.data.streams.batch import Batch
from taskray.errors import InputError, TaskrayError
from taskray.job import plugins
from taskray.job.config import Job, OptimizerConfig, parse_job
from taskray.loop.consistency import WeightedRelation, consistency_losses
from taskray.loop.learned import Learned
from taskray.loop.optimization import NotFinite, Optimization
from taskray.loop.wiring import wire
from taskray.models.discriminator import PatchDiscriminator
from taskray.relations.adversarial import Adversarial, against, self_information
from taskray.relations.relation import at_source
from taskray.runtime.checkpoints import CheckpointStore
from taskray.tasks.depth import Depth
from taskray.tasks.segmentation import Segmentation
from taskray.weighting.weighting import Sum


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread for such small frames only waits, on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def aligned(quantity: str) -> dict[str, Any]:
    """As a job describes a small one."""
    return {"name": "adversarial", "quantity": quantity, "width": 4, "depth": 2}


def adversarial(quantity: str = "depth", **arguments: Any) -> Adversarial:
    """A small one, with its discriminator."""
    torch.manual_seed(0)
    relation = Adversarial(quantity, width=4, depth=2, **arguments)
    task = Depth() if quantity == "depth" else Segmentation(num_classes=3)
    relation.build_for({"scene": task})
    return relation


def in_the_loop(relation: Adversarial, weight: float = 1.0) -> list[WeightedRelation]:
    config = job_of().consistency["align_depth"].model_copy(update={"weight": weight})
    return [WeightedRelation("align_depth", relation, config)]


def both_domains(seed: int = 1, requires_grad: bool = True) -> dict[str, Tensor]:
    """A prediction on either domain, both part of the network's graph."""
    generator = torch.Generator().manual_seed(seed)
    target, source = (
        (5 + torch.rand(2, 1, 8, 12, generator=generator)).requires_grad_(requires_grad)
        for _ in "ab"
    )
    return {"depth": target, at_source("depth"): source}


# ---- maps and losses ----------------------------------------------------------------------------


def test_self_information_is_minus_p_log_p_of_each_class() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0]).reshape(1, 3, 1, 1)
    weights = [math.exp(value) for value in (2.0, 0.0, -1.0)]
    p = [weight / sum(weights) for weight in weights]
    expected = torch.tensor([-q * math.log(q) for q in p]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(self_information(logits), expected)
    certain = torch.tensor([1e4, -1e4], requires_grad=True).reshape(1, 2, 1, 1)
    assert self_information(certain).abs().max() == 0  # finite where p is 0
    (gradient,) = torch.autograd.grad(self_information(certain).sum(), certain)
    assert torch.isfinite(gradient).all()


def test_depth_is_aligned_relative_to_the_range_of_the_source() -> None:
    relation = adversarial(near=2.0, far=10.0)
    depth = torch.tensor([2.0, 4.0, 10.0, 14.0]).reshape(1, 1, 2, 2)
    expected = torch.tensor([0.0, 0.25, 1.0, 1.5]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(relation.maps(depth), expected)
    with pytest.raises(InputError, match=r"far: got 2, expected more than near, 3"):
        Adversarial("depth", near=3, far=2)


def test_the_losses_are_those_of_the_paper() -> None:
    relation, predictions = adversarial(), both_domains()
    score = {
        name: torch.sigmoid(relation.discriminator(prediction / 80))
        for name, prediction in predictions.items()
    }
    source, target = score[at_source("depth")], score["depth"]
    losses = relation.opponent_losses(predictions, {})
    torch.testing.assert_close(
        losses["source"] + losses["target"], -source.log().mean() - (1 - target).log().mean()
    )
    torch.testing.assert_close(relation(predictions, {})["adversarial"], -target.log().mean())


def test_a_discriminator_that_guesses_costs_the_logarithm_of_two_on_each_side() -> None:
    assert float(against(torch.zeros(3, 1, 2, 2), 1.0)) == pytest.approx(math.log(2))
    assert float(against(torch.zeros(3, 1, 2, 2), 0.0)) == pytest.approx(math.log(2))


def test_a_patch_discriminator_halves_the_map_at_each_convolution() -> None:
    discriminator = PatchDiscriminator(3, 64, 5)
    assert discriminator(torch.zeros(2, 3, 64, 96)).shape == (2, 1, 2, 3)
    published = [3 * 64, 64 * 128, 128 * 256, 256 * 512, 512]
    biases = 64 + 128 + 256 + 512 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == 16 * sum(published) + biases


def test_an_intermediate_output_is_aligned_by_its_own_name() -> None:
    relation, predictions = adversarial(scale=1), both_domains()
    with pytest.raises(TaskrayError, match=r"no output 'depth@1', which is to be aligned"):
        relation(predictions, {})
    halves = {"depth@1": predictions["depth"], at_source("depth@1"): predictions["depth"]}
    expected = adversarial()(predictions, {})
    assert relation({**predictions, **halves}, {}) == expected
    assert len(relation.opponent_losses({**predictions, **halves}, {})) == 2


def test_maps_that_are_too_small_for_the_discriminator_are_refused() -> None:
    small = {"depth": torch.ones(1, 1, 8, 12)}
    relation = Adversarial("depth", width=4, depth=4)
    relation.build_for({"depth": Depth()})
    with pytest.raises(TaskrayError, match=r"4 convolutions .* maps of 8x12, expected at most 3"):
        relation(small, {})
    relation = Adversarial("depth", width=4, depth=3)
    relation.build_for({"depth": Depth()})
    assert relation(small, {})["adversarial"].isfinite()


# ---- neither side moves the other ----------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["depth", "segmentation"])
def test_the_networks_loss_reaches_its_prediction_on_the_target_alone(quantity: str) -> None:
    relation = adversarial(quantity)
    channels = 1 if quantity == "depth" else 3
    target, source = (torch.rand(2, channels, 8, 12, requires_grad=True) for _ in "ab")
    predictions = {quantity: target, at_source(quantity): source}
    relation(predictions, {})["adversarial"].backward()
    assert target.grad is not None
    assert target.grad.abs().sum() > 0
    assert source.grad is None
    assert all(p.grad is None for p in relation.parameters())


def test_the_discriminators_loss_reaches_the_discriminator_alone() -> None:
    relation, predictions = adversarial(), both_domains()
    losses = consistency_losses(in_the_loop(relation), predictions, Batch({}, 0), 0)
    losses.opposed["align_depth"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in relation.parameters())
    assert all(prediction.grad is None for prediction in predictions.values())
    assert {str(key) for key in losses.values} == {
        "loss/consistency/align_depth", "loss/consistency/align_depth/source",
        "loss/consistency/align_depth/target",
    }  # fmt: skip


def test_the_weight_is_the_networks_and_not_the_discriminators() -> None:
    relation, predictions = adversarial(), both_domains()
    small, large = (
        consistency_losses(in_the_loop(relation, weight), predictions, Batch({}, 0), 0)
        for weight in (0.005, 1.0)
    )
    torch.testing.assert_close(small.weighted["align_depth"], 0.005 * large.weighted["align_depth"])
    torch.testing.assert_close(small.opposed["align_depth"], large.opposed["align_depth"])


def test_without_a_prediction_on_the_source_there_is_no_loss() -> None:
    predictions = both_domains()
    del predictions[at_source("depth")]
    losses = consistency_losses(in_the_loop(adversarial()), predictions, Batch({}, 0), 0)
    assert not losses.weighted
    assert not losses.opposed


# ---- the optimizer of the discriminator ----------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(3, 1, 1)


def descended(
    relation: Adversarial, module: nn.Module, steps: int, clip: float | None = 1.0
) -> Optimization:
    """The optimization after some steps of both sides, on predictions of the module."""
    learned = Learned(module, {"align_depth": relation}, Sum())
    optimization = Optimization(learned, OptimizerConfig(lr=0.01, clip_norm=clip), 10)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        images = torch.rand(4, 3, 8, 12, generator=generator)
        target, source = module(images).chunk(2)
        known = {"depth": target, at_source("depth"): source}
        losses = consistency_losses(in_the_loop(relation), known, Batch({}, 0), step)
        optimization.descend(losses.weighted, step, True, losses.opposed)
    return optimization


def test_each_side_makes_the_steps_that_it_would_make_by_itself() -> None:
    config = OptimizerConfig(lr=0.02, betas=(0.5, 0.9), schedule="constant", clip_norm=0.1)
    relation, module = adversarial(optimizer=config), network()
    same, other = adversarial(), network()
    descended(relation, module, 3)
    players = {
        same: torch.optim.Adam(same.parameters(), 0.02, betas=(0.5, 0.9)),
        other: torch.optim.Adam(other.parameters(), 0.01),
    }
    norms = {same: 0.1, other: 1.0}
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        images = torch.rand(4, 3, 8, 12, generator=generator)
        target, source = other(images).chunk(2)
        generated = against(same.discriminator(target / 80), 1.0)
        gradients = torch.autograd.grad(generated, list(other.parameters()))
        opposed = against(same.discriminator(source.detach() / 80), 1.0)
        opposed = opposed + against(same.discriminator(target.detach() / 80), 0.0)
        own = torch.autograd.grad(opposed, list(same.parameters()))
        for player, found in ((other, gradients), (same, own)):
            for parameter, gradient in zip(player.parameters(), found, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(player.parameters(), norms[player])
        factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / 10))
        players[other].param_groups[0]["lr"] = 0.01 * factor
        for optimizer in players.values():
            optimizer.step()
    for ours, theirs in ((relation, same), (module, other)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_game_goes_on_from_its_saved_state() -> None:
    straight, module = adversarial(), network()
    learned = Learned(module, {"align_depth": straight}, Sum())
    optimization = descended(straight, module, 2)
    saved = {name: value.clone() for name, value in learned.weights().items()}
    assert "relation:align_depth.discriminator.0.weight" in saved
    again = Learned(network(), {"align_depth": adversarial()}, Sum())
    again.load_weights(saved)
    resumed = Optimization(again, OptimizerConfig(lr=0.01), 10)
    resumed.load_state_dict(copy.deepcopy(optimization.state_dict()))
    for one in (optimization, resumed):
        loss = sum(p.square().sum() for p in one.learned.network.parameters())
        opponent = one.learned.opponents["align_depth"]
        opposed = sum(p.square().sum() for p in opponent.parameters())
        one.descend({"a": loss}, 2, True, {"align_depth": opposed})
    for name, value in learned.weights().items():
        assert torch.equal(again.weights()[name], value), name
        assert not torch.equal(saved[name], value), name


def test_a_discriminator_that_is_not_finite_stops_the_step_of_both() -> None:
    relation, module = adversarial(), network()
    optimization = descended(relation, module, 1)
    before = {name: value.clone() for name, value in optimization.learned.weights().items()}
    opposed = next(relation.parameters()).sum() * float("nan")
    with pytest.raises(NotFinite):
        optimization.descend({"a": module.weight.sum()}, 1, True, {"align_depth": opposed})
    for name, value in optimization.learned.weights().items():
        assert torch.equal(before[name], value)


def test_on_a_shifted_target_the_network_learns_to_be_taken_for_the_source() -> None:
    """Depth is 40 m plus noise on the source, and 60 m on the target: a network that can only add
    a number to the target must add -20."""
    torch.manual_seed(0)
    relation = Adversarial(
        "depth", width=8, depth=1,
        optimizer=OptimizerConfig(lr=0.02, betas=(0.5, 0.9), schedule="constant"),
    )  # fmt: skip
    relation.build_for({"depth": Depth()})
    relation.discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 1)
    )  # a patch is a pixel
    shift = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(shift.weight)
    learned = Learned(shift, {"align_depth": relation}, Sum())
    config = OptimizerConfig(lr=0.01, schedule="constant", betas=(0.5, 0.9))
    optimization, weighted = Optimization(learned, config, 400), in_the_loop(relation)
    right, shifts = [], []
    for step in range(400):
        source, target = (metres + 8 * torch.randn(64, 1, 2, 2) for metres in (40.0, 60.0))
        known = {"depth": target + 80 * shift.weight, at_source("depth"): source}
        with torch.no_grad():
            taken = {q: relation.discriminator(relation.maps(p)) > 0 for q, p in known.items()}
        right.append(float(torch.cat([taken[at_source("depth")], ~taken["depth"]]).float().mean()))
        shifts.append(80 * float(shift.weight.detach()))
        losses = consistency_losses(weighted, known, Batch({}, 0), 0)
        play = float(step >= 100)  # until then the discriminator learns alone
        own = {name: play * loss for name, loss in losses.weighted.items()}
        optimization.descend(own, step, True, losses.opposed)
    assert mean(right[80:100]) > 0.8
    assert mean(right[-100:]) < 0.6
    assert mean(shifts[-100:]) == pytest.approx(-20, abs=4)


# ---- jobs ---------------------------------------------------------------------------------------


def values_of_job() -> dict[str, Any]:
    reader = {"name": "world", "height": 32, "width": 48, "num_samples": 8}
    heads = {"depth": "depth", "segmentation": "segmentation", "normals": "normals"}
    return {
        "name": "job",
        "steps": 4,
        "data": {
            "source": {"reader": {**reader, "domain": "sim"}},
            "target": {"reader": {**reader, "domain": "real"}},
        },
        "tasks": {
            "scene": {
                "task": {"name": "multi", "heads": heads},
                "dedicated": "source",
                "batch_size": 2,
                "model": {"name": "unet", "base": 8, "depth": 2},
            }
        },
        "mediator": {"data": "target", "batch_size": 2, "with_labels": True},
        "consistency": {
            "align_depth": {"relation": aligned("depth"), "weight": 0.005},
            "align_classes": {"relation": aligned("segmentation"), "weight": 0.005},
            "surfaces": {"relation": "depth_normals"},
        },
    }  # fmt: skip


def job_of(**changes: Any) -> Job:
    return parse_job({**values_of_job(), **changes}, "job")


def test_each_output_has_a_discriminator_and_other_relations_go_on_beside_them(
    tmp_path: Path,
) -> None:
    run(job_of(), tmp_path / "a", watch := Watch(), inline=True)
    names = {name for _, report in watch.reports for name in report.values}
    for relation in ("align_depth", "align_classes"):
        assert {f"loss/consistency/{relation}/{side}" for side in ("source", "target")} <= names
    assert {"loss/consistency/surfaces", "loss/supervised", "loss/depth/mse"} <= names
    (_, last) = watch.reports[-1]
    assert (last.totals.supervised_steps, last.totals.consistency_steps) == (2, 2)
    assert last.totals.replaced_by_supervised == 0
    run(job_of(), tmp_path / "b", inline=True)  # the same again
    run(job_of(steps=2), tmp_path / "c", inline=True)  # and in two parts
    run(job_of(), tmp_path / "c", inline=True)
    a, b, c = (CheckpointStore(tmp_path / run / "checkpoints").latest("scene") for run in "abc")
    assert a is not None
    assert b is not None
    assert c is not None
    learned = [name for name in a.weights if name.startswith("relation:align_classes.")]
    assert len(learned) == 4  # two convolutions
    for name, value in a.weights.items():
        assert torch.equal(value, b.weights[name]), name
    assert (
        set(a.state["opponents"]) == set(c.state["opponents"]) == {"align_depth", "align_classes"}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mediator": None}, r"consistency\.align_depth: got no mediator, expected one"),
        (
            {"mediator": {"data": "target"}},
            r"mediator\.with_labels: got false, expected true for consistency\.align_depth",
        ),
        (
            {"mediator": {"data": "target", "with_labels": True, "consistency_steps": 0}},
            r"mediator\.consistency_steps: got 0, expected 1 or more for consistency\.align_depth",
        ),
    ],
)
def test_a_discriminator_without_a_target_is_refused_in_one_line(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        wire(job_of(**change))


def test_a_discriminator_without_a_source_is_refused_in_one_line() -> None:
    values = values_of_job()
    values["tasks"]["scene"]["dedicated"] = {"segmentation": "source"}
    message = r"tasks\.scene\.dedicated: got no labels of 'depth', expected some for consistency\."
    with pytest.raises(InputError, match=message):
        wire(parse_job(values, "job"))
    values["consistency"]["align_depth"]["weight"] = 0  # switched off
    wire(parse_job(values, "job"))
    values["tasks"]["scene"]["relations"] = {"one": {"relation": aligned("depth")}}
    with pytest.raises(InputError, match=r"scene\.relations\.one: compares two domains, expected"):
        wire(parse_job(values, "job"))


def test_a_quantity_that_no_task_predicts_cannot_be_aligned() -> None:
    values = values_of_job()
    values["consistency"]["align_depth"]["relation"]["quantity"] = "edges"
    with pytest.raises(InputError, match=r"align_depth: needs 'edges', which no task predicts"):
        wire(parse_job(values, "job"))
    relation: Any = plugins.build(
        "relation", "adversarial", {"quantity": "depth", "optimizer": {"lr": 0.1}}, "relation"
    )
    assert relation.optimizer.lr == 0.1
