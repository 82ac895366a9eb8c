"""Blocks that exchange features between the decoders of several heads: PAD-Net [Xu et al. 2018]
and the multi-task exchange block of DenseMTL [Lopes et al. 2022, section 3].

A block is called with the maps of all heads, ``{head: [B, C, H, W]}``, all of one size, and
returns refined ones of the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskray.models.blocks import convolved

Attention = Literal["spatial", "channel", "both", "none"]
Fusion = Literal["add", "concat", "product"]


class SelfAttention(nn.Module):
    """A 3x3 convolution times the sigmoid of another one (DenseMTL eq. 3).

    Args:
        channels: of the map.
        out_channels: of the result.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.mask = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, out_channels, H, W]`` from ``[B, channels, H, W]``."""
        result: Tensor = self.features(x) * torch.sigmoid(self.mask(x))
        return result


class CorrelationAttention(nn.Module):
    """Features of a source head where they correlate with those of a target head (DenseMTL eq.
    1-2), times a weight for each channel that is 0 at first (eq. 4).

    Query, key and value are 1x1 convolutions with normalisation and ReLU: the query of the target,
    reduced by its nearest pixels, key and value of the source, reduced by maxima. The softmax is
    over the source's positions, or over its channels. The result is enlarged by nearest pixels.

    Args:
        channels: of both maps, a multiple of 8.
        reduction: how many times smaller the maps are made.
        over: ``spatial``: every position of the target attends to positions of the source;
            ``channel``: every channel to channels.
    """

    def __init__(self, channels: int, reduction: int, over: Literal["spatial", "channel"]) -> None:
        super().__init__()
        self.reduction, self.over = reduction, over
        self.query = convolved(channels, channels, "group")
        self.key = convolved(channels, channels, "group")
        self.value = convolved(channels, channels, "group")
        self.alpha = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """``[B, C, H, W]`` from two maps of that shape."""
        query, key, value, size = self._projections(target, source)
        if self.over == "spatial":
            query, key, value = query.mT, key.mT, value.mT
        found = functional.scaled_dot_product_attention(query, key, value)
        if self.over == "spatial":
            found = found.mT
        found = found.reshape(*target.shape[:2], *size)
        return self.alpha * functional.interpolate(found, target.shape[-2:])

    @torch.no_grad()
    def attended(self, target: Tensor, source: Tensor) -> Tensor:
        """How much each position of the source is attended to, ``[B, 1, h, w]`` at the reduced
        size: the mean of the attention over the target's positions, times the number of positions,
        so that 1 is even. For ``spatial`` attention."""
        query, key, _, size = self._projections(target, source)
        weights = torch.softmax(query.mT @ key / math.sqrt(query.shape[1]), dim=2)
        mean = weights.mean(dim=1) * weights.shape[2]
        return mean.reshape(len(mean), 1, *size)

    def _projections(
        self, target: Tensor, source: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Query, key and value ``[B, C, h * w]``, and the reduced size."""
        small = functional.max_pool2d(source, self.reduction, ceil_mode=True)
        size = (small.shape[-2], small.shape[-1])
        query = self.query(functional.interpolate(target, size)).flatten(2)
        return query, self.key(small).flatten(2), self.value(small).flatten(2), size


class Direction(nn.Module):
    """What one head, the source, gives to another, the target (xTAM, one direction): features of
    the source that the target may need, both attentions on them, joined by a 1x1 convolution.

    Args:
        channels: of both maps, a multiple of 16.
        reduction, attention: see :class:`CorrelationAttention`; ``both`` joins the two kinds,
            ``none`` has neither.
        self_attention: whether eq. 3 takes part, with half of the channels.
    """

    def __init__(
        self, channels: int, reduction: int, attention: Attention, self_attention: bool
    ) -> None:
        super().__init__()
        self.extract = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
        self.own = SelfAttention(channels, channels // 2) if self_attention else None
        kinds: list[Literal["spatial", "channel"]] = [
            kind for kind in ("spatial", "channel") if attention in (kind, "both")
        ]
        self.across = nn.ModuleList(CorrelationAttention(channels, reduction, k) for k in kinds)
        joined = len(kinds) * channels + (channels // 2 if self_attention else 0)
        self.project = convolved(joined, channels, "group")

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """``[B, C, H, W]`` from two maps of that shape."""
        useful = self.extract(source)
        parts = [attention(target, useful) for attention in self.across]
        if self.own is not None:
            parts.append(self.own(useful))
        projected: Tensor = self.project(torch.cat(parts, dim=1))
        return projected


class TaskExchange(nn.Module):
    """The multi-task exchange block (mTEB, DenseMTL eq. 5): for each head the directional features
    from all others, joined by a 1x1 convolution and fused with its own map.

    As in the public code, whose numbers of parameters the paper gives; but groups of 8 channels
    are normalised together instead of the batch, as in the decoders.

    Args:
        heads: the names of the heads, at least two.
        channels: of the maps, a multiple of 16.
        reduction: how many times smaller the maps are made before positions are compared.
        fusion: ``add`` the residual (the paper's choice), ``product`` with it, or ``concat``.
        attention: of the directional features; see :class:`Direction`.
        self_attention: whether they contain the source's self-attention.
    """

    def __init__(
        self,
        heads: Sequence[str],
        channels: int,
        reduction: int = 1,
        fusion: Fusion = "add",
        attention: Attention = "spatial",
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.directions = nn.ModuleDict(
            {
                target: nn.ModuleDict(
                    {
                        source: Direction(channels, reduction, attention, self_attention)
                        for source in heads
                        if source != target
                    }
                )
                for target in heads
            }
        )
        joined = len(heads) if fusion == "concat" else len(heads) - 1
        self.join = nn.ModuleDict(
            {head: convolved(joined * channels, channels, "group") for head in heads}
        )

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The refined maps."""
        return {target: self._refined(target, maps) for target in maps}

    def _refined(self, target: str, maps: Mapping[str, Tensor]) -> Tensor:
        own = maps[target]
        found = [d(own, maps[source]) for source, d in self._towards(target).items()]
        if self.fusion == "concat":
            found.insert(0, own)
        residual: Tensor = self.join[target](torch.cat(found, dim=1))
        match self.fusion:
            case "add":
                return own + residual
            case "product":
                return own * residual
            case "concat":
                return residual

    @torch.no_grad()
    def attended(self, maps: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """Where each head looks in each other one, by (target, source):
        :meth:`CorrelationAttention.attended` of the spatial attentions."""
        return {
            (target, source): attention.attended(maps[target], direction.extract(maps[source]))
            for target in maps
            for source, direction in self._towards(target).items()
            for attention in direction.across
            if isinstance(attention, CorrelationAttention) and attention.over == "spatial"
        }

    def _towards(self, target: str) -> Mapping[str, Direction]:
        """The directions to a head, by their source."""
        return cast("Mapping[str, Direction]", self.directions[target])


class Distillation(nn.Module):
    """The distillation of PAD-Net: to each map the self-attention of every other one is added.

    Args:
        heads: the names of the heads, at least two.
        channels: of the maps.
    """

    def __init__(self, heads: Sequence[str], channels: int) -> None:
        super().__init__()
        self.sources = nn.ModuleDict(
            {
                target: nn.ModuleDict(
                    {s: SelfAttention(channels, channels) for s in heads if s != target}
                )
                for target in heads
            }
        )

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The refined maps."""
        refined = dict(maps)
        for target in maps:
            for source, attention in cast("nn.ModuleDict", self.sources[target]).items():
                refined[target] = refined[target] + attention(maps[source])
        return refined
