"""The convolutional blocks that networks are made of."""

from __future__ import annotations

from torch import nn


def double_conv(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """Two times: 3x3 convolution, normalisation, ReLU."""
    layers: list[nn.Module] = []
    for before in (in_channels, out_channels):
        layers += [
            nn.Conv2d(before, out_channels, 3, padding=1, bias=False),
            normalisation(out_channels, norm),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def normalisation(channels: int, norm: str) -> nn.Module:
    """``group``: groups of 8 channels; ``batch``: over the batch."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels // 8, channels)
