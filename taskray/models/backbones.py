"""Encoders from Hugging Face ``transformers``: backbones that return features at several sizes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from taskray.errors import InputError, one_line
from taskray.models.pretrained import new_config, stored_config, stored_statistics

RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2]},
    "resnet34": {"layer_type": "basic", "depths": [3, 4, 6, 3]},
    "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]},
}
BASIC_WIDTHS = [64, 128, 256, 512]


def load_backbone(
    backbone: str, in_channels: int, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, nn.Module]:
    """The encoder, which returns the features of all its stages, and the module that its input
    must pass first (:func:`taskray.models.pretrained.stored_statistics`)."""
    if backbone in RESNETS or backbone in {c.model_type for c in MODEL_FOR_BACKBONE_MAPPING}:
        model_type = "resnet" if backbone in RESNETS else backbone
        settings = {**RESNETS.get(backbone, {}), "num_channels": in_channels, **arguments}
        if settings.get("layer_type") == "basic":
            settings.setdefault("hidden_sizes", BASIC_WIDTHS)
        stages = stage_names(new_config(model_type, "backbone", settings), backbone)
        config = new_config(model_type, "backbone", {**settings, "out_features": stages})
        try:
            return AutoBackbone.from_config(config), nn.Identity()
        except Exception as error:  # a network's code may raise anything for its arguments
            raise InputError("backbone", f"cannot build {backbone!r}: {one_line(error)}") from None
    config = stored_config(backbone, "backbone", **arguments)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise InputError(
            "backbone", f"got {backbone}, a {config.model_type!r} model, expected a backbone"
        )
    config = stored_config(
        backbone, "backbone", **arguments, out_features=stage_names(config, backbone)
    )
    try:  # AutoBackbone.from_pretrained asks the hub whether the name exists; the class does not
        encoder = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
            backbone, config=config, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError("backbone", f"weights of {backbone!r}: {one_line(error)}") from None
    return encoder, stored_statistics(backbone)


def stage_names(config: PreTrainedConfig, backbone: str) -> list[str]:
    """The stages whose features are used: all but the stem, which is the input of the first."""
    names = [n for n in getattr(config, "stage_names", None) or [] if n != "stem"]
    if not names:
        raise InputError("backbone", f"{backbone!r} names no stages to take features from")
    return names
