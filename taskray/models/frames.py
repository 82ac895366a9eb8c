"""Frames of any size and brightness: padded, resized, and normalised for a network."""

from __future__ import annotations

from typing import Any

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


def size_multiple(config: Any) -> int:
    """The number of pixels that a frame's height and width must be a multiple of: the patch of a
    plain vision transformer (8 or more; hierarchical networks have smaller ones), else 32. None:
    of a network without a configuration."""
    inner = getattr(config, "backbone_config", None) or config
    patch = getattr(config, "patch_size", None) or getattr(inner, "patch_size", None)
    return patch if isinstance(patch, int) and patch >= 8 else 32
