"""An encoder from Hugging Face ``transformers`` with a U-Net-style decoder."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from taskray.errors import InputError
from taskray.models.frames import pad_to_multiple, resize
from taskray.models.pretrained import (
    first_line,
    new_config,
    size_multiple,
    stored_config,
    stored_statistics,
)
from taskray.models.unet import double_conv

RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2]},
    "resnet34": {"layer_type": "basic", "depths": [3, 4, 6, 3]},
    "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]},
}
BASIC_WIDTHS = [64, 128, 256, 512]


class EncoderDecoder(nn.Module):
    """Any ``transformers`` backbone as encoder; a decoder that goes up its feature maps, then to
    half the frame's size beside the image itself, and to the full size.

    Takes frames of any height and width (they are padded to what the encoder divides by). The
    encoder keeps its own normalisation layers; the decoder has groups of 8 channels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        backbone: ``resnet18``, ``resnet34``, ``resnet50`` or a ``transformers`` backbone type
            (``convnext``, ``swin``, ``dinov2`` ...), with random weights; or a local folder or
            a hub id in the local cache, with the weights stored there. Nothing is downloaded.
        config: arguments of the backbone's configuration class, over its defaults.
        width: channels of the decoder, a multiple of 16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        backbone: str = "resnet18",
        config: dict[str, Any] | None = None,
        width: Annotated[int, Field(ge=16, multiple_of=16)] = 64,
    ) -> None:
        super().__init__()
        self.encoder, self.standardize = load_backbone(backbone, in_channels, config or {})
        self.multiple = size_multiple(self.encoder.config)
        channels = self._feature_channels(in_channels, backbone)
        self.deepest = double_conv(channels.pop(), width, "group")
        self.decoder = nn.ModuleList(
            double_conv(width + skip, width, "group") for skip in reversed(channels)
        )
        self.finest = double_conv(width + in_channels, width // 2, "group")
        self.head = nn.Conv2d(width // 2, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, out_channels, H, W]`` from ``[B, in_channels, H, W]``."""
        height, width = image.shape[-2:]
        image = pad_to_multiple(self.standardize(image), self.multiple)
        *skips, x = self.encoder(image).feature_maps
        x = self.deepest(x)
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            x = block(torch.cat([resize(x, skip.shape[-2:]), skip], dim=1))
        small = functional.avg_pool2d(image, 2)
        x = self.finest(torch.cat([resize(x, small.shape[-2:]), small], dim=1))
        with torch.autocast(x.device.type, enabled=False):  # as in UNet
            x = resize(self.head(x.float()), image.shape[-2:])
        return x[..., :height, :width]

    @torch.no_grad()
    def _feature_channels(self, in_channels: int, backbone: str) -> list[int]:
        """Channels of each feature map, asked of the encoder: some configurations misstate it."""
        frame = torch.zeros(1, in_channels, 2 * self.multiple, 3 * self.multiple)
        training = self.encoder.training
        try:
            features = self.encoder.eval()(frame).feature_maps
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"backbone: {backbone!r} does not take {in_channels} channels of any frame size: "
                f"{first_line(error)}"
            ) from None
        self.encoder.train(training)
        return [feature.shape[1] for feature in features]


def load_backbone(
    backbone: str, in_channels: int, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, nn.Module]:
    """The encoder, giving all its stages, and what its input must go through first."""
    if backbone in RESNETS or backbone in {c.model_type for c in MODEL_FOR_BACKBONE_MAPPING}:
        model_type = "resnet" if backbone in RESNETS else backbone
        settings = {**RESNETS.get(backbone, {}), "num_channels": in_channels, **arguments}
        if settings.get("layer_type") == "basic":
            settings.setdefault("hidden_sizes", BASIC_WIDTHS)
        stages = stage_names(new_config(model_type, "backbone", settings), backbone)
        config = new_config(model_type, "backbone", {**settings, "out_features": stages})
        try:
            return AutoBackbone.from_config(config), nn.Identity()
        except Exception as error:  # whatever a network's code makes of its arguments
            raise InputError(f"backbone: cannot build {backbone!r}: {first_line(error)}") from None
    config = stored_config(backbone, "backbone", **arguments)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise InputError(f"backbone: a {config.model_type!r} model ({backbone}) is no backbone")
    config = stored_config(
        backbone, "backbone", **arguments, out_features=stage_names(config, backbone)
    )
    try:  # AutoBackbone.from_pretrained asks the hub whether the name exists; the class does not
        encoder = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
            backbone, config=config, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"backbone: weights of {backbone!r}: {first_line(error)}") from None
    return encoder, stored_statistics(backbone)


def stage_names(config: PreTrainedConfig, backbone: str) -> list[str]:
    """The stages of which feature maps are taken; the stem only hands on to the first."""
    names = [n for n in getattr(config, "stage_names", None) or [] if n != "stem"]
    if not names:
        raise InputError(f"backbone: {backbone!r} names no stages to take feature maps from")
    return names
