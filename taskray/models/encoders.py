"""Encoders: EfficientNet-Lite0 and the backbones of Hugging Face ``transformers``, which return
features at several sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from taskray.errors import InputError, one_line
from taskray.models import efficientnet
from taskray.models.pretrained import (
    IMAGENET,
    Standardize,
    load_weights,
    new_config,
    stored_config,
    stored_statistics,
)

RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2]},
    "resnet34": {"layer_type": "basic", "depths": [3, 4, 6, 3]},
    "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]},
}
BASIC_WIDTHS = [64, 128, 256, 512]


def load_encoder(
    backbone: str, in_channels: int, arguments: dict[str, Any], pretrained: str | None
) -> tuple[nn.Module, nn.Module]:
    """As :func:`load_backbone`, with the weights that ``pretrained`` names
    (:class:`taskray.models.encoder_decoder.EncoderDecoder`)."""
    lite = backbone == efficientnet.NAME
    if pretrained == "imagenet" and not lite:
        raise InputError(
            "pretrained",
            f"got 'imagenet' with backbone {backbone!r}, expected {efficientnet.NAME!r} or a path",
        )
    if pretrained and in_channels != 3:
        raise InputError(
            "pretrained", f"got an input of {in_channels} channels, expected 3, red, green and blue"
        )
    encoder: nn.Module
    if lite:
        if arguments:
            raise InputError("config", f"got {arguments}, expected none for {backbone!r}")
        encoder = efficientnet.EfficientNetLite0(in_channels)
        standardize: nn.Module = Standardize([efficientnet.MEAN], [efficientnet.DEVIATION])
    else:
        encoder, standardize = load_backbone(backbone, in_channels, arguments)
        if pretrained:
            standardize = Standardize(*IMAGENET)
    if pretrained:
        source = str(efficientnet.imagenet_weights()) if pretrained == "imagenet" else pretrained
        load_weights(encoder, source, "pretrained")
    return encoder, standardize


def load_backbone(
    backbone: str, in_channels: int, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, nn.Module]:
    """The encoder, which returns the features of all its stages, and the module that its input
    must pass first (:func:`taskray.models.pretrained.stored_statistics`)."""
    if backbone in RESNETS or backbone in {c.model_type for c in MODEL_FOR_BACKBONE_MAPPING}:
        model_type = "resnet" if backbone in RESNETS else backbone
        settings = {**RESNETS.get(backbone, {}), "num_channels": in_channels, **arguments}
        if settings.get("layer_type") == "basic":
            settings.setdefault("hidden_sizes", BASIC_WIDTHS)
        stages = stage_names(new_config(model_type, "backbone", settings), backbone)
        config = new_config(model_type, "backbone", {**settings, "out_features": stages})
        try:
            return AutoBackbone.from_config(config), nn.Identity()
        except Exception as error:  # a network's code may raise anything for its arguments
            raise InputError("backbone", f"cannot build {backbone!r}: {one_line(error)}") from None
    config = stored_config(backbone, "backbone", **arguments)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise InputError(
            "backbone", f"got {backbone}, a {config.model_type!r} model, expected a backbone"
        )
    config = stored_config(
        backbone, "backbone", **arguments, out_features=stage_names(config, backbone)
    )
    try:  # AutoBackbone.from_pretrained asks the hub whether the name exists; the class does not
        encoder = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
            backbone, config=config, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError("backbone", f"weights of {backbone!r}: {one_line(error)}") from None
    return encoder, stored_statistics(backbone)


def stage_names(config: PreTrainedConfig, backbone: str) -> list[str]:
    """The stages whose features are used: all but the stem, which is the input of the first."""
    names = [n for n in getattr(config, "stage_names", None) or [] if n != "stem"]
    if not names:
        raise InputError("backbone", f"{backbone!r} names no stages to take features from")
    return names


@torch.no_grad()
def feature_channels(
    encoder: nn.Module, in_channels: int, multiple: int, backbone: str
) -> tuple[list[int], bool]:
    """Channels of each feature, finest first, and whether the finest has half the size of the
    frame; from one pass over a small frame: some configurations misstate them."""
    frame = torch.zeros(1, in_channels, 2 * multiple, 3 * multiple)
    training = encoder.training
    try:
        features = encoder.eval()(frame).feature_maps
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "backbone",
            f"{backbone!r} does not take {in_channels} channels of any frame size: "
            f"{one_line(error)}",
        ) from None
    encoder.train(training)
    channels = [feature.shape[1] for feature in features]
    return channels, features[0].shape[-1] == frame.shape[-1] // 2
