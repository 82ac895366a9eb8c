"""A small U-Net, for training from scratch on a CPU."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from taskray.models.frames import pad_to_multiple

Positive = Annotated[int, Field(ge=1)]


class UNet(nn.Module):
    """U-Net [Ronneberger et al. 2015] of ``depth`` levels, each half as large as the one above
    and twice as wide.

    The image enters as patches, folded into channels, and the output leaves the same way. At
    64x96 a step with patches of 2 x 2 pixels takes a quarter of the time of one on single
    pixels, and in equal time the network errs less on the domain it was trained on.

    Each frame is first brought to mean 0 and deviation 1: brightness and contrast are what
    differs most between two domains.

    Takes frames of any height and width: they are padded to whole patches, and each level is
    brought back to the size of the one above it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        base: channels of the first level, a multiple of 8.
        depth: number of levels.
        patch: side of a patch in pixels; 1 is the plain U-Net.
        norm: ``group`` (groups of 8 channels) or ``batch``. A task alternates between its own
            and the mediator's frames, often of another domain: the running statistics of batch
            normalisation would mix the two, and fit neither at test time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base: Annotated[int, Field(ge=8, multiple_of=8)] = 16,
        depth: Positive = 4,
        patch: Positive = 2,
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        super().__init__()
        self.patch = patch
        widths = [base * 2**level for level in range(depth)]
        self.encoder = nn.ModuleList(
            double_conv(before, width, norm)
            for before, width in zip([in_channels * patch**2, *widths], widths, strict=False)
        )
        self.decoder = nn.ModuleList(
            double_conv(width + 2 * width, width, norm) for width in widths[:-1]
        )
        self.head = nn.Conv2d(base, out_channels * patch**2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, out_channels, H, W]`` from ``[B, in_channels, H, W]``."""
        height, width = image.shape[-2:]
        image = pad_to_multiple(standardize(image), self.patch)
        x = functional.pixel_unshuffle(image, self.patch)
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(functional.max_pool2d(x, 2, ceil_mode=True) if level else x)
            skips.append(x)
        x = skips.pop()
        for block in reversed(self.decoder):
            skip = skips.pop()
            x = block(torch.cat([skip, functional.interpolate(x, skip.shape[-2:])], dim=1))
        # bfloat16 rounds depth to half a per cent, which is what neighbouring pixels differ by
        with torch.autocast(x.device.type, enabled=False):
            output = self.head(x.float())
        return functional.pixel_shuffle(output, self.patch)[..., :height, :width]


def standardize(image: Tensor) -> Tensor:
    """Every frame of a batch ``[B, C, H, W]`` to mean 0 and deviation 1, colours kept. A frame of
    one colour becomes 0."""
    deviation = image.std(dim=(1, 2, 3), keepdim=True)
    return (image - image.mean(dim=(1, 2, 3), keepdim=True)) / (deviation + 0.02)


def double_conv(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """Twice: 3x3 convolution, normalisation, ReLU."""
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
