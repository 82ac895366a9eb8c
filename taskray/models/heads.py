"""Heads: the last layer of each quantity that a network predicts.

A network is built for ``out_channels = {head: channels}``. It returns one tensor where there is
one head, and ``{head: tensor}`` where there are several. In training it may also return
intermediate predictions of a head, of the size of the frame, under the names of :func:`at_scale`;
the task ``multi`` adds their losses to the head's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from taskray.errors import InputError

M = TypeVar("M", bound=nn.Module)


class Head(nn.Conv2d):
    """A 1x1 convolution in float32, also under autocast: ``[B, channels, H, W]`` from
    ``[B, width, H, W]``.

    bfloat16 rounds depth to half a per cent, which is as much as neighbouring pixels differ by,
    a metre to four millimetres, and a logit of 8 to 1/32.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def per_head(out_channels: Mapping[str, int], build: Callable[[int], M]) -> M | nn.ModuleDict:
    """One module for each head, built from its channels.

    With one head the result is that module itself, else a ``ModuleDict`` by head: the names of
    the weights of a network with one head do not contain the head's name.
    """
    modules = {head: build(channels) for head, channels in out_channels.items()}
    return nn.ModuleDict(modules) if len(modules) > 1 else next(iter(modules.values()))


def of_head(modules: M | nn.ModuleDict, head: str) -> M:
    """The module of one head, from what :func:`per_head` returned."""
    return cast("M", modules[head]) if isinstance(modules, nn.ModuleDict) else modules


def by_head(outputs: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """What a network returns: the tensor of its one head, or all by head."""
    return dict(outputs) if len(outputs) > 1 else next(iter(outputs.values()))


def only_channels(out_channels: Mapping[str, int], network: str) -> int:
    """The channels of the one head; InputError where a task has several, for networks that have
    one head only."""
    if len(out_channels) > 1:
        heads = ", ".join(out_channels)
        raise InputError(network, f"got a task with the heads {heads}, expected one head")
    return next(iter(out_channels.values()))


def at_scale(name: str, scale: int) -> str:
    """The name of an intermediate prediction of a head or of a quantity, made from a map whose
    sides are ``2**scale`` times smaller than the frame's: ``depth``, 1 -> ``depth@1``."""
    return f"{name}@{scale}"


def head_and_scale(name: str) -> tuple[str, int | None]:
    """The reverse of :func:`at_scale`; the scale of a final prediction is None."""
    head, _, scale = name.partition("@")
    return head, int(scale) if scale else None
