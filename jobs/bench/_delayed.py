"""A network that takes longer by a fixed time, without more work."""

from __future__ import annotations

import time

from torch import Tensor

from taskray.models.unet import UNet


class Delayed(UNet):
    """A U-Net that sleeps for so many seconds in each forward pass: the task is slower, and leaves
    cores and memory to its peers."""

    def __init__(self, in_channels: int, out_channels: int, base: int, seconds: float) -> None:
        super().__init__(in_channels, out_channels, base, depth=2)
        self.seconds = seconds

    def forward(self, image: Tensor) -> Tensor:
        """``[B, out_channels, H, W]`` from ``[B, in_channels, H, W]``."""
        time.sleep(self.seconds)
        return super().forward(image)
