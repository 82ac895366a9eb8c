"""A network for the motion between two frames: of the camera, and of whatever else moves."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.geometry.camera import pixel_grid
from taskray.models.frames import pad_to_multiple, resize
from taskray.models.unet import double_conv, normalisation, standardize

CAMERA, FIELD = 6, 3
"""Channels of a camera motion (axis-angle, translation) and of a motion field."""


class MotionNet(nn.Module):
    """Two frames, stacked on channels, through one encoder, to a camera motion, a motion field,
    or both (after Gordon et al., ICCV 2019).

    Each level halves the frame. The camera's six numbers are a linear function of the mean over
    the deepest level. The field begins there as a constant one and is refined at each finer
    level: enlarged, joined by that level's features, and corrected. At the beginning of training
    both outputs are close to 0: no motion.

    The two frames are brought to mean 0 and deviation 1 together, so that a change of brightness
    between them stays visible. Two more channels say where a pixel lies: what tells a turn from a
    step aside is how the image moves in different places.

    Args:
        in_channels: channels of the two frames together.
        out_channels: 6 for the camera's motion, 3 for the field, 9 for both (the task says).
        base: channels of the first level, a multiple of 8; each level has twice the one before,
            up to 8 times as many.
        depth: number of levels.
        norm: ``group`` (groups of 8 channels) or ``batch``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base: Annotated[int, Field(ge=8, multiple_of=8)] = 16,
        depth: Annotated[int, Field(ge=2)] = 5,
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        super().__init__()
        in_channels += 2
        if out_channels not in (CAMERA, FIELD, CAMERA + FIELD):
            raise InputError(
                f"motion_net gives 6 channels (camera), 3 (field) or 9 (both), not {out_channels}"
            )
        self.multiple = 2**depth
        widths = [base * min(2**level, 8) for level in range(depth)]
        self.encoder = nn.ModuleList(
            _halving(before, width, norm)
            for before, width in zip([in_channels, *widths], widths, strict=False)
        )
        self.camera = nn.Linear(widths[-1], CAMERA) if out_channels != FIELD else None
        self.first = nn.Linear(widths[-1], FIELD) if out_channels != CAMERA else None
        self.refinements = nn.ModuleList(
            _Refinement(width, norm)
            for width in (reversed([in_channels, *widths[:-1]]) if self.first else ())
        )

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """``camera`` ``[B, 6]`` and ``field`` ``[B, 3, H, W]``, as far as asked for, from
        ``[B, in_channels, H, W]``."""
        height, width = frames.shape[-2:]
        x = torch.cat([standardize(frames), _places(frames)], dim=1)
        features = [pad_to_multiple(x, self.multiple)]
        for block in self.encoder:
            features.append(block(features[-1]))
        pooled = features.pop().float().mean(dim=(2, 3))
        output = {}
        # bfloat16 would round the motion to a part in 256
        with torch.autocast(frames.device.type, enabled=False):
            if self.camera is not None:
                output["camera"] = self.camera(pooled)
            field = None if self.first is None else self.first(pooled)[:, :, None, None]
        if field is not None:
            for refine in self.refinements:
                field = refine(field, features.pop())
            output["field"] = field[..., :height, :width]
        return output


def _places(frames: Tensor) -> Tensor:
    """Column and row of every pixel, from -1 to 1 across the frame, ``[B, 2, H, W]``."""
    height, width = frames.shape[-2:]
    size = frames.new_tensor([width, height])[:, None, None]
    places = (2 * pixel_grid(height, width, frames) + 1) / size - 1
    return places.expand(len(frames), 2, height, width)


class _Refinement(nn.Module):
    """The field at the size of finer features, corrected by what they show."""

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
