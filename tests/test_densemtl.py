"""Cross-task attention in closed form, networks with it, intermediate predictions, and edges."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from collectives import tiny_job
from rich.console import Console
from scenes import world_pairs
from torch import Tensor, nn

from taskray.errors import InputError, TaskrayError
from taskray.job import plugins
from taskray.models.densemtl import DenseMTL
from taskray.models.encoders import dilate
from taskray.models.task_exchange import (
    CorrelationAttention,
    Distillation,
    SelfAttention,
    TaskExchange,
)
from taskray.record.folder import read_panels
from taskray.run.train import train
from taskray.tasks.depth import Depth
from taskray.tasks.edges import Edges
from taskray.tasks.multi import Multi
from taskray.tasks.normals import Normals

TINY: dict[str, Any] = {
    "config": {
        "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
    "width": 16, "rates": [1, 2],
}  # fmt: skip
HEADS = {"segmentation": 4, "depth": 1, "normals": 3}


def network(heads: dict[str, int] = HEADS, **arguments: Any) -> DenseMTL:
    torch.manual_seed(0)
    built: DenseMTL = plugins.build(
        "model", "densemtl", TINY | arguments, "model", in_channels=3, out_channels=heads
    )
    return built


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def two_maps(channels: int = 8, size: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target, source = torch.randn(2, 2, channels, *size, generator=generator)
    return target, source


# ---- the blocks -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("reduction", [1, 2])
def test_spatial_attention_is_a_softmax_over_the_positions_of_the_source(reduction: int) -> None:
    torch.manual_seed(0)
    block = CorrelationAttention(8, reduction, "spatial")
    nn.init.normal_(block.alpha)
    target, source = two_maps(size=(4, 6))
    height, width = 4 // reduction, 6 // reduction
    pooled = source.unflatten(3, (width, reduction)).unflatten(2, (height, reduction))
    small = pooled.amax(dim=(3, 5))
    query = block.query(target[..., ::reduction, ::reduction])
    key, value = block.key(small), block.value(small)
    expected = torch.zeros_like(target)
    positions = list(itertools.product(range(height), range(width)))
    for b, (i, j) in itertools.product(range(2), positions):
        scores = [float(query[b, :, i, j] @ key[b, :, k, m]) / math.sqrt(8) for k, m in positions]
        total = sum(math.exp(score) for score in scores)
        for score, (k, m) in zip(scores, positions, strict=True):
            share = math.exp(score) / total * value[b, :, k, m] * block.alpha[:, 0, 0]
            for di, dj in itertools.product(range(reduction), repeat=2):
                expected[b, :, reduction * i + di, reduction * j + dj] += share
    torch.testing.assert_close(block(target, source), expected, atol=1e-5, rtol=1e-4)


def test_channel_attention_is_a_softmax_over_the_channels_of_the_source() -> None:
    torch.manual_seed(0)
    block = CorrelationAttention(8, 1, "channel")
    nn.init.ones_(block.alpha)
    target, source = two_maps()
    query, key, value = (
        p(x).flatten(2)
        for p, x in ((block.query, target), (block.key, source), (block.value, source))
    )
    scores = torch.einsum("bin,bjn->bij", query, key) / math.sqrt(35)
    expected = torch.einsum("bij,bjn->bin", scores.softmax(dim=2), value).view_as(target)
    torch.testing.assert_close(block(target, source), expected)


def test_where_a_head_looks_is_one_on_average() -> None:
    torch.manual_seed(0)
    block = CorrelationAttention(8, 2, "spatial")
    looks = block.attended(*two_maps())
    assert looks.shape == (2, 1, 3, 4)
    torch.testing.assert_close(looks.mean(dim=(1, 2, 3)), torch.ones(2))
    assert looks.std() > 0.01


def test_self_attention_is_a_masked_convolution() -> None:
    block = SelfAttention(8, 4)
    _, x = two_maps()
    nn.init.zeros_(block.mask.weight)
    torch.testing.assert_close(block(x), 0.5 * block.features(x))


@pytest.mark.parametrize("attention", ["spatial", "channel", "both"])
def test_without_self_attention_an_exchange_that_adds_changes_nothing_at_first(
    attention: Any,
) -> None:
    maps = dict(zip("ab", two_maps(16), strict=True))
    block = TaskExchange("ab", 16, 2, "add", attention, self_attention=False)
    for head, refined in block(maps).items():
        assert torch.equal(refined, maps[head])
        assert refined.shape == maps[head].shape
    full = TaskExchange("ab", 16, 2, "add", attention)
    assert not torch.equal(full(maps)["a"], maps["a"])


@pytest.mark.parametrize("fusion", ["add", "product", "concat"])
def test_an_exchange_fuses_what_it_found_with_the_heads_own_map(fusion: Any) -> None:
    maps = dict(zip("abc", (*two_maps(16), two_maps(16)[0]), strict=True))
    block = TaskExchange("abc", 16, 1, fusion)
    directions = block.directions["a"]
    found = [directions[s](maps["a"], maps[s]) for s in "bc"]
    joined = [maps["a"], *found] if fusion == "concat" else found
    residual = block.join["a"](torch.cat(joined, dim=1))
    expected = {
        "add": maps["a"] + residual, "product": maps["a"] * residual, "concat": residual,
    }[fusion]  # fmt: skip
    torch.testing.assert_close(block(maps)["a"], expected)


def test_the_distillation_adds_the_self_attention_of_every_other_head() -> None:
    maps = dict(zip("ab", two_maps(), strict=True))
    block = Distillation("ab", 8)
    refined = block(maps)
    torch.testing.assert_close(refined["a"], maps["a"] + block.sources["a"]["b"](maps["b"]))
    torch.testing.assert_close(refined["b"], maps["b"] + block.sources["b"]["a"](maps["a"]))


@pytest.mark.parametrize(
    ("heads", "channels", "millions"), [("ab", 128, 0.77), ("ab", 256, 3.09), ("abc", 128, 2.32),
                                        ("abc", 256, 9.26)],
)  # fmt: skip
def test_an_exchange_has_as_many_parameters_as_the_papers(
    heads: str, channels: int, millions: float
) -> None:
    with torch.device("meta"):
        block = TaskExchange(heads, channels)
    assert round(num_parameters(block) / 1e6, 2) == millions


# ---- networks ---------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    "mtl": {"exchange": "none", "skips": False, "coarsest": 8},
    "padnet": {"exchange": "pad", "skips": False, "coarsest": 8, "scales": [3]},
    "three ways": {"exchange": "pad", "scales": [2]},
    "ours": {},
    "no exchange": {"exchange": "none"},
    "every scale": {"scales": [4, 3, 2, 1]},
    "dilated": {"coarsest": 16, "scales": [4, 1]},
    "concat": {"fusion": "concat"},
    "product": {"fusion": "product"},
    "channel": {"attention": "channel"},
    "both": {"attention": "both"},
    "no correlation": {"attention": "none"},
    "no self-attention": {"self_attention": False},
    "one loss": {"multiscale": False},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_paper_takes_frames_of_any_size_and_trains(name: str) -> None:
    model = network(**ROWS[name])
    output = model(torch.rand(2, 3, 33, 50))
    sum(v.square().mean() for v in output.values()).backward()
    blocks = [model.blocks[k] for k in model.blocks]
    scales = {int(k) for k in model.sides}
    assert set(output) == {*HEADS, *(f"{h}@{s}" for h in HEADS for s in scales)}
    assert {v.shape[-2:] for v in output.values()} == {(33, 50)}
    assert bool(blocks) == (ROWS[name].get("exchange") != "none")
    assert bool(scales) == (bool(blocks) and name != "one loss")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()(torch.rand(1, 3, 64, 96))) == set(HEADS)


def test_the_loss_of_one_head_reaches_the_decoder_of_another_through_the_exchange() -> None:
    for exchange, reached in (("mteb", True), ("none", False)):
        model = network(exchange=exchange, multiscale=False)
        model(torch.rand(2, 3, 32, 64))["depth"].sum().backward()
        gradients = [p.grad for p in model.decoder["normals"].parameters()]
        assert any(g is not None and bool(g.any()) for g in gradients) == reached


def test_a_network_with_one_head_exchanges_nothing() -> None:
    model = network({"depth": 1})
    assert not model.blocks
    assert model(torch.rand(1, 3, 32, 64)).shape == (1, 1, 32, 64)


def test_the_report_shows_where_heads_look_in_each_other(tmp_path: Path) -> None:
    heads = {"depth": "depth", "edges": "edges"}
    job = tiny_job(
        "steps=2", "mediator=null", "consistency={}", "tasks.normals=null",
        f"tasks.depth.task={yaml.safe_dump({'name': 'multi', 'heads': heads})}",
        f"tasks.depth.model={yaml.safe_dump({'name': 'densemtl', **TINY})}",
    )  # fmt: skip
    result = train(job, tmp_path, inline=True, console=Console(quiet=True))
    assert result["status"] == "finished", result["error"]
    assert {"abs_rel", "f1", "ods_f1"} <= result["tasks"]["depth"]["metrics"].keys()
    found = read_panels(tmp_path)
    looks = found["depth/test/edges looks at depth/prediction"]
    assert looks.shape == found["depth/test/depth/prediction"].shape
    assert 0 <= looks.min() < looks.max() <= 1
    assert "depth: edges looks at depth on test" in (tmp_path / "report.html").read_text()
    assert network({"depth": 1}).pictures(torch.rand(1, 3, 32, 64)) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": [6]}, r"model\.scales: got \[6\], expected some of 5, 4, 3, 2, 1, each once"),
        ({"scales": [1, 1]}, r"model\.scales: got \[1, 1\]"),
        ({"scales": []}, r"model\.scales: got \[\]"),
        ({"skips": False}, r"model\.scales: got \[1\], expected some of 5, each once"),
        ({"attention": "none", "self_attention": False}, r"model\.attention: got none without"),
        ({"fusion": "prod"}, r"model\.fusion: got 'prod', expected 'add', 'concat' or 'product'"),
    ],
)
def test_an_exchange_that_cannot_be_is_refused_by_its_key(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        network(**arguments)


def test_a_dilated_encoder_sees_what_it_saw_before_at_every_position_that_it_kept() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
    )  # fmt: skip
    frame = torch.rand(1, 1, 32, 32)
    before = encoder(frame)
    dilate(encoder, {"0": 1, "1": 2, "2": 4}, 2)
    after = encoder(frame)
    assert after.shape[-1] == 2 * before.shape[-1]
    torch.testing.assert_close(after[..., ::2, ::2][..., 1:-1, 1:-1], before[..., 1:-1, 1:-1])
    assert network(coarsest=8).strides == [2, 4, 8, 8, 8]
    with pytest.raises(
        InputError, match=r"model\.coarsest: got 8, expected a stride that backbone"
    ):
        network(backbone="dinov2", coarsest=8, config={"hidden_size": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2})  # fmt: skip


# ---- intermediate predictions -----------------------------------------------------------------


def test_the_loss_of_a_head_is_its_final_one_plus_the_mean_over_scales() -> None:
    task = Multi({"depth": Depth(loss="l1"), "surface": Normals()})
    batch = world_pairs("sim", count=2)
    outputs = {
        f"{head}{scale}": torch.randn(2, channels, *batch["depth"].shape[-2:])
        for head, channels in task.out_channels.items()
        for scale in ("", "@1", "@2")
    }
    prediction = task.predict(outputs)
    assert tuple(prediction)[:2] == task.quantities
    assert {"depth@1", "depth@2", "normals@1", "normals@2"} < prediction.keys()
    loss = task.loss(prediction, batch)
    alone = {
        scale: Depth(loss="l1").loss({"depth": prediction[f"depth{scale}"]}, batch)["l1"]
        for scale in ("", "@1", "@2")
    }
    expected = alone[""] + (alone["@1"] + alone["@2"]) / 2
    torch.testing.assert_close(loss["depth/l1"], expected)
    assert set(loss) == {"depth/l1", "surface/cosine"}
    with pytest.raises(TaskrayError, match="returns depth, surface, other@1, expected a tensor"):
        task.predict({"depth": 0, "surface": 0, "other@1": 0})


# ---- edges ------------------------------------------------------------------------------------


def edges_of(*values: int) -> dict[str, Tensor]:
    return {"edges": torch.tensor(values, dtype=torch.uint8).reshape(1, 1, 1, -1)}


def probabilities(*values: float) -> dict[str, Tensor]:
    return {"edges": torch.tensor(values).reshape(1, 1, 1, -1)}


def test_the_loss_of_edges_is_the_weighted_cross_entropy_of_two_classes() -> None:
    output = torch.randn(2, 1, 4, 5)
    label = torch.randint(0, 2, (2, 1, 4, 5), dtype=torch.uint8)
    label[0, 0, 0, :3] = 255
    task = Edges(edge_weight=0.9)
    loss = task.loss(task.predict(output), {"edges": label})["cross_entropy"]
    two = torch.cat([torch.zeros_like(output), output], dim=1)
    expected = nn.functional.cross_entropy(
        two, label[:, 0].long(), weight=torch.tensor([0.1, 0.9]), ignore_index=255
    )
    torch.testing.assert_close(loss, expected)


def test_edges_without_a_label_have_a_loss_of_zero_with_a_gradient() -> None:
    output = torch.randn(1, 1, 1, 6, requires_grad=True)
    task = Edges()
    loss = task.loss(task.predict(output), edges_of(*[255] * 6))["cross_entropy"]
    loss.backward()
    assert loss == 0
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_edge_metrics_have_the_values_worked_out_by_hand() -> None:
    metric = Edges().metric()
    metric.update(probabilities(0.9, 0.55, 0.5, 0.3, 0.2, 1.0), edges_of(1, 0, 1, 0, 1, 255))
    values = {name: float(value) for name, value in metric.compute().items()}
    edges = 2 * 2 / (2 * 2 + 1 + 1)  # at 0.5: two found, one wrong, one missed
    others = 2 * 1 / (2 * 1 + 1 + 1)
    best = 2 * 3 / (2 * 3 + 2)  # at 0.2: all found, two wrong; at 0.6: 2 / 4
    assert values == pytest.approx({"f1": edges, "mean_f1": (edges + others) / 2, "ods_f1": best})


def test_edge_metrics_are_perfect_on_the_truth_of_the_world_and_nan_without_labels() -> None:
    label = world_pairs("sim", count=2)["edges"]
    assert 0.02 < float((label == 1).float().mean()) < 0.5
    metric = Edges().metric()
    metric.update({"edges": (label == 1).float()}, {"edges": label})
    assert {float(v) for v in metric.compute().values()} == {1.0}
    metric.reset()
    metric.update({"edges": torch.zeros_like(label, dtype=torch.float)},
                  {"edges": torch.full_like(label, 255)})  # fmt: skip
    assert all(value.isnan() for value in metric.compute().values())


def test_the_constant_edges_are_what_the_weighted_loss_is_least_for() -> None:
    task = Edges(edge_weight=0.8)
    labels = torch.tensor([1, 0, 0, 0], dtype=torch.uint8).reshape(4, 1, 1, 1)
    constant = task.constant()
    constant.update({"edges": labels})
    found = constant.predict({"image": torch.zeros(4, 3, 1, 1)})["edges"]
    best = float(task.loss({"edges": found}, {"edges": labels})["cross_entropy"])
    assert float(found[0]) == pytest.approx(0.8 / (0.8 + 0.2 * 3))
    for other in (0.9, 1.1):
        moved = {"edges": found * other}
        assert float(task.loss(moved, {"edges": labels})["cross_entropy"]) > best
