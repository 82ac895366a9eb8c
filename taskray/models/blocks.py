"""The convolutional blocks that networks are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def double_conv(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """Two times: 3x3 convolution, normalisation, ReLU. ``norm``: see :func:`normalisation`, or
    ``none``: a bias in its place."""
    layers: list[nn.Module] = []
    for before in (in_channels, out_channels):
        layers += [
            nn.Conv2d(before, out_channels, 3, padding=1, bias=norm == "none"),
            *([] if norm == "none" else [normalisation(out_channels, norm)]),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def convolved(
    in_channels: int, out_channels: int, norm: str, size: int = 1, dilation: int = 1
) -> nn.Sequential:
    """A convolution of ``size`` x ``size`` that keeps height and width, normalisation, ReLU."""
    padding = dilation * (size // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, padding=padding, dilation=dilation, bias=False),
        normalisation(out_channels, norm),
        nn.ReLU(inplace=True),
    )


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling [Chen et al. 2018]: a 1x1 convolution, a dilated 3x3 one for
    each rate, and the mean of the map, joined by a 1x1 convolution. Without dropout.

    Args:
        in_channels: channels of the map.
        out_channels: channels of each branch and of the result, a multiple of 8.
        rates: dilations, in pixels of the map.
        norm: ``group`` or ``batch``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, rates: Sequence[int], norm: str
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                convolved(in_channels, out_channels, norm),
                *(convolved(in_channels, out_channels, norm, 3, rate) for rate in rates),
            ]
        )
        self.pooled = convolved(in_channels, out_channels, norm)
        self.join = convolved((2 + len(rates)) * out_channels, out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, out_channels, H, W]`` from ``[B, in_channels, H, W]``."""
        mean = self.pooled(functional.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[-2:])
        joined: Tensor = self.join(torch.cat([*(b(x) for b in self.branches), mean], dim=1))
        return joined


def normalisation(channels: int, norm: str) -> nn.Module:
    """``group``: groups of 8 channels; ``batch``: over the batch."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels // 8, channels)
