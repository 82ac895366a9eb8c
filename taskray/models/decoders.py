"""Decoders: from the features of an encoder to one map for one head, coarse to fine, in steps.

A decoder is called ``decoder(step, x, features)`` for ``step`` 0 to ``len(decoder) - 1``. The
features are ``[B, C_i, H_i, W_i]``, finest first; ``x`` is the map of the step before, at first
the coarsest feature. Steps, and not one call, so that the decoders of several heads can work side
by side and exchange what they have found (:meth:`taskray.models.branched.Branched.exchange`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskray.models.blocks import AtrousPyramid, double_conv
from taskray.models.frames import resize


class Decoder(nn.ModuleList):
    """The steps of one head, coarse to fine or the other way round."""

    def forward(self, step: int, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The map after a step, ``[B, C, H, W]``."""
        raise NotImplementedError


class UNetDecoder(Decoder):
    """Each step enlarges the map to the next finer feature, joins the two and applies
    ``double_conv``; the result has the width of that feature.

    Args:
        widths: channels of the features, finest first.
        norm: ``group`` or ``batch``.
    """

    def __init__(self, widths: Sequence[int], norm: str) -> None:
        super().__init__(double_conv(fine + deep, fine, norm) for fine, deep in pairwise(widths))

    def forward(self, step: int, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The map ``[B, widths[-2 - step], H, W]`` at the size of that feature."""
        level = len(self) - 1 - step
        skip = features[level]
        joined = torch.cat([skip, functional.interpolate(x, skip.shape[-2:])], dim=1)
        finer: Tensor = self[level](joined)
        return finer


class PyramidDecoder(Decoder):
    """The first step reduces the coarsest feature to ``width`` channels; each other one enlarges
    the map to the next finer feature, joins the two and applies ``double_conv``. The last one has
    half the width. Groups of 8 channels are normalised together.

    Args:
        channels: of the features, finest first.
        width: channels of the map, a multiple of 16.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        finest, *others, coarsest = channels
        super().__init__(
            [
                double_conv(coarsest, width, "group"),
                *(double_conv(width + skip, width, "group") for skip in reversed(others)),
                double_conv(width + finest, width // 2, "group"),
            ]
        )

    def forward(self, step: int, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The map ``[B, width, H, W]``, after the last step ``[B, width // 2, H, W]``, at the
        size of feature ``-1 - step``."""
        if step:
            skip = features[-1 - step]
            x = torch.cat([resize(x, skip.shape[-2:]), skip], dim=1)
        finer: Tensor = self[step](x)
        return finer


class FCN8Decoder(Decoder):
    """FCN-8s (Long et al., CVPR 2015) up to an eighth of the frame: a 1x1 convolution turns each
    of the three coarsest features into scores, with the channels of the output; each step but the
    first doubles the size of the scores and adds those of the next finer feature.

    All scores begin at 0, as published. It computes in float32 also under autocast, as a head does:
    its maps are outputs.

    Args:
        channels: of the features, finest first, each of half the size of the one before; the last
            three are used.
        scores: channels of the output.
    """

    def __init__(self, channels: Sequence[int], scores: int) -> None:
        coarse_first = list(reversed(channels))[:3]
        super().__init__(_Scores(width, scores, bool(n)) for n, width in enumerate(coarse_first))

    def forward(self, step: int, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The scores ``[B, scores, H, W]`` at the size of feature ``-1 - step``."""
        with torch.autocast(x.device.type, enabled=False):
            finer: Tensor = self[step](x, features[-1 - step].float())
            return finer


class _Scores(nn.Module):
    """The scores of a feature, added to those of the coarser ones if it is not the first."""

    def __init__(self, width: int, scores: int, adds: bool) -> None:
        super().__init__()
        self.score = nn.Conv2d(width, scores, 1)
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)
        self.enlarge = enlargement(scores, 2) if adds else None

    def forward(self, coarser: Tensor, feature: Tensor) -> Tensor:
        scores: Tensor = self.score(feature)
        return scores if self.enlarge is None else self.enlarge(coarser) + scores


def enlargement(channels: int, factor: int) -> nn.ConvTranspose2d:
    """A learned enlargement of maps ``[B, channels, H, W]`` by an even ``factor``, which begins as
    the bilinear one, each channel by itself."""
    size = 2 * factor
    layer = nn.ConvTranspose2d(channels, channels, size, stride=factor, padding=factor // 2)
    ramp = 1 - (torch.arange(size) - (size - 1) / 2).abs() / factor
    weight = torch.zeros_like(layer.weight)
    weight[range(channels), range(channels)] = torch.outer(ramp, ramp)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(channels)})
    return layer


class AtrousDecoder(Decoder):
    """Atrous spatial pyramid pooling of the coarsest feature, then as :class:`PyramidDecoder`
    through the finer ones, then a ``double_conv`` to half the width: what is exchanged after the
    step before is refined once more. Without ``skips`` the finer features are not used.

    Args:
        channels: of the features, finest first.
        width: channels of the map, a multiple of 16.
        rates: dilations of the pyramid.
        skips: whether to use the finer features.
    """

    def __init__(
        self, channels: Sequence[int], width: int, rates: Sequence[int], skips: bool
    ) -> None:
        *others, coarsest = channels
        super().__init__(
            [
                AtrousPyramid(coarsest, width, rates, "group"),
                *(double_conv(width + c, width, "group") for c in reversed(others) if skips),
                double_conv(width, width // 2, "group"),
            ]
        )

    def forward(self, step: int, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The map ``[B, width, H, W]`` at the size of feature ``-1 - step``; the last step keeps
        the size, ``[B, width // 2, H, W]``."""
        if 0 < step < len(self) - 1:
            skip = features[-1 - step]
            x = torch.cat([resize(x, skip.shape[-2:]), skip], dim=1)
        finer: Tensor = self[step](x)
        return finer
