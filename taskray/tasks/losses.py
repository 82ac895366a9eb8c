"""Supervised losses, ``loss(prediction, label, valid) -> scalar``.

``prediction`` and ``label`` are ``[B, C, H, W]`` in the units of ``schema``, ``valid`` is a bool
mask ``[B, 1, H, W]``. Each is a mean over the valid pixels of the batch; without one it is 0, with
a gradient of zeros. A loss of your own is any such function, named by import path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from taskray.geometry.normals import unit

SMALLEST_DEPTH = 1e-6
"""Metres; keeps the logarithm of an invalid label finite."""
HUBER_DELTA = 250 / 256
"""Metres; MultiNet++ has 250 in units of KITTI's depth maps, which are 1/256 m."""


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` ``[B, C, H, W]`` where ``valid`` ``[B, 1, H, W]``; 0 if nowhere."""
    count = valid.sum() * (values.numel() // max(valid.numel(), 1))
    return torch.where(valid, values, 0.0).sum() / count.clamp(min=1)


def mse(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Mean squared difference (the depth loss of Taskology 4.3)."""
    return masked_mean((prediction - label).square(), valid)


def l1(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute difference."""
    return masked_mean((prediction - label).abs(), valid)


def huber(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Half the squared difference up to ``HUBER_DELTA``, linear beyond (the depth loss of
    MultiNet++, eq. 5)."""
    return masked_mean(
        functional.huber_loss(prediction, label, reduction="none", delta=HUBER_DELTA), valid
    )


def berhu(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Mean reverse Huber loss [Laina et al. 2016]: |d| up to C, beyond it (d^2 + C^2) / 2C. C is a
    fifth of the largest difference at a valid pixel of the batch, without a gradient."""
    difference = torch.where(valid, (prediction - label).abs(), 0.0)
    bound = (0.2 * difference.detach().max()).clamp(min=torch.finfo(difference.dtype).tiny)
    beyond = (difference.square() + bound.square()) / (2 * bound)
    return masked_mean(torch.where(difference <= bound, difference, beyond), valid)


def log_mse(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Mean squared difference of logarithms: of relative errors, at any depth."""
    ratio = prediction.clamp(min=SMALLEST_DEPTH) / label.clamp(min=SMALLEST_DEPTH)
    return masked_mean(ratio.log().square(), valid)


def cosine(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Mean of 1 - cos of the angle between vectors (the normals loss of Taskology 4.3)."""
    distance = 1 - (unit(prediction) * unit(label)).sum(dim=1, keepdim=True)
    return masked_mean(distance, valid)
