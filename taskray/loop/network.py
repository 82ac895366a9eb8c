"""A task's network, with everything that decides what it computes: device, arithmetic, layout.

Training, evaluation, forward servers, frozen and finished tasks predict through it alone, so the
same weights give the same prediction everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taskray.data.streams.batch import Batch
from taskray.errors import TaskrayError
from taskray.job.config import TaskConfig
from taskray.schema import at_frame, frame_of, quantity_of, shape_problem
from taskray.tasks.task import Output, Task

FIRST = ("",)
"""The first frame alone: what labels and metrics are about."""


def frames_of(quantities: Sequence[str]) -> tuple[str, ...]:
    """The suffixes of the frames of these quantities; the first frame if there are none."""
    return tuple(sorted({frame_of(q) for q in quantities})) or FIRST


def inputs_of(task: Task, frames: Sequence[str]) -> tuple[str, ...]:
    """The columns that a task's network needs to predict on these frames."""
    if not task.per_frame:
        return task.inputs
    return tuple(dict.fromkeys(at_frame(c, frame) for frame in frames for c in task.inputs))


class Network:
    """Predicts a task's quantities (float32, named as in ``schema``) from the columns of a batch.

    Args:
        task: makes the network's input, and quantities of its output.
        module: the network; moved to the device, in the job's memory layout.
        config: precision, memory format, compilation.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, task: Task, module: nn.Module, config: TaskConfig, device: str) -> None:
        self.task, self.device = task, torch.device(device)
        self.layout = {
            "contiguous": torch.contiguous_format,
            "channels_last": torch.channels_last,
        }[config.memory_format]
        # torch declares no overload of `to` that takes a memory format alone with a device
        self.module: nn.Module = module.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.module.train(not config.frozen)
        self._forward: Callable[[Tensor], Output] = (
            torch.compile(self.module) if config.compile else self.module
        )
        self._bfloat16 = config.precision == "bfloat16"

    def predict(self, batch: Batch, frames: Sequence[str] = FIRST) -> dict[str, Tensor]:
        """The live prediction, with a gradient, in the module's present mode. All frames go
        through the network together, as one batch. TaskrayError where a shape is wrong."""
        columns = self.to_device(batch).tensors
        frames = frames if self.task.per_frame else FIRST
        parts = [self.task.network_input(_frame(columns, frame)) for frame in frames]
        inputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        if inputs.dim() == 4:  # only images have a memory format
            inputs = inputs.contiguous(memory_format=self.layout)
        with self._precision():
            output = self._forward(inputs)
        if isinstance(output, Tensor):
            quantities = self.task.predict(output.float())
        else:
            quantities = self.task.predict({name: part.float() for name, part in output.items()})
        prediction = _by_frame(quantities, frames)
        self._check(prediction, batch, frames)
        return prediction

    @torch.no_grad()
    def infer(self, batch: Batch, frames: Sequence[str] = FIRST) -> dict[str, Tensor]:
        """The prediction in evaluation mode, without a gradient."""
        trains = self.module.training
        self.module.eval()
        try:
            return self.predict(batch, frames)
        finally:
            self.module.train(trains)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the network's device."""
        if self.device.type == "cpu":
            return batch
        return replace(batch, tensors={k: self.move(v) for k, v in batch.tensors.items()})

    def move(self, tensor: Tensor) -> Tensor:
        """A tensor on the network's device."""
        return tensor.to(self.device, non_blocking=True)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._bfloat16 else nullcontext()

    def _check(self, prediction: Mapping[str, Tensor], batch: Batch, frames: Sequence[str]) -> None:
        expected = [at_frame(q, f) for q in self.task.quantities for f in frames]
        missing = [q for q in expected if q not in prediction]
        if missing:
            raise TaskrayError(f"the task does not predict {missing[0]!r}, which it announces")
        sizes = {"B": len(next(iter(batch.tensors.values())))}
        image = batch.tensors.get("image")
        if image is not None:
            sizes |= {"H": image.shape[-2], "W": image.shape[-1]}
        for name, tensor in prediction.items():
            problem = shape_problem(name, tensor.shape, sizes)
            if problem is not None:
                raise TaskrayError(f"prediction of {problem}")


def _by_frame(quantities: Mapping[str, Tensor], frames: Sequence[str]) -> dict[str, Tensor]:
    """Quantities of frames that went through the network as one batch, each under its name."""
    if len(frames) == 1:
        return {at_frame(q, frames[0]): values for q, values in quantities.items()}
    return {
        at_frame(quantity, frame): part
        for quantity, values in quantities.items()
        for frame, part in zip(frames, values.chunk(len(frames)), strict=True)
    }


def _frame(columns: Mapping[str, Tensor], frame: str) -> Mapping[str, Tensor]:
    """The columns of one frame under the names of the first."""
    if not frame:
        return columns
    own = {quantity_of(c): values for c, values in columns.items() if frame_of(c) == frame}
    return {**columns, **own}
