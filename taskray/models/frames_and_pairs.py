"""A network for heads that read one frame and heads that read two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from taskray.errors import InputError
from taskray.job import plugins
from taskray.job.config import Plugin


class FramesAndPairs(nn.Module):
    """Two networks as one: ``frame`` gets the first frame of each pair, ``pair`` gets both, stacked
    on channels. So depth and segmentation share an encoder that sees one frame, beside a network
    for the motion between two (Monodepth2, Godard et al., ICCV 2019; DenseMTL, fig. 6). For the
    task ``multi`` with ``each_frame: true``.

    Args:
        in_channels: channels of the two frames together.
        out_channels: channels of the output, by head.
        pair_heads: the heads that read both frames.
        frame: the network of the other heads: a name, or a name with arguments, as under ``model``.
        pair: the network of ``pair_heads``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        pair_heads: Sequence[str],
        frame: Plugin,
        pair: Plugin,
    ) -> None:
        super().__init__()
        self.channels = in_channels // 2
        read = {head: head in pair_heads for head in out_channels}
        if unknown := [head for head in pair_heads if head not in out_channels]:
            heads = ", ".join(out_channels)
            raise InputError("pair_heads", f"got {unknown[0]!r}, expected some of {heads}")
        if len(set(read.values())) < 2:
            raise InputError("pair_heads", "expected some of the heads, not all and not none")
        self.heads = {both: [h for h in out_channels if read[h] == both] for both in (False, True)}
        self.frame, self.pair = (
            plugins.build(
                "model",
                network.name,
                network.arguments,
                where,
                in_channels=channels,
                out_channels={head: out_channels[head] for head in self.heads[both]},
            )
            for where, network, channels, both in (
                ("frame", frame, self.channels, False),
                ("pair", pair, in_channels, True),
            )
        )

    def forward(self, pairs: Tensor) -> dict[str, Tensor]:
        """The output of each head by name, from ``[B, in_channels, H, W]``."""
        outputs: dict[str, Tensor] = {}
        for both, found in (
            (False, self.frame(pairs[:, : self.channels])),
            (True, self.pair(pairs)),
        ):
            outputs |= {self.heads[both][0]: found} if isinstance(found, Tensor) else found
        return outputs
