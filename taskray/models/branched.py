"""The frame of a network with one encoder and a decoder for each head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from taskray.models.decoders import Decoder
from taskray.models.heads import by_head, of_head


class Branched(nn.Module):
    """One encoder, then for each head a decoder and the head itself:

        image ── encode ──▶ features ──┬─▶ decoder a: step 0 ─▶ step 1 ─▶ … ─▶ head a ──▶ a
                                       │                   ▲          ▲
                                       │                exchange   exchange
                                       │                   ▼          ▼
                                       └─▶ decoder b: step 0 ─▶ step 1 ─▶ … ─▶ head b ──▶ b

    A network of this kind sets ``decoder`` and ``head`` (each from
    :func:`taskray.models.heads.per_head`) and defines :meth:`encode` and :meth:`to_frame`.

    Args:
        heads: the names of the heads.
    """

    decoder: Decoder | nn.ModuleDict
    head: nn.Module

    def __init__(self, heads: Sequence[str]) -> None:
        super().__init__()
        self.head_names = tuple(heads)

    def encode(self, image: Tensor) -> list[Tensor]:
        """The features ``[B, C_i, H_i, W_i]`` of images ``[B, in_channels, H, W]``, finest first:
        the same for all heads."""
        raise NotImplementedError

    def exchange(self, step: int, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """The maps ``{head: [B, C, H, W]}`` after a step of the decoders, for the next step or,
        after the last one, for the heads. Attention between heads belongs here; without it the
        maps pass unchanged."""
        return maps

    def intermediate(self, step: int, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of heads after a step, before the exchange, by
        :func:`taskray.models.heads.at_scale`: ``[B, channels, h, w]``. Asked for in training
        only; by default there are none."""
        return {}

    def to_frame(self, output: Tensor, height: int, width: int) -> Tensor:
        """A head's output ``[B, channels, h, w]`` at the size of the frame,
        ``[B, channels, height, width]``."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor | Mapping[str, Tensor]:
        """``[B, channels, H, W]`` of the one head, or of each by name, from
        ``[B, in_channels, H, W]``; in training also the intermediate ones."""
        features = self.encode(image)
        decoders = {head: of_head(self.decoder, head) for head in self.head_names}
        maps = dict.fromkeys(self.head_names, features[-1])
        outputs: dict[str, Tensor] = {}
        for step in range(max(map(len, decoders.values()))):
            maps = {h: decoder(step, maps[h], features) for h, decoder in decoders.items()}
            if self.training:
                outputs |= self.intermediate(step, maps)
            maps = self.exchange(step, maps)
        outputs |= {head: of_head(self.head, head)(x) for head, x in maps.items()}
        height, width = image.shape[-2:]
        return by_head({name: self.to_frame(x, height, width) for name, x in outputs.items()})
