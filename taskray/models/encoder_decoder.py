"""An encoder from Hugging Face ``transformers`` with a U-Net-style decoder for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from taskray.models.branched import Branched
from taskray.models.decoders import PyramidDecoder
from taskray.models.encoders import feature_channels, load_backbone
from taskray.models.frames import pad_to_multiple, resize
from taskray.models.heads import Head, per_head
from taskray.models.pretrained import size_multiple


class EncoderDecoder(Branched):
    """Any ``transformers`` backbone as encoder, and for each head a decoder through its features,
    then through the image at half its size, to the full size.

    Frames may have any height and width: they are padded to a multiple of what the encoder
    divides by. The encoder keeps its own normalisation layers.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, by head.
        backbone: ``resnet18``, ``resnet34``, ``resnet50`` or a ``transformers`` backbone type
            (``convnext``, ``swin``, ``dinov2`` ...), with random weights; or a local folder or
            a hub id in the local cache, with the weights stored there. Nothing is downloaded.
        config: arguments of the backbone's configuration class, over its defaults.
        width: channels of the decoder, a multiple of 16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        backbone: str = "resnet18",
        config: dict[str, Any] | None = None,
        width: Annotated[int, Field(ge=16, multiple_of=16)] = 64,
    ) -> None:
        super().__init__(tuple(out_channels))
        self.encoder, self.standardize = load_backbone(backbone, in_channels, config or {})
        self.multiple = size_multiple(self.encoder.config)
        channels = feature_channels(self.encoder, in_channels, self.multiple, backbone)
        self.decoder = per_head(
            out_channels, lambda _: PyramidDecoder([in_channels, *channels], width)
        )
        self.head = per_head(out_channels, lambda channels: Head(width // 2, channels))

    def encode(self, image: Tensor) -> list[Tensor]:
        """The image itself at half its size, and the backbone's features."""
        image = pad_to_multiple(self.standardize(image), self.multiple)
        return [functional.avg_pool2d(image, 2), *self.encoder(image).feature_maps]

    def to_frame(self, output: Tensor, height: int, width: int) -> Tensor:
        padded = (height + -height % self.multiple, width + -width % self.multiple)
        return resize(output, padded)[..., :height, :width]
