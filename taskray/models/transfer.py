"""A network from one task's prediction to another's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskray.models.blocks import double_conv
from taskray.models.frames import resize
from taskray.models.heads import Head


class TransferNet(nn.Module):
    """The task-transfer network of XTasC-Net: a U-Net whose blocks are two 3x3 convolutions with
    ReLU and no normalisation, each on the contracting path followed by max pooling, each on the
    expansive path by doubling the size; then a 1x1 convolution.

    The map at each size is joined with the block's of the same size on the contracting path, as in
    a U-Net. The paper has "similar to U-Net"; its public code joins nothing, so what it predicts is
    a blur of 8 x 8 pixels.

    Args:
        in_channels: of the prediction.
        out_channels: of the other task's network.
        widths: channels of the contracting blocks; the expansive ones mirror them.
    """

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int] = (64, 128, 256)
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            double_conv(before, width, "none") for before, width in pairwise([in_channels, *widths])
        )
        coarse_to_fine = [*reversed(widths)]
        befores = [widths[-1], *(2 * width for width in coarse_to_fine[:-1])]
        self.up = nn.ModuleList(
            double_conv(before, width, "none")
            for before, width in zip(befores, coarse_to_fine, strict=True)
        )
        self.last = Head(2 * widths[0], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, out_channels, H, W]`` from ``[B, in_channels, H, W]``, at any size."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2, ceil_mode=True)
        for block in self.up:
            skip = skips.pop()
            x = torch.cat([skip, resize(block(x), skip.shape[-2:])], dim=1)
        last: Tensor = self.last(x)
        return last
