"""Domain adaptation: a game that makes predictions on unlabelled frames look like labelled ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from taskray.errors import InputError, TaskrayError
from taskray.job.config import OptimizerConfig
from taskray.models.discriminator import PatchDiscriminator
from taskray.models.heads import at_scale
from taskray.relations.opposed import Opposed
from taskray.relations.relation import at_source
from taskray.schema import has_logits, quantity_of
from taskray.tasks.task import Task

Metres = Annotated[float, Field(ge=0)]

OPTIMIZER = OptimizerConfig(lr=1e-4, betas=(0.9, 0.99), clip_norm=None)
"""Of a discriminator, as Vu et al. (CVPR 2019) train theirs; the rate falls to 0 as a cosine."""


class Adversarial(Opposed):
    """Output-level adversarial domain adaptation of one quantity (DenseMTL, appendix B.3, eq. 7-10;
    Vu et al., CVPR 2019).

    A discriminator D learns to tell the maps Q of the source from those of the target: the source
    are the predictions on the task's labelled batch, the target those on the mediator's batch of
    the same step (``mediator.with_labels: true``). The network learns to make maps of the target
    that D takes for maps of the source:

        D:        mean BCE(D(Q_source), 1) + mean BCE(D(Q_target), 0)    (eq. 7)
        network:  mean BCE(D(Q_target), 1)                               (eq. 8)

    Means are over samples and patches. The relation's weight is lambda_adv (published: 5e-3). A
    discriminator that can only guess has losses of 0.69 on either domain, and so has the network.
    Unlike other relations this one is not 0 on the truth.

    The maps are, of classes, the weighted self-information ``-p log p`` of the softmax p
    (eq. 10); of depth ``(depth - near) / (far - near)``, with the nearest and farthest depth of the
    source; of any other quantity the prediction itself. One relation has one discriminator: a
    network with several outputs takes one relation for each.

    Args:
        quantity: what is aligned.
        scale: of an intermediate output of the network (``densemtl``); null: its final one.
        near: metres; of depth alone.
        far: metres; of depth alone.
        width: channels of the discriminator's first convolution (published: 64).
        depth: convolutions of the discriminator, each of which halves the size.
        optimizer: of the discriminator; as that of a task.
    """

    def __init__(
        self,
        quantity: str,
        scale: Annotated[int, Field(ge=0)] | None = None,
        near: Metres = 0.0,
        far: Metres = 80.0,
        width: Annotated[int, Field(ge=1)] = 64,
        depth: Annotated[int, Field(ge=1)] = 5,
        optimizer: OptimizerConfig = OPTIMIZER,
    ) -> None:
        super().__init__()
        if near >= far:
            raise InputError("far", f"got {far:g}, expected more than near, {near:g}")
        self.quantities = self.sources = (quantity,)
        self.output = quantity if scale is None else at_scale(quantity, scale)
        self.near, self.far = near, far
        self.width, self.depth = width, depth
        self.optimizer = optimizer

    def build_for(self, tasks: Mapping[str, Task]) -> None:
        """The discriminator, for the channels of the quantity."""
        channels = next(sum(task.out_channels.values()) for task in tasks.values())
        self.discriminator = PatchDiscriminator(channels, self.width, self.depth)

    def maps(self, prediction: Tensor) -> Tensor:
        """Q ``[B, C, H, W]`` of a prediction ``[B, C, H, W]``."""
        if has_logits(self.quantities[0]):
            return self_information(prediction)
        if quantity_of(self.quantities[0]) == "depth":
            return (prediction - self.near) / (self.far - self.near)
        return prediction

    def forward(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        constant = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        target = self._maps_of(predictions, self.output)
        logits = functional_call(self.discriminator, constant, (target,))
        return {"adversarial": against(logits, 1.0)}

    def opponent_losses(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        source = self._maps_of(predictions, at_source(self.output))
        target = self._maps_of(predictions, self.output)
        return {
            "source": against(self.discriminator(source), 1.0),
            "target": against(self.discriminator(target), 0.0),
        }

    def _maps_of(self, predictions: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in predictions:
            raise TaskrayError(f"the network has no output {name!r}, which is to be aligned")
        height, width = predictions[name].shape[-2:]
        if min(height, width) < 2**self.depth:
            raise TaskrayError(
                f"depth: got {self.depth} convolutions of stride 2 on maps of {height}x{width}, "
                f"expected at most {min(height, width).bit_length() - 1}"
            )
        return self.maps(predictions[name])


def self_information(logits_bchw: Tensor) -> Tensor:
    """``-p log p`` of the softmax p, for each class, ``[B, C, H, W]``, in [0, 1/e]."""
    log_p = torch.log_softmax(logits_bchw, dim=1)
    return -log_p.exp() * log_p


def against(logits: Tensor, domain: float) -> Tensor:
    """Mean binary cross entropy of logits to one domain, 1 or 0."""
    expected = torch.full_like(logits, domain)
    return functional.binary_cross_entropy_with_logits(logits, expected)
