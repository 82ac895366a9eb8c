"""An encoder, which may be pretrained, with a U-Net-style decoder for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from taskray.models.branched import Branched
from taskray.models.decoders import PyramidDecoder
from taskray.models.encoders import feature_channels, load_encoder
from taskray.models.frames import pad_to_multiple, resize, size_multiple
from taskray.models.heads import Head, per_head
from taskray.models.weights import freeze_statistics


class EncoderDecoder(Branched):
    """EfficientNet-Lite0 or any ``transformers`` backbone as encoder, and for each head a decoder
    through its features to the full size; where the features are smaller than half the image, also
    through the image at half its size.

    Frames may have any height and width: they are padded to a multiple of what the encoder
    divides by. The encoder keeps its own normalisation layers. With ``pretrained`` weights its
    BatchNorm layers keep their statistics, and only scale and shift learn: a batch is small, and
    the batches of two domains alternate, so statistics of a batch would fit neither, and would
    differ from those that the evaluation uses.

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
        super().__init__(tuple(out_channels))
        self.encoder, self.standardize = load_encoder(
            backbone, in_channels, config or {}, pretrained
        )
        self.frozen_statistics = pretrained is not None
        self.multiple = size_multiple(getattr(self.encoder, "config", None))
        channels, self.reaches_half = feature_channels(
            self.encoder, in_channels, self.multiple, backbone
        )
        if not self.reaches_half:
            channels = [in_channels, *channels]
        self.decoder = per_head(out_channels, lambda _: PyramidDecoder(channels, width))
        self.head = per_head(out_channels, lambda channels: Head(width // 2, channels))
        self.train()

    def encode(self, image: Tensor) -> list[Tensor]:
        """The backbone's features, the finest at half the image's size: the image itself where the
        backbone has none of that size."""
        image = pad_to_multiple(self.standardize(image), self.multiple)
        features: list[Tensor] = list(self.encoder(image).feature_maps)
        return features if self.reaches_half else [functional.avg_pool2d(image, 2), *features]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_statistics:
            freeze_statistics(self.encoder)
        return self

    def to_frame(self, output: Tensor, height: int, width: int) -> Tensor:
        padded = (height + -height % self.multiple, width + -width % self.multiple)
        return resize(output, padded)[..., :height, :width]
