"""Encoders, which return features at several sizes: EfficientNet-Lite0, and the backbones of
Hugging Face ``transformers``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

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


def find_features(
    encoder: nn.Module, in_channels: int, multiple: int, backbone: str, coarsest: int | None
) -> tuple[list[int], list[int]]:
    """Channels and stride of each feature, finest first, from a pass over a frame: some
    configurations misstate them. The encoder is dilated to ``coarsest``, if it is given.
    """
    size = (1, in_channels, 2 * multiple, 3 * multiple)
    try:
        features, inputs = _strides_in(encoder, size)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "backbone",
            f"{backbone!r} does not take {in_channels} channels of any frame size: "
            f"{one_line(error)}",
        ) from None
    if coarsest is not None and features[-1][1] != coarsest:
        dilate(encoder, inputs, coarsest)
        with suppress(RuntimeError, ValueError):  # of a network that is not made of convolutions
            features, _ = _strides_in(encoder, size)
        if features[-1][1] != coarsest:
            raise InputError(
                "coarsest",
                f"got {coarsest}, expected a stride that backbone {backbone!r} can be dilated to",
            )
    channels, strides = zip(*features, strict=True)
    return list(channels), list(strides)


def dilate(encoder: nn.Module, inputs: Mapping[str, int], coarsest: int) -> None:
    """Keep all features at ``1 / coarsest`` of the frame or finer: convolutions make no step
    beyond it, and those after them are dilated instead, so that they see what they saw before. No
    weight changes its shape [DeepLab, Chen et al. 2018].

    Args:
        encoder: of convolutions.
        inputs: the stride of each convolution's input, by its name.
        coarsest: the largest stride, a power of 2.
    """
    for name, stride in inputs.items():
        module = encoder.get_submodule(name)
        if not isinstance(module, nn.Conv2d):
            continue
        if stride * module.stride[0] > coarsest:
            module.stride = (1, 1)
        if stride > coarsest and isinstance(module.padding, tuple):
            factor = stride // coarsest
            module.dilation = (factor * module.dilation[0], factor * module.dilation[1])
            module.padding = (factor * module.padding[0], factor * module.padding[1])


@torch.no_grad()
def _strides_in(
    encoder: nn.Module, size: Sequence[int]
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Channels and stride of each feature, and the stride of each convolution's input by its name,
    of a frame ``[1, in_channels, H, W]``."""
    inputs: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: inputs.update({name: round(size[-1] / given[0].shape[-1])})

    training = encoder.training
    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    # Not on the device "meta", which computes no values: its operators are in Python, and take
    # longer to import than this pass takes.
    try:
        features: Sequence[Tensor] = encoder.eval()(torch.zeros(*size)).feature_maps
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    return [(f.shape[1], round(size[-1] / f.shape[-1])) for f in features], inputs
