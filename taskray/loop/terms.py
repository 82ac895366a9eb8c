"""What a loss or a relation returns: named scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskray.errors import TaskrayError


def checked_terms(terms: Any, what: str) -> dict[str, Tensor]:
    """The named scalar tensors that ``what`` has returned; TaskrayError where it has not."""
    expected = "expected a dict of named scalar tensors"
    if not isinstance(terms, Mapping):
        raise TaskrayError(f"{what} returned a {type(terms).__name__}, {expected}")
    for name, value in terms.items():
        if not isinstance(value, Tensor):
            raise TaskrayError(
                f"{what} returned a {type(value).__name__} under {name!r}, {expected}"
            )
        if value.numel() != 1:
            shape = "x".join(map(str, value.shape))
            raise TaskrayError(f"{what} returned the shape {shape} under {name!r}, {expected}")
    return dict(terms)


def merged(losses: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both; TaskrayError where a name is in both."""
    if twice := losses.keys() & more.keys():
        raise TaskrayError(f"two losses have the name {min(twice)!r}")
    return {**losses, **more}


def sum_of(losses: Mapping[str, Tensor]) -> Tensor:
    """Their sum, detached."""
    return torch.stack([value.detach() for value in losses.values()]).sum()
