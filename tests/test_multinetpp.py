"""MultiNet++: one encoder for all frames, FCN-8 decoders, and the published number of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from predicting import predict
from scenes import world_pairs
from torch import Tensor, nn
from torch.nn import functional

from taskray.errors import InputError
from taskray.job import plugins
from taskray.models.decoders import FCN8Decoder, enlargement
from taskray.models.multinetpp import MultiNetPlusPlus
from taskray.tasks.task import Task

TINY = {
    "embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}  # fmt: skip
HEADS = {"segmentation": 5, "depth": 1, "motion_mask": 2}


def built(frames: int, heads: dict[str, int] | None = None, **arguments: Any) -> MultiNetPlusPlus:
    torch.manual_seed(0)
    model: MultiNetPlusPlus = plugins.build(
        "model", "multinetpp", {"config": TINY} | arguments, "model",
        in_channels=3 * frames, out_channels=heads or HEADS,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if ".score." in name:  # all 0, at which no frame makes a difference
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def number(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("fusion", ["concat", "sum"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_frames_of_any_size_give_each_head_a_map_of_that_size(frames: int, fusion: str) -> None:
    model = built(frames, fusion=fusion).train()
    for height, width in ((64, 96), (33, 50)):
        output = model(torch.rand(2, 3 * frames, height, width))
        assert {h: tuple(v.shape) for h, v in output.items()} == {
            h: (2, channels, height, width) for h, channels in HEADS.items()
        }
    sum(v.square().mean() for v in output.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_frame_goes_through_the_same_encoder() -> None:
    one, two = built(1), built(2)
    assert number(one.encoder) == number(two.encoder)
    first, second = torch.rand(2, 2, 3, 40, 60)
    pair = two.encode(torch.cat([first, second], dim=1))
    one.encoder.load_state_dict(two.encoder.state_dict())
    for joined, a, b in zip(pair, one.encode(first), one.encode(second), strict=True):
        torch.testing.assert_close(joined, torch.cat([a, b], dim=1))


def test_a_sum_of_frames_does_not_know_their_order_and_features_side_by_side_do() -> None:
    first, second = torch.rand(2, 1, 3, 64, 96)
    there, back = torch.cat([first, second], dim=1), torch.cat([second, first], dim=1)
    summed, joined = built(2, fusion="sum"), built(2)
    torch.testing.assert_close(summed(there)["depth"], summed(back)["depth"])
    assert not torch.allclose(joined(there)["depth"], joined(back)["depth"])
    assert number(summed.decoder) == number(built(1).decoder)
    one = built(1)
    for both, each in zip(summed.encode(torch.cat([first] * 2, 1)), one.encode(first), strict=True):
        torch.testing.assert_close(both, 2 * each)


def test_concatenation_becomes_a_sum_where_both_halves_of_the_weights_are_the_same() -> None:
    summed, joined = built(2, fusion="sum"), built(2)
    weights = {
        name: torch.cat([value, value], dim=1) if name.endswith("score.weight") else value
        for name, value in summed.state_dict().items()
    }
    joined.load_state_dict(weights)
    pair = torch.rand(2, 6, 64, 96)
    for head, value in summed(pair).items():
        torch.testing.assert_close(joined(pair)[head], value)


def test_the_weights_are_as_many_as_in_the_papers_table_2() -> None:
    """Exactly: thousands as printed, some of them cut off and not rounded."""
    heads = {"cityscapes": 20, "synthia": 13, "depth": 1, "motion": 2}
    printed = {
        1: {"synthia": 95_342, "depth": 3_878, "motion": 8_332, "cityscapes": 187_000},
        2: {"synthia": 141_934, "depth": 7_462, "motion": 15_500, "cityscapes": 258_680},
    }  # printed as 95.34K, 3.88K (3.87K), 8.33K, 0.18M; 0.14M, 7.46K, 15.50K, 0.26M
    with torch.device("meta"):
        channels = [512, 1024, 2048]  # of ResNet-50 at 1/8, 1/16 and 1/32
        for frames, expected in printed.items():
            found = {
                head: number(FCN8Decoder([frames * c for c in channels], scores))
                + number(nn.ConvTranspose2d(scores, scores, 16))
                for head, scores in heads.items()
            }
            assert found == expected
    model = MultiNetPlusPlus(6, {"depth": 1, "motion": 2}, backbone="resnet50")
    assert number(model.decoder["depth"]) + number(model.head["depth"]) == printed[2]["depth"]
    assert number(model.decoder["motion"]) + number(model.head["motion"]) == printed[2]["motion"]
    # printed as 23.58M. There the statistics of BatchNorm are counted, too, and convolutions before
    # it have a bias
    buffers = dict(model.encoder.named_buffers())
    statistics = sum(b.numel() for name, b in buffers.items() if "running" in name)
    assert number(model.encoder) + statistics + statistics // 2 == 23_587_712


@pytest.mark.parametrize("factor", [2, 8])
def test_an_enlargement_begins_as_the_bilinear_one(factor: int) -> None:
    x = torch.rand(2, 3, 5, 7)
    expected = functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    inner = slice(factor, -factor)  # torch repeats the border, a convolution fades to 0
    found = enlargement(3, factor)(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[..., inner, inner], expected[..., inner, inner])


def test_scores_begin_at_zero() -> None:
    model = MultiNetPlusPlus(6, HEADS, config=TINY)
    output = model(torch.rand(1, 6, 32, 64))
    assert not any(value.any() for value in output.values())
    sum((value - 1).square().mean() for value in output.values()).backward()
    assert all(model.decoder[head][0].score.weight.grad.any() for head in HEADS)


def test_outputs_are_float32_in_bfloat16_too() -> None:
    model = built(2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(1, 6, 32, 64))
    assert {value.dtype for value in output.values()} == {torch.float32}


def test_a_network_that_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(
        InputError, match=r"model: multinetpp: got an input of 4 channels, expected"
    ):
        plugins.build("model", "multinetpp", {}, "model", in_channels=4, out_channels=HEADS)
    vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    with pytest.raises(InputError, match=r"^model\.backbone: got 'dinov2' with features at 1/2, "):
        built(2, backbone="dinov2", config=vit)


def task_of(**heads: Any) -> Task:
    task: Task = plugins.build("task", "multi", {"heads": heads, "full_names": True}, "task")
    return task


def learnt(task: Task, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    losses = task.loss(predict(task, model, batch), batch)
    assert all(value.isfinite() for value in losses.values())
    return losses


def test_heads_of_one_frame_share_the_network_of_the_one_that_sees_a_pair() -> None:
    batch = world_pairs("sim", count=2, height=32, width=64)
    heads = {"segmentation": "segmentation", "depth": {"name": "depth", "loss": "huber"}}
    pair = task_of(**heads, motion_mask="motion_mask")
    single = task_of(**heads, motion_mask={"name": "motion_mask", "frames": 1})
    assert (pair.in_channels, single.in_channels) == (6, 3)
    assert pair.inputs == ("image", "image_2")
    for task, frames in ((pair, 2), (single, 1)):
        model = built(frames, dict(task.out_channels))
        assert set(learnt(task, model, batch)) == {
            "segmentation/cross_entropy", "depth/huber", "motion_mask/cross_entropy",
        }  # fmt: skip
        unlabelled = {name: values for name, values in batch.items() if name != "motion_mask"}
        assert "motion_mask/cross_entropy" not in learnt(task, model, unlabelled)


def test_a_metric_has_the_same_name_whatever_other_heads_there_are() -> None:
    batch = world_pairs("sim", count=2, height=32, width=64)
    names = {}
    for heads in (("motion_mask",), ("segmentation", "depth", "motion_mask")):
        task = task_of(**{head: head for head in heads})
        metric = task.metric()
        with pytest.warns(UserWarning, match="before the ``update``"):
            known = set(metric.compute())  # what a study may have as a column
        metric.update(predict(task, built(2, dict(task.out_channels)), batch), batch)
        names[heads] = set(metric.compute())
        assert names[heads] == known
    alone, together = names.values()
    assert alone == {
        f"motion_mask/{n}" for n in ("miou", "pixel_accuracy", "iou/still", "iou/moving")
    }
    assert alone | {"segmentation/miou", "depth/abs_rel"} <= together
