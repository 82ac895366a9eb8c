"""The weightings that a job names: closed forms, what all have in common, wrong use."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multi import two_datasets
from torch import Tensor, nn

from taskray.data.streams.batch import Batch
from taskray.errors import InputError, TaskrayError
from taskray.job import plugins
from taskray.job.config import Job, OptimizerConfig
from taskray.loop.assembly import build_learned, build_task
from taskray.loop.learned import Learned
from taskray.loop.optimization import NotFinite, Optimization
from taskray.loop.supervised import without_empty_labels
from taskray.run.checks import check
from taskray.runtime.checkpoints import CheckpointStore
from taskray.schema import IGNORE
from taskray.tasks.depth import Depth
from taskray.tasks.multi import Multi
from taskray.tasks.segmentation import Segmentation
from taskray.weighting.aggregated import Aggregated
from taskray.weighting.gradnorm import GradNorm
from taskray.weighting.weighting import Weighting

HEADS = ("a", "b", "c")
REQUIRED: dict[str, dict[str, Any]] = {
    "fixed": {"weights": {"a": 2.0}},
    "focused": {"focus": ["b"]},
    "stch": {"mu": 0.5},
    "cosmos": {"lambda_": 0.5},
    "fairgrad": {"alpha": 1.0},
    "krum": {"n_byzantine": 0},
    "trimmed_mean": {"trim_number": 0},
}
NAMES = tuple(plugins.BUILTIN["weighting"])
META = torch.device("meta")
Losses = dict[str, Tensor]


def built(name: str, heads: Sequence[str] = HEADS, **arguments: Any) -> Weighting:
    """The weighting as a job describes it."""
    given = REQUIRED.get(name, {}) | arguments
    weighting: Weighting = plugins.build("weighting", name, given, "tasks.x.weighting", heads=heads)
    return weighting


class Net(nn.Module):
    """A shared encoder and a decoder for each head."""

    def __init__(self, heads: Sequence[str] = HEADS, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.decoders = nn.ModuleDict({head: nn.Linear(4, 2) for head in heads})
        self.inputs = torch.randn(7, 6)
        self.targets = torch.randn(len(heads), 7, 2)

    def losses(self, heads: Sequence[str] = HEADS) -> Losses:
        features = self.encoder(self.inputs)
        return {
            f"{head}/mse": (decoder(features) - target).square().mean()
            for (head, decoder), target in zip(self.decoders.items(), self.targets, strict=True)
            if head in heads
        }


def gradients(
    weighting: Weighting, network: Net, losses: Losses, added: Losses | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """The objective of one step, and the gradient of each parameter of the network."""
    parameters = [*network.parameters(), *weighting.parameters()]
    for parameter in parameters:
        parameter.grad = None
    objective = weighting.backward(losses, added or {}, parameters)
    return objective, [p.grad for p in network.parameters()]


def weights_of(weighting: Weighting, *values: float) -> tuple[float, list[float]]:
    """The objective, and the factor that each of these losses has in the gradient."""
    leaves = [torch.tensor(value, requires_grad=True) for value in values]
    losses = {f"{head}/l": leaf + 0.0 for head, leaf in zip(HEADS, leaves, strict=False)}
    objective = weighting.backward(losses, {}, [*leaves, *weighting.parameters()])
    return float(objective), [float(leaf.grad) for leaf in leaves if leaf.grad is not None]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- what all have in common ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_weighting_gives_every_parameter_a_finite_gradient(name: str) -> None:
    network = Net()
    objective, found = gradients(built(name), network, network.losses())
    assert objective.dim() == 0
    assert not objective.requires_grad
    assert bool(objective.isfinite())
    for (parameter_name, parameter), gradient in zip(
        network.named_parameters(), found, strict=True
    ):
        assert gradient is not None, parameter_name
        assert gradient.shape == parameter.shape
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_may_lack_a_head_and_the_state_goes_on(name: str) -> None:
    network, weighting = Net(), built(name)
    for heads in (HEADS, ("a", "c"), ("b",), HEADS):
        objective, found = gradients(weighting, network, network.losses(heads))
        assert bool(objective.isfinite())
        of_head = dict(zip(dict(network.named_parameters()), found, strict=True))
        for head in HEADS:
            gradient = of_head[f"decoders.{head}.weight"]
            assert (gradient is not None) == (head in heads)
        encoder = of_head["encoder.0.weight"]
        assert encoder is not None
        assert encoder.isfinite().all()
        assert encoder.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_no_head_and_a_relations_loss_are_added_as_they_are(name: str) -> None:
    network = Net()
    (first, *_) = network.parameters()

    def step(added: bool) -> list[Tensor | None]:
        weighting, losses = built(name), network.losses()
        more = {"agree": 3 * first.sum()} if added else {}
        if added:
            losses["other"] = 2 * first.sum()
        torch.manual_seed(1)
        return gradients(weighting, network, losses, more)[1]

    without, with_added = step(False)[0], step(True)[0]
    assert without is not None
    torch.testing.assert_close(with_added, without + 5.0)
    objective, found = gradients(built(name), network, {}, {"agree": 3 * first.sum()})
    assert objective == 3 * first.sum()
    torch.testing.assert_close(found[0], torch.full_like(first, 3.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_weighting_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(name: str) -> None:
    network, weighting = Net(), built(name, **({"window": 2} if name == "gradnorm" else {}))
    optimizer = torch.optim.SGD([*network.parameters(), *weighting.parameters()], 0.1)

    def step(of: Weighting) -> list[Tensor | None]:
        optimizer.zero_grad()
        torch.manual_seed(2)
        return gradients(of, network, network.losses())[1]

    for _ in range(4):
        step(weighting)
        optimizer.step()
        weighting.stepped(lambda: {n: v.detach() for n, v in network.losses().items()})
    file = io.BytesIO()
    torch.save(weighting.state(), file)
    file.seek(0)
    resumed = built(name, **({"window": 2} if name == "gradnorm" else {}))
    resumed.load_state_dict(weighting.state_dict())
    resumed.load_state(torch.load(file, weights_only=True))
    for expected, found in zip(step(weighting), step(resumed), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    again = [[g.clone() for g in step(w) if g is not None] for w in (weighting, resumed)]
    for expected, found in zip(*again, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "pcgrad", "famo"])
def test_a_network_in_bfloat16_gives_gradients_in_float32(name: str) -> None:
    network, weighting = Net(), built(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = {n: v.float() for n, v in network.losses().items()}
    objective, found = gradients(weighting, network, losses)
    exact, _ = gradients(built(name), network, network.losses())
    assert float(objective) == pytest.approx(float(exact), rel=0.05, abs=0.05)
    assert all(g is not None and g.dtype == torch.float32 for g in found)


@pytest.mark.parametrize("name", NAMES)
def test_with_one_head_a_step_has_the_direction_of_its_gradient(name: str) -> None:
    network = Net(["a"])
    arguments = {"focus": ["a"]} if name == "focused" else {}
    flat = []
    for weighting in (built(name, ["a"], **arguments), built("sum", ["a"])):
        losses = {"mse": network.losses()["a/mse"]}  # without a head before it: a simple task's
        _, found = gradients(weighting, network, losses)
        flat.append(torch.cat([g.reshape(-1) for g in found if g is not None]))
    assert float(nn.functional.cosine_similarity(*flat, dim=0)) == pytest.approx(1, abs=1e-5)


def test_every_scalarizer_and_aggregator_of_torchjd_has_a_name() -> None:
    import torchjd.aggregation
    import torchjd.scalarization

    named = {path.partition(":")[2] for path in plugins.BUILTIN["weighting"].values()}
    base = {"Scalarizer", "Aggregator", "WeightedAggregator", "GramianWeightedAggregator"}
    plain = {"Sum", "Mean", "Constant", "Random"}  # of gradients: the same as of losses
    there = {n for n in torchjd.scalarization.__all__ if n not in {*base, "Constant"}}
    for name in torchjd.aggregation.__all__:
        if issubclass(getattr(torchjd.aggregation, name), torchjd.aggregation.Aggregator):
            there |= {name} - base - plain
    assert there <= named


# ---- of the losses' values: closed forms ------------------------------------------------------

POSITIVE = st.floats(0.05, 20.0)
THREE = st.tuples(POSITIVE, POSITIVE, POSITIVE)


@given(THREE)
@settings(max_examples=25, deadline=None)
def test_the_weights_of_losses_are_those_of_the_formulas(values: tuple[float, ...]) -> None:
    n, total = len(values), sum(values)
    mean = math.prod(values) ** (1 / n)
    norm = math.sqrt(sum(v * v for v in values))
    focused = mean * values[1]
    harmonic = 1 / sum(1 / (n * v) for v in values)
    soft = [math.exp((v - max(values)) / n / 0.5) for v in values]
    expected: dict[str, tuple[float, list[float]]] = {
        "sum": (total, [1.0] * n),
        "fixed": (total + values[0], [2.0, 1.0, 1.0]),
        "equal": (total / n, [1 / n] * n),
        "uncertainty": (total / 2, [0.5] * n),
        "imtl_l": (total, [1.0] * n),
        "dwa": (total, [1.0] * n),
        "geometric": (mean, [mean / (n * v) for v in values]),
        "focused": (focused, [focused * (1 / n + (i == 1)) / v for i, v in enumerate(values)]),
        "famo": (
            harmonic * sum(map(math.log, values)) / n,
            [harmonic / (n * v) for v in values],
        ),
        "stch": (
            0.5 * math.log(sum(soft)) + max(values) / n,
            [s / (n * sum(soft)) for s in soft],
        ),
        "cosmos": (
            total / n - 0.5 * total / (math.sqrt(n) * norm),
            [1 / n - 0.5 * (1 / norm - total * v / norm**3) / math.sqrt(n) for v in values],
        ),
        "gradnorm": (total, [1.0] * n),
    }
    for name, (objective, factors) in expected.items():
        found = weights_of(built(name), *values)
        assert found[0] == pytest.approx(objective, rel=1e-3, abs=1e-4), name
        assert found[1] == pytest.approx(factors, rel=1e-3, abs=1e-4), name


def test_pbi_is_the_way_along_the_preference_and_five_times_the_way_beside_it() -> None:
    objective, _ = weights_of(built("pbi"), 1.0, 2.0, 3.0)
    assert objective == pytest.approx(6 / math.sqrt(3) + 5 * math.sqrt(2), rel=1e-4)
    towards_a = built("pbi", weights={"a": 1.0, "b": 0.0, "c": 0.0}, theta=2.0)
    assert weights_of(towards_a, 1.0, 3.0, 4.0)[0] == pytest.approx(1 + 2 * 5, rel=1e-4)


def test_random_weights_sum_to_one_and_change_in_every_step() -> None:
    weighting = built("random")
    first, second = (weights_of(weighting, 1.0, 2.0, 3.0)[1] for _ in range(2))
    assert sum(first) == pytest.approx(1)
    assert first != second


def test_uncertainty_learns_the_loss_as_its_variance() -> None:
    weighting = built("uncertainty", ["a", "b"])
    optimizer = torch.optim.SGD(weighting.parameters(), 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        weights_of(weighting, 0.5, 4.0)
        optimizer.step()
    assert weights_of(weighting, 0.5, 4.0)[1] == pytest.approx([0.5 / 0.5, 0.5 / 4.0], rel=1e-3)


def test_dwa_follows_the_ratio_of_the_last_two_windows() -> None:
    weighting = built("dwa", ["a", "b"], window=2, temperature=2.0)
    for values in ((1.0, 4.0), (3.0, 4.0), (1.0, 4.0), (1.0, 2.0)):
        assert weights_of(weighting, *values)[1] == [1.0, 1.0]
    exponents = [math.exp(1 / 2 / 2), math.exp(3 / 4 / 2)]
    expected = [2 * e / sum(exponents) for e in exponents]
    assert weights_of(weighting, 5.0, 5.0)[1] == pytest.approx(expected)


def test_famo_gives_less_weight_to_a_head_whose_loss_fell_faster() -> None:
    weighting = built("famo", ["a", "b"])
    before = weights_of(weighting, 1.0, 1.0)[1]
    assert before == pytest.approx([0.5, 0.5])
    weighting.stepped(lambda: {"a/l": torch.tensor(0.5), "b/l": torch.tensor(0.9)})
    slow, fast = reversed(weights_of(weighting, 1.0, 1.0)[1])
    assert slow > 0.5 > fast
    assert slow + fast == pytest.approx(1)


def test_a_head_that_a_batch_lacks_leaves_the_weights_of_the_others_as_they_were() -> None:
    weighting = built("geometric", ["a", "b"])
    assert weights_of(weighting, 2.0, 8.0)[1] == pytest.approx([4 / 2 / 2, 4 / 8 / 2])
    leaf = torch.tensor(2.0, requires_grad=True)
    objective = weighting.backward({"a/l": leaf * 1.0}, {}, [leaf])
    assert (float(objective), float(leaf.grad)) == pytest.approx((4.0, 1.0))


def test_fixed_weights_are_of_heads_or_of_their_losses() -> None:
    weighting = built("fixed", weights={"a": 2.0, "b/x": 3.0})
    names = ("a/x", "a/y", "b/x", "b/y", "c/x")
    leaves = {name: torch.tensor(1.0, requires_grad=True) for name in names}
    weighting.backward({n: leaf * 1.0 for n, leaf in leaves.items()}, {}, list(leaves.values()))
    assert [float(leaf.grad) for leaf in leaves.values()] == [2.0, 2.0, 3.0, 1.0, 1.0]


# ---- of their gradients: closed forms ---------------------------------------------------------


def combined(name: str, rows: Sequence[Sequence[float]], **arguments: Any) -> list[float]:
    """The gradient of a shared parameter for which the heads' gradients are the rows."""
    weighting = built(name, HEADS[: len(rows)], **arguments)
    parameter = torch.zeros(len(rows[0]), requires_grad=True)
    losses = {
        f"{head}/l": 1 + torch.tensor(row) @ parameter
        for head, row in zip(HEADS, rows, strict=False)
    }
    weighting.backward(losses, {}, [parameter])
    found: list[float] = parameter.grad.tolist()
    return found


ORTHOGONAL, UNEQUAL = [[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]
AGREEING, OPPOSED = [[1.0, 1.0], [2.0, 3.0]], [[1.0, 0.0], [-1.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "arguments", "rows", "expected"),
    [
        ("pcgrad", {}, OPPOSED, [0.5, 1.5]),
        ("pcgrad", {}, AGREEING, [3.0, 4.0]),
        ("gradvac", {}, AGREEING, [3.0, 4.0]),
        ("graddrop", {}, AGREEING, [3.0, 4.0]),
        ("mgda", {}, [[1.0, 0.0], [0.0, 2.0]], [0.8, 0.4]),
        ("upgrad", {}, ORTHOGONAL, [0.5, 0.5]),
        ("upgrad", {}, OPPOSED, [0.25, 0.75]),  # half of the two projections of PCGrad
        ("dualproj", {}, OPPOSED, [0.0, 0.5]),
        ("dualproj", {"pref_vector": {"a": 2.0, "b": 1.0}}, ORTHOGONAL, [2.0, 1.0]),
        ("cagrad", {"c": 0.0}, AGREEING, [1.5, 2.0]),
        ("imtl_g", {}, UNEQUAL, [2 / 3, 2 / 3]),
        ("aligned_mtl", {}, UNEQUAL, [0.5, 0.5]),
        ("config", {}, UNEQUAL, [1.5, 1.5]),
        ("fairgrad", {}, UNEQUAL, [1.0, 1.0]),
        ("nash_mtl", {}, UNEQUAL, [math.sqrt(0.5), math.sqrt(0.5)]),
        ("pcd", {"tau": 0.5}, ORTHOGONAL, [2 / math.sqrt(5), 1 / math.sqrt(5)]),
        ("excess_mtl", {}, ORTHOGONAL, [0.5, 0.5]),
        ("trimmed_mean", {"trim_number": 1}, [[1.0], [5.0], [6.0]], [5.0]),
        ("krum", {}, [[1.0], [1.1], [9.0]], [1.0]),
    ],
)  # fmt: skip
def test_gradients_are_combined_as_the_formulas_are(
    name: str, arguments: dict[str, Any], rows: list[list[float]], expected: list[float]
) -> None:
    assert combined(name, rows, **arguments) == pytest.approx(expected, abs=0.01)


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_no_head_loses_to_first_order(numbers: list[float]) -> None:
    rows = torch.tensor(numbers).reshape(2, 3)
    for name in ("upgrad", "dualproj", "mgda"):
        found = torch.tensor(combined(name, rows.tolist()))
        assert float((rows @ found).min()) >= -0.02 * float(rows.square().sum()), name


def test_gradnorm_makes_the_gradients_of_all_heads_equally_large() -> None:
    weighting = GradNorm(alpha=0.0, window=1, heads=HEADS)
    shared = torch.ones(1, 1, requires_grad=True)
    norms = (1.0, 2.0, 4.0)
    for step in range(400):
        shared.grad = None
        weighting.backward(
            {f"{h}/l": k * shared.sum() for h, k in zip(HEADS, norms, strict=True)}, {}, [shared]
        )
        if step == 0:  # Adam's first step is its rate, in the direction away from the mean, 7 / 3
            assert weighting.weights.tolist() == pytest.approx(
                [1.025 * 3 / 3.025, 3 * 1.025 / 3.025, 3 * 0.975 / 3.025]
            )
    assert float(weighting.weights.sum()) == pytest.approx(3)
    scaled = [float(w) * k for w, k in zip(weighting.weights, norms, strict=True)]
    assert scaled == pytest.approx([scaled[0]] * 3, rel=0.1)


def test_gradnorm_gives_more_weight_to_a_head_that_learns_more_slowly() -> None:
    weighting = GradNorm(alpha=1.5, window=2, heads=("a", "b"))
    shared = torch.ones(1, 1, requires_grad=True)
    for loss_a in (1.0, 1.0, 0.5, 0.4, 0.3):
        values = {"a/l": shared.sum() - 1 + loss_a, "b/l": shared.sum()}
        weighting.backward(values, {}, [shared])
    assert weighting.initial.tolist() == [1.0, 1.0]
    assert float(weighting.weights[1]) > 1 > float(weighting.weights[0])


def test_heads_that_share_nothing_are_an_error_of_gradnorm() -> None:
    one, two = (torch.ones(1, 1, requires_grad=True) for _ in range(2))
    with pytest.raises(TaskrayError, match="the heads share no weight"):
        GradNorm(window=1, heads=("a", "b")).backward(
            {"a/l": one.sum(), "b/l": two.sum()}, {}, [one, two]
        )


def test_the_weight_at_which_gradnorm_measures_depends_on_the_heads_alone() -> None:
    encoder, deeper = (torch.ones(1, 1, requires_grad=True) for _ in range(2))

    def step(weighting: GradNorm, heads: str) -> list[float]:
        features = 2 * encoder.sum()
        of_head = {"a": features * deeper.sum(), "b": 3 * features * deeper.sum(), "c": features}
        encoder.grad = deeper.grad = None
        weighting.backward({f"{h}/l": of_head[h] for h in heads}, {}, [encoder, deeper])
        return weighting.weights.tolist()

    def fresh() -> GradNorm:
        return GradNorm(alpha=0.0, window=1, heads=HEADS)

    measured = []
    for batches in (["ab", "abc"], ["abc", "ab"]):
        weighting = fresh()
        for heads in batches:
            step(weighting, heads)
        measured.append(weighting._last_shared)
    assert measured[0] == measured[1] == {("a", "b"): 1, ("a", "b", "c"): 0}

    whole, first = fresh(), fresh()
    for weighting in (whole, first):
        step(weighting, "ab")
    resumed = fresh()
    resumed.load_state_dict(first.state_dict())
    resumed.load_state(first.state())
    assert step(resumed, "abc") == step(whole, "abc")
    assert step(resumed, "ab") == step(whole, "ab")


@pytest.mark.parametrize("name", ["PCGrad", "UPGrad", "AlignedMTL", "IMTLG"])
def test_the_shared_parameters_get_the_gradient_that_torchjd_gives_them(name: str) -> None:
    import torchjd.aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward

    ours, theirs = Net(), Net()
    torch.manual_seed(3)
    path = f"taskray.weighting.aggregated:{name}"
    _, found = gradients(built(path), ours, ours.losses())
    torch.manual_seed(3)
    features = theirs.encoder(theirs.inputs)
    losses = [
        (decoder(features) - target).square().mean()
        for decoder, target in zip(theirs.decoders.values(), theirs.targets, strict=True)
    ]
    mtl_backward(losses, features=features)
    jac_to_grad(theirs.encoder.parameters(), getattr(torchjd.aggregation, name)())
    for gradient, parameter in zip(found, theirs.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


def test_gradients_have_the_memory_layout_of_their_parameters() -> None:
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    out = convolution(torch.rand(2, 3, 8, 8))
    losses = {"a/l": out.mean(), "b/l": out.square().mean(), "c/l": 0.1 * out.abs().mean()}
    expected = torch.autograd.grad(sum(losses.values()), convolution.weight, retain_graph=True)[0]
    built("trimmed_mean").backward(losses, {}, list(convolution.parameters()))
    gradient = convolution.weight.grad
    assert gradient is not None
    assert gradient.stride() == convolution.weight.stride()
    torch.testing.assert_close(3 * gradient, expected)


@pytest.mark.parametrize(
    ("name", "arguments", "heads"),
    [
        ("trimmed_mean", {"trim_number": 1}, "ab"),
        ("krum", {}, "bc"),
        ("pcd", {}, "bc"),
    ],
)
def test_heads_that_an_aggregator_cannot_combine_are_learned_by_their_sum(
    name: str, arguments: dict[str, Any], heads: str
) -> None:
    network = Net()
    weighting, plain = built(name, **arguments), built("sum")
    (objective, found), (expected_objective, expected) = (
        gradients(of, network, network.losses(tuple(heads))) for of in (weighting, plain)
    )
    assert objective == expected_objective
    torch.testing.assert_close(found, expected)
    assert weighting.state() == {}  # no aggregator for them
    encoder = gradients(weighting, network, network.losses())[1][0]
    expected_encoder = gradients(plain, network, network.losses())[1][0]
    assert encoder is not None
    assert expected_encoder is not None
    assert not torch.allclose(encoder, expected_encoder)


def test_pcd_combines_some_of_the_heads_where_the_first_is_among_them() -> None:
    network, weighting = Net(), built("pcd")
    gradients(weighting, network, network.losses(("a", "c")))
    assert set(weighting.state()) == {"a c"}


@pytest.mark.parametrize("name", ["config", "aligned_mtl"])
def test_what_an_aggregator_holds_is_on_the_device_of_the_gradients(name: str) -> None:
    weighting = built(name, pref_vector={"a": 1.0, "b": 2.0, "c": 3.0})
    assert isinstance(weighting, Aggregated)
    for heads in (HEADS, HEADS[:2]):
        buffers = list(weighting._aggregator(heads, META).buffers())
        assert buffers
        assert all(buffer.device == META for buffer in buffers)


@pytest.mark.parametrize(
    ("name", "on_device"),
    [("excess_mtl", True), ("gradvac", False), ("pcd", False)],
)
def test_a_resumed_aggregator_is_on_the_device_of_the_gradients_or_stays_on_the_cpu(
    name: str, on_device: bool
) -> None:
    network, weighting, resumed = Net(), built(name), built(name)
    assert isinstance(resumed, Aggregated)
    gradients(weighting, network, network.losses())
    resumed.load_state(weighting.state())
    assert resumed.state().keys() == weighting.state().keys()  # also before its first step
    aggregator = resumed._aggregator(HEADS, META)
    tensors = [b for b in aggregator.buffers() if b is not None]
    assert tensors
    assert all((tensor.device == META) == on_device for tensor in tensors)
    if on_device:  # with another device it would begin again
        weights: Any = aggregator.weighting
        assert META in weights._state_key


# ---- wrong use --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["geometric", "focused", "famo", "gradnorm"])
@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_loss_that_has_to_be_positive_is_named(name: str, value: float) -> None:
    text = rf"weighting '{name}': got {value:g} as the loss of head 'b', expected more than 0"
    with pytest.raises(TaskrayError, match=text):
        weights_of(built(name), 1.0, value, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_is_found_as_one(name: str) -> None:
    learned = Learned(Net(), {}, built(name))
    optimization = Optimization(learned, OptimizerConfig(), 10)
    losses = learned.network.losses()
    losses["b/mse"] = losses["b/mse"] * float("nan")
    with pytest.raises(NotFinite, match="the loss is not finite"):
        optimization.descend(losses, 0, checked=True)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pcgard", {}, r": unknown weighting 'pcgard'; did you mean 'pcgrad'\?"),
        ("dwa", {"temperature": 0}, r"\.temperature: got 0, expected more than 0"),
        ("uncertainty", {"shape": 2}, r"\.shape: unknown key"),
        ("focused", {"focus": ["d"]}, r"\.focus: no head 'd', expected some of a, b, c"),
        ("fixed", {"weights": {"d": 2}}, r"\.weights\.d: no such head, expected one of a, b, c"),
        ("cosmos", {"weights": {"a": 1, "b": 2}}, r"\.weights\.c: required, but not given"),
        ("stch", {"mu": -1}, r": .*mu.* should be strictly positive"),
        ("krum", {"n_byzantine": 1}, r": .*at least 4 rows"),
        ("fairgrad", {}, r"\.alpha: required, but not given"),
    ],
)
def test_a_wrong_weighting_is_refused_when_it_is_built(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    given = {k: v for k, v in REQUIRED.get(name, {}).items() if arguments} | arguments
    with pytest.raises(InputError, match=rf"^tasks\.x\.weighting{message}"):
        plugins.build("weighting", name, given, "tasks.x.weighting", heads=HEADS)


# ---- in a job ---------------------------------------------------------------------------------


def weighted_job(weighting: Any, steps: int = 4, **task: Any) -> Job:
    values = two_datasets({"depth": "near", "normals": "near"}).model_dump(mode="json")
    values["tasks"]["scene"] |= {"weighting": weighting, **task}
    return Job.model_validate({**values, "steps": steps})


def test_a_job_with_a_wrong_weighting_is_refused_before_it_starts() -> None:
    with pytest.raises(InputError, match=r"tasks\.scene\.weighting: .* did you mean 'uncertainty'"):
        check(weighted_job("uncertanty"))
    with pytest.raises(InputError, match=r"tasks\.scene\.weighting\.focus: no head 'edges'"):
        check(weighted_job({"name": "focused", "focus": ["edges"]}))


def test_the_heads_of_a_weighting_are_those_with_labels() -> None:
    job = two_datasets({"depth": "near"})
    task = build_task(job, "scene")
    assert build_learned(job, "scene", task, []).weighting.heads == ("depth",)
    job = weighted_job("uncertainty")
    weights = build_learned(job, "scene", build_task(job, "scene"), []).weights()
    assert weights["weighting:scalarizer.log_var"].shape == (2,)


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "famo", "pcgrad"])
def test_a_run_with_bfloat16_and_clipping_goes_on_where_it_stopped(
    name: str, tmp_path: Path
) -> None:
    optimizer = {"clip_norm": 1.0, "schedule": "constant"}
    task = {"precision": "bfloat16", "optimizer": optimizer}
    weighting = {"name": name, "window": 1} if name == "gradnorm" else name
    found = []
    for folder, lengths in (("whole", [6]), ("parts", [4, 6])):
        for steps in lengths:
            run(weighted_job(weighting, steps, **task), tmp_path / folder, inline=True)
        checkpoint = CheckpointStore(tmp_path / folder / "checkpoints").latest("scene")
        assert checkpoint is not None
        found.append(checkpoint.weights)
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=key)


def test_a_head_without_a_valid_label_in_a_batch_is_left_out_of_it() -> None:
    task = Multi({"depth": Depth(), "classes": Segmentation(num_classes=3)})
    depth, classes = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    image = torch.zeros(2, 3, 4, 4)

    def left(depth: Tensor, classes: Tensor) -> set[str]:
        columns = {"image": image, "depth": depth, "segmentation": classes}
        (batch,) = without_empty_labels([Batch(columns)], task)
        return set(batch.tensors)

    nothing, ignored = torch.zeros_like(depth), torch.full_like(classes, IGNORE)
    assert left(depth, classes) == {"image", "depth", "segmentation"}
    assert left(nothing, classes) == {"image", "segmentation"}
    assert left(depth, ignored) == {"image", "depth"}
    assert left(nothing, ignored) == {"image", "depth", "segmentation"}
    assert left(depth.index_fill(0, torch.tensor(0), 0.0), classes) == {
        "image", "depth", "segmentation",
    }  # fmt: skip
