"""An encoder, which may be pretrained, with a U-Net-style decoder for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from taskray.models.decoders import PyramidDecoder
from taskray.models.encoded import Encoded
from taskray.models.heads import Head, per_head


class EncoderDecoder(Encoded):
    """EfficientNet-Lite0 or any ``transformers`` backbone as encoder (:class:`Encoded`), and for
    each head a decoder through its features to half the size of the frame.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, by head.
        backbone: ``efficientnet_lite0`` (needs ``taskray[pretrained]``), ``resnet18``,
            ``resnet34``, ``resnet50`` or a ``transformers`` backbone type (``convnext``, ``swin``,
            ``dinov2`` ...), with random weights unless ``pretrained`` names some; or a local
            folder or a hub id in the local cache, with the weights stored there. Nothing is
            downloaded.
        config: arguments of the backbone's configuration class, over its defaults.
        pretrained: ``imagenet``, the published weights of ``efficientnet_lite0``; or a file of
            weights or a folder with one (safetensors or a state dict), whose names may have a
            prefix. The input is then normalised as for ImageNet.
        width: channels of the decoder, a multiple of 16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        backbone: str = "resnet18",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        width: Annotated[int, Field(ge=16, multiple_of=16)] = 64,
    ) -> None:
        super().__init__(in_channels, tuple(out_channels), backbone, config, pretrained)
        self.decoder = per_head(out_channels, lambda _: PyramidDecoder(self.channels, width))
        self.head = per_head(out_channels, lambda channels: Head(width // 2, channels))
        self.train()
