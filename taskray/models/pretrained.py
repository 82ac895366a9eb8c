"""What networks from Hugging Face ``transformers`` share: configurations and weights from this
machine alone (a folder, or a hub id in the local cache; never a download), and how their input
is to look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from taskray.errors import InputError


def stored_config(source: str, key: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a stored model; InputError names the argument ``key`` otherwise."""
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, **changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{key}: {source!r} is neither a folder with a model (config.json and weights) nor a "
            f"hub id in the local Hugging Face cache: {first_line(error)}"
        ) from None


def new_config(model_type: str, key: str, arguments: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model with random weights, from ``model_type`` and its arguments."""
    try:
        return AutoConfig.for_model(model_type, **arguments)
    except Exception as error:  # whatever a configuration class finds wrong is the user's input
        raise InputError(f"{key}: {model_type!r} with {arguments}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """An error's first line, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Standardize(nn.Module):
    """``(image - mean) / std`` with the statistics a stored model was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


def stored_statistics(source: str) -> nn.Module:
    """:class:`Standardize` as a stored model's image processor says; identity if it has none.

    Only the processor's settings are read: its class may need torchvision.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=True)
    except OSError:
        return nn.Identity()
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not (settings.get("do_normalize", True) and mean and std):
        return nn.Identity()
    return Standardize(mean, std)


def size_multiple(config: PreTrainedConfig) -> int:
    """Pixels by which a network divides frames: the patch of a plain vision transformer (8 and
    more; hierarchical networks have smaller ones), else 32."""
    inner = getattr(config, "backbone_config", None) or config
    patch = getattr(config, "patch_size", None) or getattr(inner, "patch_size", None)
    return patch if isinstance(patch, int) and patch >= 8 else 32
