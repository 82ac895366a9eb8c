"""How named losses become one step, and what else than the network a task learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self.losses: list[dict[str, float]] = []
        self.added: list[dict[str, float]] = []
        self.parameters_given: list[Sequence[Tensor]] = []

    def backward(
        self,
        losses: Mapping[str, Tensor],
        added: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        assert all(p.grad is None for p in parameters)
        assert all(v.requires_grad and v.dim() == 0 for v in (*losses.values(), *added.values()))
        self.losses.append({name: float(loss.detach()) for name, loss in losses.items()})
        self.added.append({name: float(loss.detach()) for name, loss in added.items()})
        self.parameters_given.append(parameters)
        return super().backward(losses, added, parameters)


class Uncertainty(Weighting):
    """``sum exp(-s) L + s`` with one learned s for all losses (Kendall et al., CVPR 2018)."""

    def __init__(self, start: float = 0.0, heads: Sequence[str] = ("depth",)) -> None:
        super().__init__(heads)
        self.s = nn.Parameter(torch.tensor(start))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        self.steps += 1
        return torch.stack([(-self.s).exp() * loss + self.s for loss in losses.values()]).sum()


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


def test_losses_on_labels_and_losses_of_relations_reach_the_weighting_apart() -> None:
    weighting = Recording()
    loop = trainer(Scripted(fresh_normals()), weighting=weighting)
    supervised, consistency = loop.train(1), loop.train(1)
    assert [list(given) for given in weighting.losses] == [["log_mse"], []]
    assert [list(given) for given in weighting.added] == [[], ["agree"]]
    assert weighting.losses[0]["log_mse"] == pytest.approx(supervised.values["loss/log_mse"])
    # 2.0 is the relation's weight, of which a half is reached in step 1 of 4
    weighted = 2.0 * 0.5 * consistency.values["loss/consistency/agree"]
    assert weighting.added[1]["agree"] == pytest.approx(weighted)
    learnt = list(loop.learned.parameters())
    assert all(list(map(id, p)) == list(map(id, learnt)) for p in weighting.parameters_given)


def test_the_sum_is_the_gradient_of_the_sum_and_the_objective_is_detached() -> None:
    network, inputs = nn.Linear(3, 2), torch.rand(4, 3)

    def losses() -> dict[str, Tensor]:
        out = network(inputs)
        return {"a": out.square().mean(), "b": 3 * out.abs().mean()}

    (expected,) = torch.autograd.grad(sum(losses().values()), network.weight)
    total = Sum().backward(losses(), {}, list(network.parameters()))
    assert total == sum(loss.detach() for loss in losses().values())
    assert not total.requires_grad
    torch.testing.assert_close(network.weight.grad, expected)


def test_an_objective_that_is_not_finite_updates_nothing() -> None:
    learned = Learned(nn.Linear(3, 1), {}, Uncertainty(heads=["a"]))
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
    assert int(weighting.steps) == 6  # those on labels
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
    assert int(checkpoint.weights["weighting:steps"]) == 5
    assert float(checkpoint.weights["relation:offset.distance"]) != 2.0
    result = run(tiny_job("steps=16", *LEARNED), tmp_path, inline=True)
    assert {name: task["steps"] for name, task in result["tasks"].items()} == {
        "depth": 16, "normals": 16
    }  # fmt: skip
    after = CheckpointStore(tmp_path / "checkpoints").latest("depth")
    assert after is not None
    assert int(after.weights["weighting:steps"]) == 8
    job = tiny_job(*LEARNED)
    alone = build_model(job, "depth", build_task(job, "depth"))
    load_into(alone, after)  # as evaluation and forward servers do
    for name, value in alone.state_dict().items():
        assert torch.equal(value, after.weights[name])
