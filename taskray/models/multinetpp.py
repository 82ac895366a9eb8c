"""MultiNet++ (Chennupati et al., CVPR workshops 2019): one or more frames through one encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.models.decoders import FCN8Decoder, enlargement
from taskray.models.encoded import Encoded
from taskray.models.heads import per_head

COLOURS = 3
"""Channels of a frame."""
STRIDES = (8, 16, 32)
"""Of the features that the decoders use."""


class MultiNetPlusPlus(Encoded):
    """The frames, stacked on channels, each through the same encoder; their features joined; for
    each head an FCN-8 decoder, whose outputs are enlarged eight times:

        frame 1 ─▶ encoder ─┐
                            ├─ concat or sum ─┬─▶ FCN-8 a ─▶ enlarge x8 ──▶ a
        frame 2 ─▶ encoder ─┘                 └─▶ FCN-8 b ─▶ enlarge x8 ──▶ b

    All frames go through the encoder as one batch. The number of parameters is that of the paper's
    Table 2.

    Args:
        in_channels: 3 for each frame.
        out_channels: channels of the output, by head.
        backbone, config, pretrained: see :class:`taskray.models.encoder_decoder.EncoderDecoder`;
            a backbone with features at 1/8, 1/16 and 1/32 of the frame (``resnet50`` in the paper).
        fusion: how the features of the frames are joined: ``concat`` (channels, as in the paper's
            Figure 2 and Table 2) or ``sum`` (as in its Figure 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        backbone: str = "resnet18",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        fusion: Literal["concat", "sum"] = "concat",
    ) -> None:
        if in_channels % COLOURS:
            raise InputError(
                "multinetpp", f"got an input of {in_channels} channels, expected 3 for each frame"
            )
        super().__init__(COLOURS, tuple(out_channels), backbone, config, pretrained)
        if tuple(self.strides[-3:]) != STRIDES:
            found = ", ".join(f"1/{stride}" for stride in self.strides)
            raise InputError(
                "backbone",
                f"got {backbone!r} with features at {found}, expected 1/8, 1/16 and 1/32 last",
            )
        self.frames, self.fusion = in_channels // COLOURS, fusion
        times = self.frames if fusion == "concat" else 1
        channels = [times * c for c in self.channels[-3:]]
        self.decoder = per_head(out_channels, lambda scores: FCN8Decoder(channels, scores))
        self.head = per_head(out_channels, Enlarged)
        self.train()

    def encode(self, image: Tensor) -> list[Tensor]:
        """The joined features at 1/8, 1/16 and 1/32 of frames ``[B, 3 * frames, H, W]``."""
        each = super().encode(image.reshape(-1, COLOURS, *image.shape[-2:]))
        by_frame = [feature.reshape(-1, self.frames, *feature.shape[1:]) for feature in each[-3:]]
        return [f.sum(dim=1) if self.fusion == "sum" else f.flatten(1, 2) for f in by_frame]

    def to_frame(self, output: Tensor, height: int, width: int) -> Tensor:
        return output[..., :height, :width]


class Enlarged(nn.Module):
    """The last layer of FCN-8s, in float32 also under autocast: scores ``[B, C, H, W]`` to
    ``[B, C, 8 * H, 8 * W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enlarge = enlargement(channels, STRIDES[0])

    def forward(self, scores: Tensor) -> Tensor:
        with torch.autocast(scores.device.type, enabled=False):
            enlarged: Tensor = self.enlarge(scores.float())
            return enlarged
