"""How named losses become one step, and what else than the network a task learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from collectives import run, tiny_job
from test_loop import Scripted, fresh_normals, no_normals, trainer
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.job.config import OptimizerConfig
from taskray.loop.assembly import build_learned, build_model, build_relations, build_task
from taskray.loop.learned import Learned
from taskray.loop.optimization import NotFinite, Optimization
from taskray.relations.relation import Relation
from taskray.runtime.checkpoints import CheckpointStore, load_into
from taskray.weighting.weighting import Sum, Weighting


class Recording(Sum):
    """The sum, which remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[dict[str, float]] = []
        self.networks: list[nn.Module] = []

    def backward(self, losses: Mapping[str, Tensor], network: nn.Module) -> Tensor:
        assert all(p.grad is None for p in network.parameters())
        assert all(loss.requires_grad and loss.dim() == 0 for loss in losses.values())
        self.given.append({name: float(loss.detach()) for name, loss in losses.items()})
        self.networks.append(network)
        return super().backward(losses, network)


class Uncertainty(Weighting):
    """``sum exp(-s) L + s`` with one learned s for all losses (Kendall et al., CVPR 2018)."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(start))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def backward(self, losses: Mapping[str, Tensor], network: nn.Module) -> Tensor:
        self.steps += 1
        total = torch.stack([(-self.s).exp() * loss + self.s for loss in losses.values()]).sum()
        total.backward()
        return total.detach()


class Offset(nn.Module, Relation):
    """Depth is where the normals look at the camera, at a distance that is learned."""

    quantities = ("depth", "normals")

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.distance = nn.Parameter(torch.tensor(start))

    def forward(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        off = predictions["depth"] + self.distance * predictions["normals"][:, 2:]
        return {"off": off.abs().mean()}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What a weighting is given


def test_the_losses_reach_the_weighting_by_name() -> None:
    weighting = Recording()
    loop = trainer(Scripted(fresh_normals()), weighting=weighting)
    supervised, consistency = loop.train(1), loop.train(1)
    assert [list(given) for given in weighting.given] == [["log_mse"], ["agree"]]
    assert weighting.given[0]["log_mse"] == pytest.approx(supervised.values["loss/log_mse"])
    # 2.0 is the relation's weight, of which a half is reached in step 1 of 4
    weighted = 2.0 * 0.5 * consistency.values["loss/consistency/agree"]
    assert weighting.given[1]["agree"] == pytest.approx(weighted)
    assert all(network is loop.network.module for network in weighting.networks)


def test_the_sum_is_the_gradient_of_the_sum_and_the_objective_is_detached() -> None:
    network, inputs = nn.Linear(3, 2), torch.rand(4, 3)

    def losses() -> dict[str, Tensor]:
        out = network(inputs)
        return {"a": out.square().mean(), "b": 3 * out.abs().mean()}

    (expected,) = torch.autograd.grad(sum(losses().values()), network.weight)
    total = Sum().backward(losses(), network)
    assert total == sum(loss.detach() for loss in losses().values())
    assert not total.requires_grad
    torch.testing.assert_close(network.weight.grad, expected)


def test_an_objective_that_is_not_finite_updates_nothing() -> None:
    learned = Learned(nn.Linear(3, 1), {}, Uncertainty())
    optimization = Optimization(learned, OptimizerConfig(), 10)
    before = {name: value.detach().clone() for name, value in learned.named_parameters()}
    loss = learned.network(torch.rand(2, 3)).mean() * float("inf")
    with pytest.raises(NotFinite, match="the loss is not finite"):
        optimization.descend({"a": loss}, 0, checked=True)
    assert all(torch.equal(before[name], value) for name, value in learned.named_parameters())


# What else is learned


def test_a_weighting_with_parameters_is_trained() -> None:
    weighting = Uncertainty(start=1.0)
    trainer(Scripted(fresh_normals()), weighting=weighting, optimizer={"lr": 0.1}).train(12)
    assert int(weighting.steps) == 12
    assert abs(float(weighting.s.detach()) - 1.0) > 0.1


def test_a_relation_that_is_a_module_is_trained_in_consistency_steps_alone() -> None:
    alone, together = Offset(), Offset()
    trainer(Scripted(no_normals()), relation=alone, optimizer={"lr": 0.1}).train(12)
    trainer(Scripted(fresh_normals()), relation=together, optimizer={"lr": 0.1}).train(12)
    assert float(alone.distance.detach()) == 1.0
    assert abs(float(together.distance.detach()) - 1.0) > 0.1


def test_a_resumed_task_goes_on_with_its_learned_relation_and_its_weighting() -> None:
    def fresh():
        return trainer(Scripted(fresh_normals()), relation=Offset(), weighting=Uncertainty())

    straight, first, second = fresh(), fresh(), fresh()
    straight.train(12)
    first.train(5)
    second.learned.load_weights(first.learned.weights())
    second.load_state_dict(first.state_dict())
    second.train(12)
    weights = straight.learned.weights()
    assert {"relation:agree.distance", "weighting:s", "weighting:steps"} < set(weights)
    for name, value in second.learned.weights().items():
        assert torch.equal(value, weights[name]), name


LEARNED = (
    "consistency={offset: {relation: {name: 'test_weighting:Offset', start: 2.0}}}",
    "tasks.depth.weighting={name: 'test_weighting:Uncertainty', start: 0.5}",
)


def test_a_job_names_a_learned_relation_and_a_weighting_by_import_path() -> None:
    job = tiny_job(*LEARNED)
    task = build_task(job, "depth")
    learned = build_learned(job, "depth", task, build_relations(job, "depth", task))
    assert float(learned.weights()["relation:offset.distance"]) == 2.0
    assert float(learned.weights()["weighting:s"]) == 0.5
    assert isinstance(build_learned(job, "normals", build_task(job, "normals"), []).weighting, Sum)


def test_a_weighting_that_is_none_is_refused() -> None:
    job = tiny_job("tasks.depth.weighting=test_weighting:Offset")
    with pytest.raises(InputError, match=r"tasks\.depth\.weighting"):
        build_learned(job, "depth", build_task(job, "depth"), [])


def test_a_run_writes_and_resumes_all_that_its_tasks_learn(tmp_path: Path) -> None:
    run(tiny_job("steps=10", *LEARNED), tmp_path, inline=True)
    checkpoint = CheckpointStore(tmp_path / "checkpoints").latest("depth")
    assert checkpoint is not None
    assert int(checkpoint.weights["weighting:steps"]) == 10
    assert float(checkpoint.weights["relation:offset.distance"]) != 2.0
    result = run(tiny_job("steps=16", *LEARNED), tmp_path, inline=True)
    assert {name: task["steps"] for name, task in result["tasks"].items()} == {
        "depth": 16, "normals": 16
    }  # fmt: skip
    after = CheckpointStore(tmp_path / "checkpoints").latest("depth")
    assert after is not None
    assert int(after.weights["weighting:steps"]) == 16
    job = tiny_job(*LEARNED)
    alone = build_model(job, "depth", build_task(job, "depth"))
    load_into(alone, after)  # as evaluation and forward servers do
    for name, value in alone.state_dict().items():
        assert torch.equal(value, after.weights[name])
