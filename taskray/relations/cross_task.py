"""Cross-task consistency: what one task predicts is transferred to what another one predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from taskray.errors import InputError, TaskrayError
from taskray.models.transfer import TransferNet
from taskray.relations.relation import Path, Relation
from taskray.schema import PREDICTED_SHAPES, QUANTITIES, has_logits, quantity_of
from taskray.tasks.task import Task

SHORTEST = 1e-3
"""Metres; keeps the logarithm of depth finite."""

Width = Annotated[int, Field(ge=1)]


class CrossTask(nn.Module, Relation):
    """``loss_s(TT(prediction of t), target of s)``: a learned network TT transfers the prediction
    of the source t to the target s, and the loss is the target task's own (XTasC-Net, eq. 13, 15;
    CrossTaskNet). The gradient reaches the source's network and TT, never the target.

    Inside a task with two heads, under ``tasks.<name>.relations``, this is XTasC-Net. Under
    ``consistency`` TT is learned by the task that predicts the source, and the target is the cached
    prediction of a peer. Each entry is one direction between two quantities; any number of entries
    may tie any number of tasks.

    TT gets the logarithm of depth, the probabilities of classes, and any other prediction as it is.
    Its output becomes a prediction as the target task's network output does.

    Args:
        source: the predicted quantity that is transferred (``depth``, ``segmentation``, ``normals``
            ... : a value at each pixel).
        target: the quantity that it is transferred to.
        against: ``prediction``: the target is what is predicted of it (cross-task consistency).
            ``label``: the target's label, inside one task only (the alignment loss, Align-Net).
        soft: compare classes with all their predicted probabilities, instead of the most likely
            class.
        widths: channels of TT, see :class:`taskray.models.transfer.TransferNet`.
    """

    def __init__(
        self,
        source: str,
        target: str,
        against: Literal["prediction", "label"] = "prediction",
        soft: bool = False,
        widths: Annotated[list[Width], Field(min_length=1)] | None = None,
    ) -> None:
        super().__init__()
        if source == target:
            raise InputError("target", f"got {target!r}, expected another quantity than the source")
        if soft and against == "label":
            raise InputError("soft", "got true, expected false for labels, which have one class")
        for key, quantity in (("source", source), ("target", target)):
            known = QUANTITIES.get(quantity_of(quantity))
            if known is not None and known.shape[-2:] != ("H", "W"):
                raise InputError(
                    key, f"got {quantity!r}, expected a quantity with a value at each pixel"
                )
        self.source, self.target, self.against, self.soft = source, target, against, soft
        self.widths = widths or [64, 128, 256]
        self.quantities = (source, target)
        self.constant = (target,)
        self.labels = (target,) if against == "label" else ()
        self.transfer: TransferNet | None = None
        self._target_task: Task | None = None

    def check_tasks(self, tasks: Mapping[str, Task]) -> None:
        for quantity in self.quantities:
            found = {name: _channels(task, quantity) for name, task in _of(tasks, quantity).items()}
            first, *others = found.items()
            for name, channels in others:
                if channels != first[1]:
                    raise InputError(
                        quantity,
                        f"task {first[0]!r} predicts {first[1]} channels and task {name!r} "
                        f"{channels}, expected the same number: one network reads both",
                    )

    def build_for(self, tasks: Mapping[str, Task]) -> None:
        sources, targets = (_of(tasks, quantity) for quantity in self.quantities)
        target = next(iter(targets.values()))
        (out_channels,) = target.out_channels.values()
        self._target_task = target
        in_channels = _channels(next(iter(sources.values())), self.source)
        self.transfer = TransferNet(in_channels, out_channels, self.widths)

    def forward(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        source, quantity = predictions[self.source], quantity_of(self.target)
        values = batch if self.against == "label" else predictions
        target = values[self.target].detach()
        if source.shape[-2:] != target.shape[-2:]:
            raise TaskrayError(
                f"{self.source} is {_size(source)} and {self.target} is {_size(target)}, expected "
                "the same height and width"
            )
        transferred = self.transferred(source)
        assert self._target_task is not None
        if self.soft and has_logits(quantity):
            return {"soft": soft_cross_entropy(transferred[quantity], target)}
        label = target if self.against == "label" else as_label(quantity, target)
        losses = self._target_task.loss(transferred, {**batch, quantity: label})
        return {self.against: torch.stack(list(losses.values())).sum()}

    def paths(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Path]:
        """The target, transferred from the source."""
        source = predictions[self.source]
        found = self.transferred(source)[quantity_of(self.target)]
        return {self.target: Path(found, torch.ones_like(source[:, :1], dtype=torch.bool))}

    def transferred(self, source: Tensor) -> dict[str, Tensor]:
        """The target's quantities ``[B, ...]`` as transferred from a prediction of the source."""
        assert self.transfer is not None
        assert self._target_task is not None
        output = self.transfer(as_input(quantity_of(self.source), source))
        prediction: dict[str, Tensor] = self._target_task.predict(output)
        return prediction


def as_input(quantity: str, prediction: Tensor) -> Tensor:
    """A prediction as the input ``[B, C, H, W]`` of a network."""
    if quantity == "depth":
        return prediction.clamp(min=SHORTEST).log()
    return prediction.softmax(dim=1) if has_logits(quantity) else prediction


def as_label(quantity: str, prediction: Tensor) -> Tensor:
    """The label that a prediction would be right about: of classes the most likely one, of a
    probability whether it is above a half, of any other quantity the prediction itself."""
    if has_logits(quantity):
        return prediction.argmax(dim=1, keepdim=True)
    known = QUANTITIES.get(quantity)
    return (prediction > 0.5).long() if known and known.dtype == "uint8" else prediction


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean over pixels of ``-sum p log q``, p and q the probabilities of the target's logits and of
    the logits, ``[B, C, H, W]``."""
    return functional.cross_entropy(logits, target_logits.softmax(dim=1))


def _of(tasks: Mapping[str, Task], quantity: str) -> dict[str, Task]:
    return {name: task for name, task in tasks.items() if task.predicts(quantity)}


def _channels(task: Task, quantity: str) -> int:
    """The channels of a predicted quantity; those of the network's output where the number depends
    on the task or the quantity is not in ``schema``."""
    base = quantity_of(quantity)
    shape = PREDICTED_SHAPES.get(base) or (QUANTITIES[base].shape if base in QUANTITIES else ("C",))
    (own,) = task.out_channels.values()
    return shape[0] if isinstance(shape[0], int) else own


def _size(values: Tensor) -> str:
    return "x".join(map(str, values.shape[-2:]))
