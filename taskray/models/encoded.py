"""The frame of a network whose encoder is a known one, which may be pretrained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor
from torch.nn import functional

from taskray.models.branched import Branched
from taskray.models.encoders import find_features, load_encoder
from taskray.models.frames import pad_to_multiple, resize, size_multiple
from taskray.models.weights import freeze_statistics


class Encoded(Branched):
    """A :class:`Branched` network on the features of EfficientNet-Lite0 or of any ``transformers``
    backbone. Where the features are smaller than half the image, the image at half its size is a
    further one.

    Frames may have any height and width: they are padded to a multiple of what the encoder
    divides by. The encoder keeps its own normalisation layers. With ``pretrained`` weights its
    BatchNorm layers keep their statistics, and only scale and shift learn: a batch is small, and
    the batches of two domains alternate, so statistics of a batch would fit neither, and would
    differ from those that the evaluation uses.

    Sets ``channels`` and ``strides`` of the features, finest first; a stride is the size of the
    frame divided by that of the feature.

    Args:
        in_channels: channels of the input.
        heads: the names of the heads.
        backbone, config, pretrained: see :class:`taskray.models.encoder_decoder.EncoderDecoder`.
        coarsest: largest stride; beyond it convolutions are dilated instead
            (:func:`taskray.models.encoders.dilate`). None: any.
    """

    def __init__(
        self,
        in_channels: int,
        heads: Sequence[str],
        backbone: str,
        config: dict[str, Any] | None,
        pretrained: str | None,
        coarsest: int | None = None,
    ) -> None:
        super().__init__(heads)
        self.encoder, self.standardize = load_encoder(
            backbone, in_channels, config or {}, pretrained
        )
        self.frozen_statistics = pretrained is not None
        self.multiple = size_multiple(getattr(self.encoder, "config", None))
        self.channels, self.strides = find_features(
            self.encoder, in_channels, self.multiple, backbone, coarsest
        )
        self.adds_half = self.strides[0] != 2
        if self.adds_half:
            self.channels, self.strides = [in_channels, *self.channels], [2, *self.strides]

    def encode(self, image: Tensor) -> list[Tensor]:
        """The backbone's features, the finest at half the image's size: the image itself where the
        backbone has none of that size."""
        image = pad_to_multiple(self.standardize(image), self.multiple)
        features: list[Tensor] = list(self.encoder(image).feature_maps)
        return [functional.avg_pool2d(image, 2), *features] if self.adds_half else features

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_statistics:
            freeze_statistics(self.encoder)
        return self

    def to_frame(self, output: Tensor, height: int, width: int) -> Tensor:
        padded = (height + -height % self.multiple, width + -width % self.multiple)
        return resize(output, padded)[..., :height, :width]
