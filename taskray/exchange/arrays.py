"""Predictions as the arrays that travel, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_TYPES = {"float16": torch.float16, "float32": torch.float32}


def to_arrays(prediction: Mapping[str, Tensor], dtype: str) -> dict[str, np.ndarray]:
    """On the CPU, as ``float16`` or ``float32``."""
    to = _TYPES[dtype]
    return {q: p.to("cpu", to).contiguous().numpy() for q, p in prediction.items()}


def to_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """As float32 tensors that own their memory."""
    # NumPy converts in this thread alone; torch would start a team of threads for it
    return {q: torch.from_numpy(np.array(a, np.float32)) for q, a in arrays.items()}
