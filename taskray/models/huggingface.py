"""Any depth-estimation or semantic-segmentation model of Hugging Face ``transformers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
)

from taskray.errors import InputError, one_line
from taskray.models.frames import pad_to_multiple, resize, size_multiple
from taskray.models.heads import only_channels
from taskray.models.pretrained import new_config, stored_config, stored_statistics

Head = Literal["depth", "segmentation"]
AUTO_CLASSES = {
    "depth": AutoModelForDepthEstimation,
    "segmentation": AutoModelForSemanticSegmentation,
}


class HuggingFaceModel(nn.Module):
    """A published network as a task's model: its depth or logits at the frame's size.

    Give ``name_or_path`` for stored weights, or ``model_type`` for random ones. Frames of any
    height and width are padded to a multiple of what the network divides by; for a network that
    takes one size only they are resized. Images are normalised with the settings of the stored
    image processor.

    The output of a depth network is returned as it is; where it is in metres, set
    ``depth: {output: metres}`` in the task.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, of one head; 1 with the depth head. With another
            number of classes than the stored one, the last layer has random weights.
        name_or_path: local folder, or hub id in the local cache. Nothing is downloaded.
        model_type: ``transformers`` model type (``segformer``, ``dpt``, ``glpn`` ...).
        config: arguments of the model's configuration class, over its defaults.
        head: ``depth`` or ``segmentation``; null: the stored model's, else ``depth`` for one
            output channel and ``segmentation`` for more.
        size: height and width to resize frames to; null: frames keep their size if possible.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Mapping[str, int],
        name_or_path: str | None = None,
        model_type: str | None = None,
        config: dict[str, Any] | None = None,
        head: Head | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        channels = only_channels(out_channels, "huggingface")
        arguments = dict(config or {})
        if in_channels != 3:
            arguments.setdefault("num_channels", in_channels)
        if (name_or_path is None) == (model_type is None):
            given = "both" if name_or_path is not None else "neither"
            raise InputError("name_or_path", f"got {given}, expected either it or model_type")
        if name_or_path is not None:
            settings = stored_config(name_or_path, "name_or_path", **arguments)
        else:
            settings = new_config(str(model_type), "model_type", arguments)
        head = head or _head_of(settings, channels)
        if head == "depth" and channels != 1:
            raise InputError("head", f"got depth (1 channel), the task needs {channels} channels")
        self.network = _build(name_or_path, settings, head, channels)
        self.standardize = stored_statistics(name_or_path) if name_or_path else nn.Identity()
        self.multiple = size_multiple(settings)
        self.size = size or self._fixed_size(in_channels, settings)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, channels, H, W]`` from ``[B, in_channels, H, W]``."""
        height, width = image.shape[-2:]
        image = self.standardize(image)
        if self.size is not None:
            return resize(self._dense(resize(image, self.size)), (height, width))
        image = pad_to_multiple(image, self.multiple)
        return resize(self._dense(image), image.shape[-2:])[..., :height, :width]

    def _dense(self, image: Tensor) -> Tensor:
        """The network's map, ``[B, channels, h, w]``, at its own resolution."""
        output = self.network(pixel_values=image)
        if hasattr(output, "predicted_depth"):
            depth: Tensor = output.predicted_depth.unsqueeze(1)
            return depth.float()
        logits: Tensor = output.logits
        return logits.float()

    @torch.no_grad()
    def _fixed_size(self, in_channels: int, config: PreTrainedConfig) -> tuple[int, int] | None:
        """None if the network takes a frame that is not square, else the size that it needs."""
        training = self.network.training
        try:
            self.network.eval()
            self._dense(torch.zeros(1, in_channels, 2 * self.multiple, 3 * self.multiple))
            return None
        except (RuntimeError, ValueError) as error:
            size = getattr(config, "image_size", None)
            if size is None:
                raise InputError(
                    "size", f"got none, {config.model_type!r} needs one: {one_line(error)}"
                ) from None
            return (size, size) if isinstance(size, int) else (size[0], size[1])
        finally:
            self.network.train(training)


def _head_of(config: PreTrainedConfig, channels: int) -> Head:
    architecture = next(iter(config.architectures or []), "")
    if "DepthEstimation" in architecture:
        return "depth"
    if "SemanticSegmentation" in architecture:
        return "segmentation"
    return "depth" if channels == 1 else "segmentation"


def _build(
    name_or_path: str | None, config: PreTrainedConfig, head: Head, channels: int
) -> nn.Module:
    auto = AUTO_CLASSES[head]
    new_head = head == "segmentation" and config.num_labels != channels
    if new_head:
        config.num_labels = channels
    network: nn.Module
    try:
        if name_or_path is None:
            network = auto.from_config(config)
        else:
            network = auto.from_pretrained(
                name_or_path,
                config=config,
                local_files_only=True,
                ignore_mismatched_sizes=new_head,
            )
    except Exception as error:  # a network's code may raise anything for its arguments
        key, source = ("name_or_path", name_or_path) if name_or_path else ("model_type", "")
        raise InputError(
            key,
            f"cannot build the {head} model {source or config.model_type!r}: {one_line(error)}",
        ) from None
    return network
