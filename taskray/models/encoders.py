"""Encoders, which return features at several sizes: EfficientNet-Lite0, and the backbones of
Hugging Face ``transformers``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from taskray.errors import InputError, one_line
from taskray.models import efficientnet
from taskray.models.weights import IMAGENET, Standardize, load_weights


def load_encoder(
    backbone: str, in_channels: int, arguments: dict[str, Any], pretrained: str | None
) -> tuple[nn.Module, nn.Module]:
    """The encoder, and the module that its input must pass first
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
        # importing transformers takes longer than importing torch
        from taskray.models.backbones import load_backbone

        encoder, standardize = load_backbone(backbone, in_channels, arguments)
        if pretrained:
            standardize = Standardize(*IMAGENET)
    if pretrained:
        source = str(efficientnet.imagenet_weights()) if pretrained == "imagenet" else pretrained
        load_weights(encoder, source, "pretrained")
    return encoder, standardize


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
