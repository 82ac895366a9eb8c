"""What networks from Hugging Face ``transformers`` share: configurations and weights that are on
this machine (a folder, or a hub id in the local cache; never a download), and the normalisation of
their input."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from taskray.errors import InputError, one_line
from taskray.models.weights import Standardize


def stored_config(source: str, key: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a stored model; InputError(``key``, ...) if there is none."""
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, **changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            key,
            f"got {source!r}, expected a folder with a model (config.json and weights) or a hub id "
            f"in the local Hugging Face cache: {one_line(error)}",
        ) from None


def new_config(model_type: str, key: str, arguments: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model with random weights, from ``model_type`` and its arguments;
    InputError(``key``, ...) if they do not fit."""
    try:
        return AutoConfig.for_model(model_type, **arguments)
    except Exception as error:  # a configuration class may raise anything for its arguments
        raise InputError(key, f"{model_type!r} with {arguments}: {one_line(error)}") from None


def stored_statistics(source: str) -> nn.Module:
    """:class:`Standardize` with the settings of a stored model's image processor; identity if it
    has none.

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
