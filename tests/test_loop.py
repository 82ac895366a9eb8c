"""The training loop of one task, with streams and peers made by hand: no Ray, no data."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskray.data.storage.source import DatasetInfo
from taskray.data.streams.batch import Batch
from taskray.data.streams.rows import CorruptRows
from taskray.errors import TrainingError
from taskray.job.config import OptimizerConfig, StalenessConfig, parse_job
from taskray.loop.interfaces import PeerPredictions, Prediction
from taskray.loop.optimization import learning_rate
from taskray.loop.trainer import Trainer, WeightedRelation
from taskray.relations.relation import Relation
from taskray.tasks.depth import Depth

NORMALS = torch.tensor([0.0, 0.0, -1.0]).reshape(1, 3, 1, 1).expand(2, 3, 8, 12)


class Frames:
    """An endless stream of the same frames, numbered."""

    def __init__(self, **columns: Tensor) -> None:
        self.tensors = {"image": torch.rand(2, 3, 8, 12), **columns}
        self.drawn = 0
        self.fronts: list[int] = []

    def next(self) -> Batch:
        self.drawn += 1
        return Batch(dict(self.tensors), self.drawn - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]

    def keep_up(self, front: int, through: int | None = None) -> None:
        self.fronts.append(front)

    @property
    def corrupt(self) -> CorruptRows:
        return CorruptRows(DatasetInfo("frames", "nowhere", num_rows=2, layout={}))

    def close(self) -> None: ...


class Scripted:
    """Peers that answer as told, and remember what the loop asked of them."""

    def __init__(self, answer: PeerPredictions) -> None:
        self.answer = answer
        self.calls: list[tuple[str, int | None, int]] = []

    def request(self, batch: Batch, now: int, use: int) -> None:
        self.calls.append(("request", batch.id, use))

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        assert not any(p.requires_grad for p in prediction.values())
        self.calls.append(("publish", batch.id, step))

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        self.calls.append(("collect", batch.id, step))
        return self.answer

    def stepped(self, step: int, model: nn.Module) -> None: ...


class Agree(Relation):
    """Depth is 2 where normals look at the camera. Simple enough to check by hand."""

    quantities = ("depth", "normals")
    scale = 1.0

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert predictions["depth"].requires_grad
        assert not predictions["normals"].requires_grad
        off = predictions["depth"] + 2 * predictions["normals"][:, 2:]
        return {"off": (self.scale * off).abs().mean()}


def trainer(peers: Scripted, *, supervised: int = 1, consistency: int = 1, **task: Any) -> Trainer:
    data = {"reader": "world"}
    job = parse_job(
        {
            "name": "loop",
            "steps": 12,
            "data": {"d": data},
            "tasks": {"depth": {"task": "depth", "dedicated": "d", **task}},
            "mediator": {
                "data": "d",
                "supervised_steps": supervised,
                "consistency_steps": consistency,
            },
            "consistency": {"agree": {"relation": "tests:Agree", "weight": 2.0, "warmup_steps": 4}},
        },
        "job",
    )
    torch.manual_seed(0)
    relation = WeightedRelation("agree", Agree(), job.consistency["agree"])
    return Trainer(
        "depth",
        job,
        Depth(loss="log_mse"),
        nn.Conv2d(3, 1, 1),
        seed=0,
        relations=[relation],
        published=("depth",),
        dedicated=Frames(depth=torch.full((2, 1, 8, 12), 3.0)),
        mediator=Frames(),
        peers=peers,
    )


def fresh_normals(staleness: int = 3) -> PeerPredictions:
    prediction = Prediction("normals", {"normals": NORMALS}, 7, staleness, 0.5)
    return PeerPredictions({"normals": prediction})


@pytest.mark.parametrize(
    ("staleness", "front"),
    [({}, 16), ({"on_stale": "wait"}, 16), ({"on_stale": "wait", "max_steps": 0}, 0)],
)
def test_who_is_bound_to_the_steps_of_its_peers_does_not_jump_to_where_they_are(staleness, front):
    loop = trainer(Scripted(replace(fresh_normals(), front=16)))
    loop.job = loop.job.model_copy(update={"staleness": StalenessConfig(**staleness)})
    loop.train(4)
    assert loop.mediator.fronts == [front, front]


def test_supervised_and_consistency_steps_alternate_in_the_given_ratio():
    loop = trainer(Scripted(fresh_normals()), supervised=2, consistency=1)
    kinds = "".join("c" if loop.is_consistency_step(step) else "s" for step in range(9))
    assert kinds == "sscsscssc"
    totals = loop.train(100)["totals"]
    assert (totals["supervised_steps"], totals["consistency_steps"]) == (8, 4)


def test_each_batch_is_asked_for_a_step_before_it_is_used():
    peers = Scripted(fresh_normals())
    trainer(peers).train(4)
    assert peers.calls == [
        ("request", 0, 1),
        ("publish", 0, 1),
        ("collect", 0, 1),
        ("request", 1, 3),
        ("publish", 1, 3),
        ("collect", 1, 3),
    ]


def test_a_look_up_is_sent_one_step_ahead_however_long_the_round():
    peers = Scripted(fresh_normals())
    loop = trainer(peers, supervised=5)
    loop.train(4)
    assert peers.calls == []
    loop.train(1)
    assert peers.calls == [("request", 0, 5)]


def test_after_a_pause_the_peers_of_the_next_step_are_asked_for_again():
    peers = Scripted(fresh_normals())
    loop = trainer(peers, supervised=5)
    loop.ask_again()
    assert peers.calls == []  # nobody has been asked yet
    loop.train(5)
    loop.ask_again()
    assert peers.calls == [("request", 0, 5), ("request", 0, 5)]
    loop.train(1)
    assert peers.calls[2:] == [("publish", 0, 5), ("collect", 0, 5)]


def test_a_task_that_gives_its_relations_no_weight_learns_from_its_labels_and_serves_its_peers():
    peers = Scripted(fresh_normals())
    loop = trainer(peers, consistency_weight=0.0)
    loop.relations = [WeightedRelation(r.name, r.relation, r.config, 0.0) for r in loop.relations]
    totals = loop.train(12)["totals"]
    assert totals["supervised_steps"] == 6
    assert totals["skipped_consistency_steps"] == 6
    assert [call[0] for call in peers.calls].count("publish") == 6


def test_a_task_that_only_teaches_does_not_learn_the_mediators_statistics():
    loop = trainer(Scripted(fresh_normals()), supervised=0)
    loop.model = loop.forward = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1))
    loop.relations = [WeightedRelation(r.name, r.relation, r.config, 0.0) for r in loop.relations]
    before = loop.model[1].running_mean.clone()
    loop.train(3)
    assert torch.equal(loop.model[1].running_mean, before)


def test_an_absurd_prediction_of_a_peer_is_a_skipped_step_and_no_failure():
    absurd = Prediction("normals", {"normals": NORMALS * 3e38}, 7, 0, 0.0)
    loop = trainer(Scripted(PeerPredictions({"normals": absurd})), supervised=0)
    loop.relations[0].relation.scale = 1e30
    before = [p.clone() for p in loop.model.parameters()]
    totals = loop.train(3)["totals"]
    assert totals["misses"] == {"unusable": 3}
    assert totals["skipped_consistency_steps"] == 3
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))


class SaysNothing(Agree):
    """Its value does not depend on what this task predicts."""

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"off": super().__call__(predictions, batch)["off"].detach()}


def test_a_relation_without_a_gradient_for_this_task_is_a_skipped_step_and_no_failure():
    loop = trainer(Scripted(fresh_normals()), supervised=0)
    loop.relations = [WeightedRelation("agree", SaysNothing(), loop.relations[0].config)]
    assert loop.train(3)["totals"]["skipped_consistency_steps"] == 3


def test_a_step_without_peers_publishes_and_learns_nothing_and_is_counted():
    peers = Scripted(PeerPredictions({}, {"normals": "absent"}))
    loop = trainer(peers, supervised=0)
    before = [p.clone() for p in loop.model.parameters()]
    totals = loop.train(5)["totals"]
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
    assert totals["skipped_consistency_steps"] == 5
    assert totals["misses"] == {"absent": 5}
    assert totals["edges"]["normals"]["hits"] == 0
    assert [c for c in peers.calls if c[0] == "publish"] == [("publish", i, i) for i in range(5)]


def test_staleness_is_counted_at_every_use():
    report = trainer(Scripted(fresh_normals(staleness=3)), supervised=0).train(4)
    edge = report["totals"]["edges"]["normals"]
    assert (edge["hits"], edge["steps_sum"], edge["steps_max"]) == (4, 12, 3)
    assert report.values["hit_rate/normals"] == 1.0
    assert report.values["staleness/normals/steps_mean"] == 3.0


def test_the_weight_warms_up_and_the_task_scales_it():
    peers = Scripted(fresh_normals())
    loop = trainer(peers, consistency_weight=0.5)
    config = loop.job.consistency["agree"]
    weights = [WeightedRelation("agree", Agree(), config, 0.5).weight(s) for s in range(6)]
    assert weights == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_resumed_loop_takes_the_very_steps_it_would_have_taken():
    straight = trainer(Scripted(fresh_normals()))
    straight.train(12)
    first = trainer(Scripted(fresh_normals()))
    first.train(5)
    weights, state = first.model.state_dict(), first.state_dict()
    second = trainer(Scripted(fresh_normals()))
    second.model.load_state_dict(weights)
    second.load_state_dict(state)
    second.train(12)
    assert second.step == 12
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.mediator.drawn == straight.mediator.drawn
    assert second.totals.state_dict()["consistency_steps"] == 6


def test_an_error_names_task_step_and_cause():
    loop = trainer(Scripted(fresh_normals()))
    loop.train(3)
    loop.dedicated.tensors["depth"] = torch.full((2, 1, 3, 3), 3.0)
    with pytest.raises(TrainingError, match=r"task 'depth' failed at step 4: \w+Error: ") as error:
        loop.train(3)
    assert (error.value.task, error.value.step) == ("depth", 4)


def test_a_gradient_that_is_not_finite_stops_the_task_before_the_update():
    loop = trainer(Scripted(fresh_normals()))
    loop.dedicated.tensors["image"] = torch.full((2, 3, 8, 12), math.inf)
    before = [p.clone() for p in loop.model.parameters()]
    with pytest.raises(TrainingError, match="is not finite"):
        loop.train(1)
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.895, 0.1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, rates):
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=2, final_fraction=0.1)
    steps = [0, 1, 2, 4, 11]
    got = [learning_rate(config, step, 11) for step in steps]
    assert got == pytest.approx(rates, abs=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_a_compiled_network_takes_the_same_steps():
    runs = [trainer(Scripted(fresh_normals()), compile=on) for on in (False, True)]
    losses = [[run.train(1)["values"] for _ in range(4)] for run in runs]
    for plain, compiled in zip(*losses, strict=True):
        for name in plain.keys() & {"loss/supervised", "loss/consistency"}:
            assert compiled[name] == pytest.approx(plain[name], rel=1e-4)
