"""What a loss or a relation returns: named scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
