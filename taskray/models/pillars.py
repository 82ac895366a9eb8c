"""PointPillars (Lang et al. 2019): a network for point clouds that is fast, and all 2D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from taskray.geometry.grid import Grid
from taskray.models.heads import Head, by_head, of_head, per_head
from taskray.models.pillar_encoder import PillarEncoder

Positive = Annotated[int, Field(ge=1)]


class Pillars(nn.Module):
    """Pillar encoder, 2D backbone and a 1x1 head, as published; several heads share the backbone.

    Block k of the backbone has ``layers[k]`` 3x3 convolutions of ``2**k * channels`` channels, the
    first of which halves the map (except in the first block); each block's output is enlarged to
    the resolution of the first by a transposed convolution of ``2 * channels``, and the head gets
    all of them together. Every convolution is followed by batch normalisation and ReLU.

    Several sweeps pass the same encoder one by one, and the backbone gets their maps together.

    Args:
        in_channels: values of a point.
        out_channels: channels of the output, by head.
        grid: the cells of the output; the task's.
        frames: sweeps that the network gets together; the task's.
        channels: C of the paper; 64 as published.
        layers: convolutions of each block; 4, 6, 6 as published.
        pillars_per_cell: pillars along the side of an output cell. 1: every pillar has anchors
            (Taskology; published for pedestrians); 2: the first block halves the map as well
            (published for cars).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        grid: Grid,
        frames: Positive = 1,
        channels: Positive = 64,
        layers: Annotated[list[Positive], Field(min_length=1)] = [4, 6, 6],  # noqa: B006
        pillars_per_cell: Positive = 1,
    ) -> None:
        super().__init__()
        self.shape, self.frames = grid.shape, frames
        self.encoder = PillarEncoder(in_channels, channels, grid.split(pillars_per_cell))
        self.blocks, self.raises = nn.ModuleList(), nn.ModuleList()
        before = channels * frames
        for level, depth in enumerate(layers):
            width = channels * 2**level
            stride = 2 if level else pillars_per_cell
            parts = [_conv(before, width, stride), *(_conv(width, width) for _ in range(depth - 1))]
            self.blocks.append(nn.Sequential(*parts))
            self.raises.append(_raise(width, 2 * channels, 2**level))
            before = width
        self.head_names = tuple(out_channels)
        self.head = per_head(out_channels, lambda count: Head(2 * channels * len(layers), count))

    def forward(self, points: Tensor) -> Tensor | dict[str, Tensor]:
        """``[B, channels, Y, X]`` of the one head, or of each by name, from sweeps
        ``[B, P, in_channels]``, or ``[B, frames, P, in_channels]`` of several."""
        x = self.encoder(points.flatten(0, -3))
        if self.frames > 1:
            x = x.reshape(-1, self.frames * x.shape[1], *x.shape[2:])
        raised = []
        for block, up in zip(self.blocks, self.raises, strict=True):
            x = block(x)
            # halving rounds odd sizes up, so the enlarged map may have a row or column too many
            raised.append(up(x)[..., : self.shape[0], : self.shape[1]])
        x = torch.cat(raised, dim=1)
        return by_head({head: of_head(self.head, head)(x) for head in self.head_names})


def _conv(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width, eps=1e-3), nn.ReLU(inplace=True))


def _raise(before: int, width: int, factor: int) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(before, width, factor, factor, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width, eps=1e-3), nn.ReLU(inplace=True))
