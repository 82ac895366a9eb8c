"""Frames of any size and brightness: padded, resized, and normalised for a network."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """``[B, C, H, W]`` with the border repeated below and to the right, up to a multiple."""
    height, width = image.shape[-2:]
    missing = (0, -width % multiple, 0, -height % multiple)
    return functional.pad(image, missing, mode="replicate") if any(missing) else image


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[B, C, H, W]`` at another height and width, bilinear."""
    if x.shape[-2:] == size:
        return x
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def standardize(image: Tensor) -> Tensor:
    """Every frame of a batch ``[B, C, H, W]`` scaled to mean 0 and deviation 1 over all its
    channels together, so colours keep their relation. A frame of one colour becomes 0."""
    deviation = image.std(dim=(1, 2, 3), keepdim=True)
    return (image - image.mean(dim=(1, 2, 3), keepdim=True)) / (deviation + 0.02)
