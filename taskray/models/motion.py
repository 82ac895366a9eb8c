"""A network for the motion between two frames: of the camera, and of the things that move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from taskray.errors import InputError
from taskray.geometry.camera import pixel_grid
from taskray.models.blocks import double_conv, normalisation
from taskray.models.frames import pad_to_multiple, resize, standardize
from taskray.models.heads import by_head

PLACE = 2
CAMERA, FIELD = 6, 3
"""Channels of a camera motion (axis-angle, translation) and of a motion field."""


class MotionNet(nn.Module):
    """Two frames, stacked on channels, through one encoder, to a camera motion, a motion field,
    or both (after Gordon et al., ICCV 2019).

    Besides the frames the encoder gets the result of matching them by colour (:class:`Matching`)
    and the position of each pixel: a turn and a step aside differ in how the image moves in
    different places. A small network that must learn to match by itself needs many times the
    steps.

    Each level halves the frame. The camera's six numbers are a linear function of the mean over
    the deepest level. The field begins there, the same at every pixel, and is refined at each finer
    level: enlarged, joined with that level's features, and corrected. At the beginning of training
    both outputs are close to 0: no motion.

    The two frames are scaled to mean 0 and deviation 1 together, so that a change of brightness
    between them stays visible.

    Args:
        in_channels: channels of the two frames together.
        out_channels: by head; a head of 6 channels is a camera motion, one of 3 a motion field.
            One of each at most.
        base: channels of the first level, a multiple of 8; each level has twice the one before,
            up to 8 times as many.
        depth: number of levels.
        norm: ``group`` (groups of 8 channels) or ``batch``.
        radius: pixels that the matching looks to each side, at each scale.
        scales: of the matching, each of half the size: movements of up to
            ``radius * 2 ** (scales - 1)`` pixels are matched. 0 for no matching.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        base: Annotated[int, Field(ge=8, multiple_of=8)] = 16,
        depth: Annotated[int, Field(ge=2)] = 5,
        norm: Literal["group", "batch"] = "group",
        radius: Annotated[int, Field(ge=1)] = 2,
        scales: Annotated[int, Field(ge=0)] = 2,
    ) -> None:
        super().__init__()
        self.matching = nn.ModuleList(Matching(radius, 2**scale) for scale in range(scales))
        in_channels += PLACE + scales * Matching.channels
        kinds = list(out_channels.values())
        if not kinds or len(set(kinds)) < len(kinds) or not {CAMERA, FIELD} >= set(kinds):
            raise InputError(
                "motion_net",
                f"got heads of {', '.join(map(str, kinds))} channels, "
                f"expected {CAMERA} (a camera motion), {FIELD} (a motion field) or one of each",
            )
        self.heads = dict(out_channels)
        self.multiple = 2**depth
        widths = [base * min(2**level, 8) for level in range(depth)]
        self.encoder = nn.ModuleList(
            _halving(before, width, norm)
            for before, width in zip([in_channels, *widths], widths, strict=False)
        )
        self.camera = nn.Linear(widths[-1], CAMERA) if CAMERA in kinds else None
        self.first_field = nn.Linear(widths[-1], FIELD) if FIELD in kinds else None
        self.refinements = nn.ModuleList(
            _Refinement(width, norm)
            for width in (reversed([in_channels, *widths[:-1]]) if self.first_field else ())
        )

    def forward(self, frames: Tensor) -> Tensor | dict[str, Tensor]:
        """The camera motion ``[B, 6]`` (axis-angle, translation) or the motion field
        ``[B, 3, H, W]``, or both by head, from ``[B, in_channels, H, W]``."""
        height, width = frames.shape[-2:]
        frames = standardize(frames)
        first, second = frames.chunk(2, dim=1)
        x = torch.cat([frames, _places(frames), *(m(first, second) for m in self.matching)], dim=1)
        features = [pad_to_multiple(x, self.multiple)]
        for block in self.encoder:
            features.append(block(features[-1]))
        pooled = features.pop().float().mean(dim=(2, 3))
        output = {}  # by kind of head
        # bfloat16 would round the motion to a part in 256
        with torch.autocast(frames.device.type, enabled=False):
            if self.camera is not None:
                output[CAMERA] = self.camera(pooled)
            field = None
            if self.first_field is not None:
                field = self.first_field(pooled)[:, :, None, None]
        if field is not None:
            for refine in self.refinements:
                field = refine(field, features.pop())
            output[FIELD] = field[..., :height, :width]
        return by_head({head: output[channels] for head, channels in self.heads.items()})


def _places(frames: Tensor) -> Tensor:
    """Column and row of every pixel, from -1 to 1 across the frame, ``[B, 2, H, W]``."""
    height, width = frames.shape[-2:]
    size = frames.new_tensor([width, height])[:, None, None]
    places = (2 * pixel_grid(height, width, frames) + 1) / size - 1
    return places.expand(len(frames), 2, height, width)


class Matching(nn.Module):
    """Where the patches of frame 1 are found in frame 2, and how certain that is. Its one learned
    parameter is the sharpness of the softmax.

    Patches of 5x5 pixels are compared by mean squared difference at every displacement of up to
    ``radius`` pixels; a softmax over displacements gives the expected one (column, row; in units
    of the radius) and its certainty, the softmax's sum of squares. Channels: the displacement,
    the displacement times the certainty, the certainty.
    """

    channels = 5
    displacements: Tensor

    def __init__(self, radius: int, stride: int) -> None:
        super().__init__()
        self.radius, self.stride = radius, stride
        self.log_strictness = nn.Parameter(torch.tensor(2.0))
        steps = torch.arange(-radius, radius + 1) / radius
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        places = torch.stack([columns.flatten(), rows.flatten()])
        self.register_buffer("displacements", places, persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """``[B, 5, H, W]`` from two frames ``[B, C, H, W]``, of mean 0 and deviation 1."""
        height, width = first.shape[-2:]
        # whole cells only: else the resized map would be shifted against the frame
        first, second = (
            functional.avg_pool2d(pad_to_multiple(f, self.stride), self.stride)
            for f in (first, second)
        )
        cost = self._costs(first, second)
        cost = cost - cost.amin(dim=1, keepdim=True)
        contrast = cost.mean(dim=(1, 2, 3), keepdim=True) + 1e-3
        match = torch.softmax(-self.log_strictness.exp() * cost / contrast, dim=1)
        moved = torch.einsum("bdhw,cd->bchw", match, self.displacements)
        sure = match.square().sum(dim=1, keepdim=True)
        cells = torch.cat([moved, moved * sure, sure], dim=1)
        rows, columns = cells.shape[-2:]
        size = (rows * self.stride, columns * self.stride)
        return resize(cells, size)[..., :height, :width]

    def _costs(self, first: Tensor, second: Tensor) -> Tensor:
        """``[B, (2 r + 1)^2, h, w]``, displacements in rows."""
        height, width = first.shape[-2:]
        around = functional.pad(second, (self.radius,) * 4, mode="replicate")
        shifts = range(2 * self.radius + 1)
        costs = [
            (first - around[..., i : i + height, j : j + width]).square().mean(dim=1)
            for i in shifts
            for j in shifts
        ]
        return functional.avg_pool2d(
            torch.stack(costs, dim=1), 5, stride=1, padding=2, count_include_pad=False
        )


class _Refinement(nn.Module):
    """The field at the size of finer features, corrected by a function of the two."""

    def __init__(self, features: int, norm: str) -> None:
        super().__init__()
        width = max(8, features // 8 * 8)
        self.block = double_conv(features + FIELD, width, norm)
        self.head = nn.Conv2d(width, FIELD, 1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, field: Tensor, features: Tensor) -> Tensor:
        field = resize(field, features.shape[-2:])
        correction: Tensor = self.head(self.block(torch.cat([field, features], dim=1)))
        return field + correction.float()


def _halving(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """A convolution of stride 2 and one of stride 1, each with normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
        normalisation(out_channels, norm),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        normalisation(out_channels, norm),
        nn.ReLU(inplace=True),
    )
