"""Augmentation of a task's own input. Never of what peers see: their predictions would not fit.

A photometric change leaves the geometry alone, so it is free on every batch. A flip does not:
it is for labelled batches only, and it mirrors every column of the sample with the image.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.errors import InputError
from taskray.geometry.camera import flip_intrinsics
from taskray.geometry.motion import rotation_matrix
from taskray.job.config import AugmentConfig
from taskray.schema import QUANTITIES, quantity_of

GREY = (0.299, 0.587, 0.114)
"""Luma of RGB (ITU-R BT.601)."""


def augment(
    batch: Batch, config: AugmentConfig, generator: torch.Generator, *, labelled: bool
) -> Batch:
    """The batch with its images changed as ``config`` asks; the batch given is not changed.

    Each sample draws its own brightness, contrast and saturation factor and its own turn of hue,
    the same for all its frames, and each pixel its own noise; images stay in [0, 1]. With
    ``labelled`` and ``config.flip``, half of the samples are mirrored left to right in all their
    columns.
    """
    tensors = dict(batch.tensors)
    images = [column for column in tensors if quantity_of(column) == "image"]
    if not images:
        return batch
    size = len(tensors[images[0]])
    if labelled and config.flip:
        mirrored = torch.rand(size, generator=generator) < 0.5
        tensors = {
            column: torch.where(_like(mirrored, values), _flip(tensors, column), values)
            for column, values in tensors.items()
        }
    spreads = (config.brightness, config.contrast, config.saturation, config.hue)
    if any(spreads) or config.noise:
        *factors, turn = (
            spread * (2 * torch.rand(size, 1, 1, 1, generator=generator) - 1) for spread in spreads
        )
        for column in images:
            image = _recolour(tensors[column], [1 + factor for factor in factors])
            if config.hue:
                image = _turn_hue(image, torch.pi * turn[:, :, 0, 0])
            if config.noise:
                image = image + config.noise * torch.randn(image.shape, generator=generator)
            tensors[column] = image.clamp(0, 1)
    return replace(batch, tensors=tensors)


def _recolour(image: Tensor, factors: list[Tensor]) -> Tensor:
    brightness, contrast, saturation = factors
    image = image * brightness
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = mean + contrast * (image - mean)
    grey = (image * image.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
    return grey + saturation * (image - grey)


def _turn_hue(image: Tensor, angle: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` with their colours turned about the grey axis, by ``[B, 1]`` rad."""
    axis = torch.full((len(image), 3), 3**-0.5)
    return torch.einsum("bij,bjhw->bihw", rotation_matrix(axis * angle), image)


def _flip(tensors: dict[str, Tensor], column: str) -> Tensor:
    """A column of the mirrored samples: what ``x -> -x`` does to its quantity. InputError for
    a column of a quantity for which this is not known."""
    values, quantity = tensors[column], quantity_of(column)
    if quantity == "intrinsics":
        width = next(t.shape[-1] for c, t in tensors.items() if quantity_of(c) == "image")
        return flip_intrinsics(values, width)
    if quantity in ("camera_motion", "camera_motion_back"):  # X2 = M X1 becomes F X2 = (F M F) F X1
        mirror = values.new_tensor([-1.0, 1.0, 1.0, 1.0])
        return values * mirror[:, None] * mirror
    if quantity not in QUANTITIES or "W" not in QUANTITIES[quantity].shape:
        raise InputError("augment.flip", f"column {column!r} has no mirror image; expected false")
    flipped = values.flip(-1)
    if quantity in ("normals", "object_motion", "object_motion_back"):
        flipped[:, 0] *= -1
    return flipped


def _like(mask: Tensor, values: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (values.dim() - 1))
