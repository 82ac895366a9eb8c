"""A network that costs a multiple of another, with work of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from taskray.models.unet import UNet


class Ensemble(nn.Module):
    """The mean of so many U-Nets: ``members`` times the work of one.

    A wider network would not do: it asks other things of caches and memory, which tasks on one
    machine share, and so slows its neighbours whatever the runtime does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        base: int,
        members: Annotated[int, Field(ge=1)],
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(UNet(in_channels, out_channels, base) for _ in range(members))

    def forward(self, image: Tensor) -> Tensor:
        """``[B, channels, H, W]`` of the one head, from ``[B, in_channels, H, W]``."""
        return torch.stack([member(image) for member in self.members]).mean(dim=0)
