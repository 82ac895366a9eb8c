"""A small network that predicts, patch by patch, which of two domains a map is from."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

SLOPE = 0.2
"""Of the leaky ReLU below 0."""


class PatchDiscriminator(nn.Sequential):
    """Convolutions of 4x4 pixels and stride 2, each but the last one with a leaky ReLU: the
    discriminator of output-level domain adaptation (Tsai et al., CVPR 2018; Vu et al., CVPR 2019).
    It has no normalisation: a batch contains maps of one domain alone, and to normalise it would
    remove the difference.

    From maps ``[B, channels, H, W]`` it makes logits ``[B, 1, h, w]``, one for each patch: above 0
    for the first domain, below 0 for the second.

    Args:
        channels: of the maps.
        width: channels of the first convolution; each further one has twice as many, the last 1.
        depth: number of convolutions. Maps need at least ``2**depth`` pixels to each side.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        widths = [channels, *(width * 2**level for level in range(depth - 1)), 1]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        super().__init__(*layers[:-1])
