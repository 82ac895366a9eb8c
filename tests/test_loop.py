"""The training loop of one task, with streams and peers made by hand: no Ray, no data."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from collectives import tiny_job
from torch import Tensor, nn

from taskray.data.storage.source import DatasetInfo
from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.data.streams.rows import CorruptRows
from taskray.errors import InputError, TrainingError
from taskray.job.config import Job, OptimizerConfig, StalenessConfig, parse_job
from taskray.loop.assembly import build_relations
from taskray.loop.consistency import WeightedRelation
from taskray.loop.interfaces import PeerPredictions, Prediction
from taskray.loop.learned import Learned
from taskray.loop.optimization import Optimization, learning_rate, parameter_groups
from taskray.loop.trainer import Trainer
from taskray.relations.relation import Relation
from taskray.run.checks import check
from taskray.tasks.depth import Depth
from taskray.weighting.weighting import Sum, Weighting

NORMALS = torch.tensor([0.0, 0.0, -1.0]).reshape(1, 3, 1, 1).expand(2, 3, 8, 12)

Call = tuple[str, int | None, int]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread for such small frames only waits, on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Frames:
    """An endless stream of the same frames, numbered."""

    def __init__(self, **columns: Tensor) -> None:
        self.tensors = {"image": torch.rand(2, 3, 8, 12), **columns}
        self.drawn = 0
        self.calls: list[tuple[str, int]] = []

    def next(self) -> Batch:
        self.calls.append(("next", self.drawn))
        self.drawn += 1
        return Batch(dict(self.tensors), self.drawn - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]

    def follow(self, window: int) -> None:
        self.calls.append(("follow", window))

    def position(self) -> Place | None:
        return None

    @property
    def corrupt(self) -> CorruptRows:
        return CorruptRows(DatasetInfo("frames", "nowhere", num_rows=2, layout={}))

    def close(self) -> None: ...


class Scripted:
    """Peers that give one answer, and remember what the loop asked of them."""

    def __init__(self, answer: PeerPredictions) -> None:
        self.answer = answer
        self.calls: list[Call] = []
        self.steps: list[int] = []

    def ask(self, batch: Batch, step: int, use: int) -> None:
        assert step in (use - 1, use)
        self.calls.append(("ask", batch.id, use))

    def publish(self, batch: Batch, step: int, prediction: Mapping[str, Tensor]) -> None:
        assert not any(p.requires_grad for p in prediction.values())
        self.calls.append(("publish", batch.id, step))

    def collect(self, batch: Batch, step: int) -> PeerPredictions:
        self.calls.append(("collect", batch.id, step))
        return self.answer

    def stepped(self, step: int) -> None:
        self.steps.append(step)

    def published(self) -> list[Call]:
        return [call for call in self.calls if call[0] == "publish"]


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


class WithoutGradient(Agree):
    """Its value does not depend on what this task predicts."""

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"off": super().__call__(predictions, batch)["off"].detach()}


def job_of(supervised: int = 1, consistency: int = 1, **task: Any) -> Job:
    return parse_job(
        {
            "name": "loop",
            "steps": 12,
            "data": {"d": {"reader": "world"}},
            "tasks": {"depth": {"task": "depth", "dedicated": "d", **task}},
            "mediator": {
                "data": "d",
                "supervised_steps": supervised,
                "consistency_steps": consistency,
            },
            "consistency": {
                "agree": {"relation": "test_loop:Agree", "weight": 2.0, "warmup_steps": 4}
            },
        },
        "job",
    )


def trainer(
    peers: Scripted,
    *,
    supervised: int = 1,
    consistency: int = 1,
    labelled: bool = True,
    relation: Relation | None = None,
    module: nn.Module | None = None,
    weighting: Weighting | None = None,
    scale: float | None = None,
    start_step: int = 0,
    staleness: StalenessConfig | None = None,
    with_labels: bool = False,
    **task: Any,
) -> Trainer:
    """``scale``: of the relation in this task; None: as the job has it."""
    job = job_of(supervised, consistency, **task)
    assert job.mediator is not None
    mediator = job.mediator.model_copy(update={"with_labels": with_labels})
    job = job.model_copy(update={"mediator": mediator})
    if staleness is not None:
        job = job.model_copy(update={"staleness": staleness})
    torch.manual_seed(0)
    depth = Depth(loss="log_mse")
    (agree,) = build_relations(job, "depth", depth)
    relation = relation or agree.relation
    scale = agree.scale if scale is None else scale
    config = agree.config.model_copy(update={"start_step": start_step})
    network = nn.Conv2d(3, 1, 1) if module is None else module
    return Trainer(
        "depth",
        job,
        depth,
        Learned(network, {"agree": relation}, weighting or Sum()),
        seed=0,
        relations=[WeightedRelation("agree", relation, config, scale)],
        published=("depth",),
        dedicated=[Frames(depth=torch.full((2, 1, 8, 12), 3.0))] if labelled else [],
        mediator=Frames(),
        peers=peers,
    )


def on_labels_alone() -> Trainer:
    """The same task before its relation begins."""
    return trainer(Scripted(no_normals()), start_step=100)


def fresh_normals(staleness: int = 3) -> PeerPredictions:
    prediction = Prediction("normals", {"normals": NORMALS}, 7, staleness, 0.5)
    return PeerPredictions({"normals": prediction}, window=5)


def no_normals() -> PeerPredictions:
    return PeerPredictions({}, {"normals": "absent"})


def parameters(loop: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in loop.network.module.parameters()]


def equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# The two kinds of steps


def test_supervised_and_consistency_steps_alternate_in_the_given_ratio() -> None:
    loop = trainer(Scripted(fresh_normals()), supervised=2, consistency=1)
    kinds = "".join("s" if loop.turn(step) is None else "c" for step in range(9))
    assert kinds == "sscsscssc"
    totals = loop.train(100).totals
    assert (totals.supervised_steps, totals.consistency_steps) == (8, 4)
    assert (totals.skipped_consistency_steps, totals.replaced_by_supervised) == (0, 0)


def test_a_task_without_labels_spends_every_step_on_the_mediator() -> None:
    loop = trainer(Scripted(fresh_normals()), supervised=2, labelled=False)
    totals = loop.train(100).totals
    assert (totals.supervised_steps, totals.consistency_steps) == (0, 12)


def test_a_relation_that_has_not_begun_leaves_the_steps_to_the_labels() -> None:
    loop = trainer(Scripted(fresh_normals()), start_step=6)
    totals = loop.train(12).totals
    assert (totals.supervised_steps, totals.consistency_steps) == (9, 3)


def test_a_step_has_two_halves_and_the_first_ends_with_the_publication() -> None:
    peers = Scripted(fresh_normals())
    loop = trainer(peers, supervised=0)
    step = loop.step()
    next(step)
    assert [name for name, *_ in peers.calls] == ["ask", "publish"]
    assert (loop.steps_made, peers.steps) == (0, [])
    assert next(step, "the end") == "the end"
    assert [name for name, *_ in peers.calls] == ["ask", "publish", "collect", "ask"]
    assert (loop.steps_made, peers.steps) == (1, [1])


def test_the_position_in_every_labelled_dataset_is_part_of_the_state() -> None:
    loop = trainer(Scripted(fresh_normals()), start_step=100)
    near, far = (Frames(depth=torch.full((2, 1, 8, 12), metres)) for metres in (2.0, 9.0))
    loop.supervised.streams = [near, far]
    state = loop.state_dict()
    near.next(), far.next(), far.next()
    assert loop.state_dict()["dedicated"] == [{"drawn": 1}, {"drawn": 2}]
    loop.load_state_dict(state)
    assert (near.drawn, far.drawn) == (0, 0)


def test_a_loss_that_two_labelled_datasets_give_is_named() -> None:
    loop = trainer(Scripted(fresh_normals()), start_step=100)
    loop.supervised.streams = [
        Frames(depth=torch.full((2, 1, 8, 12), metres)) for metres in (2.0, 9.0)
    ]
    with pytest.raises(TrainingError, match="two losses have the name 'log_mse'"):
        loop.train(1)


# Asking


def test_each_batch_is_asked_about_a_step_before_it_is_used() -> None:
    peers = Scripted(fresh_normals())
    trainer(peers).train(4)
    assert peers.calls == [
        ("ask", 0, 1),
        ("publish", 0, 1),
        ("collect", 0, 1),
        ("ask", 1, 3),
        ("publish", 1, 3),
        ("collect", 1, 3),
    ]
    assert peers.steps == [1, 2, 3, 4]


def test_a_question_is_sent_one_step_ahead_however_long_the_round() -> None:
    peers = Scripted(fresh_normals())
    loop = trainer(peers, supervised=5)
    loop.train(4)
    assert peers.calls == []
    loop.train(1)
    assert peers.calls == [("ask", 0, 5)]


def test_the_next_batch_is_drawn_in_the_window_of_the_last_answer() -> None:
    loop = trainer(Scripted(fresh_normals()), supervised=0)
    loop.train(2)
    assert loop.mediator.calls == [
        ("next", 0),
        ("follow", 5),
        ("next", 1),
        ("follow", 5),
        ("next", 2),
    ]


def test_no_question_is_asked_for_a_step_after_the_last() -> None:
    peers = Scripted(fresh_normals())
    loop = trainer(peers, supervised=0, steps=2)
    loop.train(10)
    assert [call[0] for call in peers.calls].count("ask") == 2


# Steps without a peer


def test_a_consistency_step_without_a_peer_becomes_a_supervised_step_and_is_counted() -> None:
    peers = Scripted(no_normals())
    loop = trainer(peers, supervised=0)
    alone = on_labels_alone()
    report, expected = loop.train(5), alone.train(5)
    assert equal(parameters(loop), parameters(alone))
    totals = report.totals
    assert (totals.consistency_steps, totals.replaced_by_supervised) == (5, 5)
    assert totals.skipped_consistency_steps == 0
    assert totals.misses == {"absent": 5}
    assert report.values["loss/supervised"] == expected.values["loss/supervised"]
    assert report.values["replaced_by_supervised"] == 5
    assert "loss/consistency" not in report.values
    assert peers.published() == [("publish", i, i) for i in range(5)]


def test_without_labels_a_step_without_a_peer_publishes_and_learns_nothing() -> None:
    peers = Scripted(no_normals())
    loop = trainer(peers, labelled=False)
    before = parameters(loop)
    totals = loop.train(5).totals
    assert equal(before, parameters(loop))
    assert (totals.skipped_consistency_steps, totals.replaced_by_supervised) == (5, 0)
    assert totals.misses == {"absent": 5}
    assert (totals.edges["normals"].lookups, totals.edges["normals"].hits) == (5, 0)
    assert peers.published() == [("publish", i, i) for i in range(5)]


def test_a_task_that_gives_its_relations_no_weight_learns_from_its_labels_and_publishes() -> None:
    peers = Scripted(fresh_normals())
    loop = trainer(peers, scale=0.0)
    assert loop.alternation.teacher_only
    alone = on_labels_alone()
    totals = loop.train(12).totals
    alone.train(12)
    assert equal(parameters(loop), parameters(alone))
    assert (totals.supervised_steps, totals.replaced_by_supervised) == (6, 6)
    assert len(peers.published()) == 6


def test_a_task_that_only_teaches_does_not_learn_the_mediators_statistics() -> None:
    module = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1))
    loop = trainer(Scripted(fresh_normals()), labelled=False, module=module, scale=0.0)
    loop.train(3)
    assert int(module[1].num_batches_tracked) == 0
    assert module.training


class Seen(Sum):
    """Remembers the names of the losses of each update."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[set[str]] = []

    def backward(
        self,
        losses: Mapping[str, Tensor],
        added: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        self.names.append({*losses, *added})
        return super().backward(losses, added, parameters)


def test_a_consistency_step_with_labels_is_one_update_on_both_losses() -> None:
    seen = Seen()
    loop = trainer(Scripted(fresh_normals()), weighting=seen, with_labels=True)
    report = loop.train(4)
    assert seen.names == [{"log_mse"}, {"log_mse", "agree"}] * 2
    assert loop.supervised.streams[0].state_dict() == {"drawn": 4}  # as many as of a task alone
    assert (report.totals.supervised_steps, report.totals.consistency_steps) == (2, 2)
    assert report.values["loss/supervised"] > 0
    assert report.values["loss/consistency"] > 0


def test_with_labels_a_step_without_a_peer_is_a_supervised_one() -> None:
    loop = trainer(Scripted(no_normals()), supervised=0, with_labels=True)
    assert loop.train(3).totals.replaced_by_supervised == 3
    torch.testing.assert_close(parameters(loop), parameters(_trained(on_labels_alone(), 3)))


def test_with_labels_a_loss_on_labels_that_is_not_finite_is_not_blamed_on_a_peer(
    monkeypatch,
) -> None:
    loop = trainer(Scripted(fresh_normals()), supervised=0, with_labels=True)
    monkeypatch.setattr(loop.task, "loss", lambda p, batch: {"nan": torch.nan * p["depth"].mean()})
    with pytest.raises(TrainingError, match="not finite"):
        loop.train(1)
    assert not loop.meter.totals.misses


def _trained(loop: Trainer, steps: int) -> Trainer:
    loop.train(steps)
    return loop


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_an_absurd_prediction_of_a_peer_gives_no_gradient_and_is_no_failure(
    labelled: bool, with_labels: bool
) -> None:
    absurd = Prediction("normals", {"normals": NORMALS * 3e38}, 7, 0, 0.0)
    relation = Agree()
    relation.scale = 1e30
    peers = Scripted(PeerPredictions({"normals": absurd}))
    loop = trainer(
        peers, supervised=0, labelled=labelled, relation=relation, with_labels=with_labels
    )
    before = parameters(loop)
    totals = loop.train(3).totals
    assert totals.misses == {"unusable": 3}
    if labelled:
        assert totals.replaced_by_supervised == 3
        alone = on_labels_alone()
        alone.train(3)
        assert equal(parameters(alone), parameters(loop))
    else:
        assert totals.skipped_consistency_steps == 3
        assert equal(before, parameters(loop))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_relation_without_a_gradient_for_this_task_is_no_failure(labelled: bool) -> None:
    loop = trainer(
        Scripted(fresh_normals()), supervised=0, labelled=labelled, relation=WithoutGradient()
    )
    totals = loop.train(3).totals
    assert totals.replaced_by_supervised == (3 if labelled else 0)
    assert totals.skipped_consistency_steps == (0 if labelled else 3)
    assert totals.misses == {}


# What is counted and weighted


def test_staleness_is_counted_at_every_use() -> None:
    report = trainer(Scripted(fresh_normals(staleness=3)), supervised=0).train(4)
    edge = report.totals.edges["normals"]
    assert (edge.hits, edge.steps_sum, edge.steps_max) == (4, 12, 3)
    assert report.values["hit_rate/normals"] == 1.0
    assert report.values["staleness/normals/steps_mean"] == 3.0


def test_a_report_does_not_change_after_it_was_made() -> None:
    loop = trainer(Scripted(fresh_normals()), supervised=0)
    report = loop.train(4)
    loop.train(4)
    assert report.totals.consistency_steps == report.totals.edges["normals"].hits == 4


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_the_weight_warms_up_and_the_task_scales_it(factor: float) -> None:
    loop = trainer(Scripted(fresh_normals()), supervised=0, consistency_weight=factor)
    values = [loop.train(1).values for _ in range(6)]
    weights = [v["loss/consistency"] / v["loss/consistency/agree"] for v in values]
    # 2.0 is the relation's own weight, reached after 4 steps
    assert weights == pytest.approx([2.0 * factor * w for w in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)])


def test_the_gradient_is_that_of_the_weighted_loss() -> None:
    norms = []
    for factor in (1.0, 0.5):
        loop = trainer(Scripted(fresh_normals()), supervised=0, consistency_weight=factor)
        norms.append(loop.train(1).values["grad_norm"])
    assert norms[1] == pytest.approx(0.5 * norms[0])


# Resuming


@pytest.mark.parametrize("after", [5, 6])
def test_a_resumed_loop_takes_the_very_steps_it_would_have_taken(after: int) -> None:
    straight = trainer(Scripted(fresh_normals()))
    straight.train(12)
    first = trainer(Scripted(fresh_normals()))
    first.train(after)
    weights, state = first.learned.weights(), first.state_dict()
    second = trainer(Scripted(fresh_normals()))
    second.learned.load_weights(weights)
    second.load_state_dict(state)
    second.train(12)
    assert second.steps_made == 12
    assert equal(parameters(straight), parameters(second))
    assert second.mediator.drawn == straight.mediator.drawn
    assert second.meter.totals.consistency_steps == 6
    assert second.meter.totals.edges["normals"].hits == 6


def test_a_batch_that_was_asked_about_and_not_used_comes_again() -> None:
    loop = trainer(Scripted(fresh_normals()))
    loop.train(1)
    assert (loop.mediator.drawn, loop.state_dict()["mediator"]) == (1, {"drawn": 0})
    loop.train(1)
    assert loop.state_dict()["mediator"] == {"drawn": 1}


# Errors


def test_a_gradient_of_zero_over_a_whole_chunk_is_reported() -> None:
    loop = on_labels_alone()
    loop.supervised.streams = [Frames(depth=torch.zeros(2, 1, 8, 12))]
    assert loop.train(3).warnings == (
        "task 'depth' learns nothing: its gradient is 0 in every step",
    )
    assert on_labels_alone().train(3).warnings == ()


def test_an_error_names_task_step_and_cause() -> None:
    loop = trainer(Scripted(fresh_normals()))
    loop.train(3)
    loop.supervised.streams[0].tensors["depth"] = torch.full((2, 1, 3, 3), 3.0)
    with pytest.raises(
        TrainingError, match=r"task 'depth' failed at step 4: the loss .* \w+Error: "
    ) as error:
        loop.train(3)
    assert (error.value.task, error.value.step) == ("depth", 4)


def test_a_gradient_that_is_not_finite_stops_the_task_before_the_update() -> None:
    loop = trainer(Scripted(fresh_normals()))
    loop.supervised.streams[0].tensors["image"] = torch.full((2, 3, 8, 12), math.inf)
    before = parameters(loop)
    with pytest.raises(TrainingError, match="is not finite"):
        loop.train(1)
    assert equal(before, parameters(loop))


def test_a_network_whose_own_prediction_is_not_finite_fails_in_a_consistency_step() -> None:
    loop = trainer(Scripted(fresh_normals()), supervised=0)
    with torch.no_grad():
        loop.network.module.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="is not finite"):
        loop.train(1)


# The optimizer and the arithmetic


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.895, 0.1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: str, rates: list[float]) -> None:
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=2, final_fraction=0.1)
    steps = [0, 1, 2, 4, 11]
    got = [learning_rate(config, step, 11) for step in steps]
    assert got == pytest.approx(rates, abs=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_a_compiled_network_takes_the_same_steps() -> None:
    runs = [trainer(Scripted(fresh_normals()), compile=on) for on in (False, True)]
    losses = [[run.train(1).values for _ in range(4)] for run in runs]
    for plain, compiled in zip(*losses, strict=True):
        for name in plain.keys() & {"loss/supervised", "loss/consistency"}:
            assert compiled[name] == pytest.approx(plain[name], rel=1e-4)


# ---- parts with a rate of their own -----------------------------------------------------------


def parted() -> Learned:
    network = nn.ModuleDict({"encoder": nn.Linear(1, 1), "decoder": nn.Linear(1, 1)})
    return Learned(network, {}, Sum())


def test_a_part_moves_at_its_own_rate_and_the_longest_name_counts() -> None:
    learned = parted()
    factors = {"encoder": 0.5, "encoder.bias": 0.0}
    config = OptimizerConfig(name="sgd", momentum=0, lr=0.1, clip_norm=None, lr_factors=factors)
    optimization = Optimization(learned, config, 10)
    before = {name: p.detach().clone() for name, p in learned.together().items()}
    loss = torch.stack([p.sum() for p in learned.parameters()]).sum()
    optimization.descend({"loss": loss}, 0, checked=True)
    moved = {name: float((before[name] - p).detach()) for name, p in learned.together().items()}
    assert moved == pytest.approx(
        {"encoder.weight": 0.05, "encoder.bias": 0, "decoder.weight": 0.1, "decoder.bias": 0.1}
    )


def test_a_part_that_no_weight_is_of_is_refused() -> None:
    with pytest.raises(InputError, match=r"lr_factors\.enc: no weight has this name; known: enc"):
        parameter_groups(parted().together(), {"enc": 0.1})
    with pytest.raises(InputError, match=r"^tasks\.depth\.optimizer\.lr_factors\.enc: no weight"):
        check(tiny_job("tasks.depth.optimizer.lr_factors={enc: 0.1}"))
