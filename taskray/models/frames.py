"""Frames of any size: padded to what a network divides by, and brought to another's size."""

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
