"""Networks that exchange features between heads: DenseMTL, PAD-Net and what they are compared
with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.models.decoders import AtrousDecoder
from taskray.models.encoded import Encoded
from taskray.models.heads import Head, at_scale, of_head, per_head
from taskray.models.task_exchange import Attention, Distillation, Fusion, TaskExchange

COMPARED_AT = 3
"""Positions are compared on maps of this scale, an eighth of the frame, or coarser: as published.
The cost of spatial attention is the square of the number of positions."""


class DenseMTL(Encoded):
    """A shared encoder, for each head a decoder with atrous spatial pyramid pooling, and blocks
    that exchange the decoders' maps [Lopes et al. 2022]. Its rows in the paper:

    | row | arguments |
    | --- | --- |
    | STL, MTL | ``exchange: none, skips: false``, with one head or several |
    | PAD-Net | ``exchange: pad, skips: false, scales: [coarsest]`` |
    | 3-ways_PAD-Net | ``exchange: pad, scales: [2]`` |
    | ours | the default |

    ``coarsest: 16`` or ``8`` is the paper's dilated encoder; frames of 64x96 need it without
    skips. What the heads return is enlarged from half the size of the frame, where the paper has
    one more step at full size.

    In training each block's maps give intermediate predictions, taken before the exchange
    (eq. 6); see :mod:`taskray.models.heads`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, by head.
        backbone, config, pretrained: see :class:`taskray.models.encoder_decoder.EncoderDecoder`.
        coarsest: stride of the coarsest feature: the encoder is dilated to it; null: its own.
        width: channels of the decoders, a multiple of 16.
        rates: dilations of the atrous spatial pyramid, in pixels of the coarsest feature. The
            published ones are for features of 36x28 pixels and more.
        skips: whether the decoders use the finer features.
        exchange: ``mteb``, the multi-task exchange block; ``pad``, the distillation of PAD-Net; or
            ``none``. A network with one head has none.
        scales: where the blocks are, as the number of times that the frame is halved; one of the
            decoders' sizes each.
        fusion, attention, self_attention: of ``mteb``; see
            :class:`taskray.models.task_exchange.TaskExchange`.
        multiscale: whether there are intermediate predictions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        backbone: str = "resnet18",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        coarsest: Literal[8, 16, 32] | None = None,
        width: Annotated[int, Field(ge=16, multiple_of=16)] = 64,
        rates: tuple[Annotated[int, Field(ge=1)], ...] = (6, 12, 18),
        skips: bool = True,
        exchange: Literal["mteb", "pad", "none"] = "mteb",
        scales: tuple[int, ...] = (1,),
        fusion: Fusion = "add",
        attention: Attention = "spatial",
        self_attention: bool = True,
        multiscale: bool = True,
    ) -> None:
        heads = tuple(out_channels)
        super().__init__(in_channels, heads, backbone, config, pretrained, coarsest)
        if attention == "none" and not self_attention:
            raise InputError("attention", "got none without self_attention, expected one of them")
        self.decoder = per_head(
            out_channels, lambda _: AtrousDecoder(self.channels, width, rates, skips)
        )
        self.head = per_head(out_channels, lambda channels: Head(width // 2, channels))
        self.scale_of_step: dict[int, int] = {}
        if exchange != "none" and len(heads) > 1:
            self.scale_of_step = self._steps_of(scales, skips)
        self.blocks = nn.ModuleDict(
            {
                str(scale): Distillation(heads, width)
                if exchange == "pad"
                else TaskExchange(
                    heads,
                    width,
                    2 ** max(0, COMPARED_AT - scale),
                    fusion,
                    attention,
                    self_attention,
                )
                for scale in self.scale_of_step.values()
            }
        )
        self.sides = nn.ModuleDict(
            {
                str(scale): nn.ModuleDict({h: Head(width, c) for h, c in out_channels.items()})
                for scale in (self.scale_of_step.values() if multiscale else ())
            }
        )
        self.train()

    def _steps_of(self, scales: tuple[int, ...], skips: bool) -> dict[int, int]:
        """The scale of each step of the decoders that a block follows: of steps at one scale, the
        last."""
        strides = reversed(self.strides if skips else self.strides[-1:])
        steps = {round(math.log2(stride)): step for step, stride in enumerate(strides)}
        if not scales or len(set(scales)) < len(scales) or not steps.keys() >= set(scales):
            raise InputError(
                "scales",
                f"got {list(scales)}, expected some of {', '.join(map(str, steps))}, each once",
            )
        return {steps[scale]: scale for scale in sorted(scales, reverse=True)}

    @torch.no_grad()
    def pictures(self, image: Tensor) -> dict[str, Tensor]:
        """Where each head looks in each other one, in the finest block with spatial attention, as
        maps ``[B, 1, H, W]`` from 0 to 1, the largest value of each image."""
        looks: dict[tuple[str, str], Tensor] = {}

        def note(block: nn.Module, given: tuple[Mapping[str, Tensor]]) -> None:
            if isinstance(block, TaskExchange):
                looks.update(block.attended(given[0]))

        hooks = [block.register_forward_pre_hook(note) for block in self.blocks.values()]
        self(image)
        for hook in hooks:
            hook.remove()
        height, width = image.shape[-2:]
        return {
            f"{target} looks at {source}": self.to_frame(
                x / x.amax(dim=(1, 2, 3), keepdim=True), height, width
            )
            for (target, source), x in looks.items()
        }

    def intermediate(self, step: int, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = self.scale_of_step.get(step)
        if scale is None or not self.sides:
            return {}
        sides = self.sides[str(scale)]
        return {at_scale(h, scale): of_head(sides, h)(x) for h, x in maps.items()}

    def exchange(self, step: int, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        if step not in self.scale_of_step:
            return maps
        refined: dict[str, Tensor] = self.blocks[str(self.scale_of_step[step])](maps)
        return refined
