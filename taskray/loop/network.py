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
from taskray.errors import TaskrayError, naming_cause
from taskray.job.config import TaskConfig
from taskray.schema import at_frame, frame_of, quantity_of, shape_problem
from taskray.tasks.task import Output, Task

FIRST = ("",)
"""The first frame alone: what labels and metrics are about."""


def frames_of(task: Task, quantities: Sequence[str]) -> tuple[str, ...]:
    """The suffixes of the frames on which a task predicts these quantities; the first frame for
    those that are not predicted frame by frame, and if there are none."""
    frames = {"" if q in task.quantities else frame_of(q) for q in quantities}
    return tuple(sorted(frames)) or FIRST


def labelled_frames(task: Task, quantities: Sequence[str]) -> tuple[str, ...]:
    """The suffixes of the frames on which a task predicts on its labelled batches: the first one,
    and those of quantities that relations inside it need."""
    return tuple(dict.fromkeys([*FIRST, *frames_of(task, quantities)]))


def inputs_of(task: Task, frames: Sequence[str]) -> tuple[str, ...]:
    """The columns that a task's network needs to predict on these frames. What it reads of another
    frame is the same on all of them."""
    return tuple(
        dict.fromkeys(
            column if frame_of(column) else at_frame(column, frame)
            for frame in frames
            for column in task.inputs
        )
    )


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
        self._named, self._task_name = f"network {config.model.name!r}", config.task.name
        self._bfloat16 = config.precision == "bfloat16"

    def predict(self, batch: Batch, frames: Sequence[str] = FIRST) -> dict[str, Tensor]:
        """The live prediction, with a gradient, in the module's present mode. All frames go
        through the network together, as one batch; a quantity that is not predicted frame by frame
        comes from the first. TaskrayError where a shape is wrong."""
        columns = self.to_device(batch).tensors
        parts = [self.task.network_input(_frame(columns, frame)) for frame in frames]
        inputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        if inputs.dim() == 4:  # only images have a memory format
            inputs = inputs.contiguous(memory_format=self.layout)
        with self._precision(), naming_cause(lambda: f"{self._named} on {_shape(inputs)}"):
            output = self._forward(inputs)
        with naming_cause(lambda: f"what task {self._task_name!r} makes of the network's output"):
            prediction = {
                at_frame(quantity, frame): values
                for frame, part in zip(frames, _split(output, len(frames)), strict=True)
                for quantity, values in self.task.predict(part).items()
                if not frame or self.task.is_per_frame(quantity)
            }
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

    def pictures(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps ``[B, C, H, W]`` of how the network came to its prediction, by title: what its
        method ``pictures`` returns for its input. None of a network without this method."""
        draw: Callable[[Tensor], dict[str, Tensor]] | None = getattr(self.module, "pictures", None)
        if draw is None:
            return {}
        trains = self.module.training
        self.module.eval()
        try:
            return draw(self.task.network_input(columns))
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
        expected = [
            at_frame(quantity, frame)
            for frame in frames
            for quantity in self.task.quantities
            if not frame or self.task.is_per_frame(quantity)
        ]
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


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _split(output: Output, count: int) -> list[Output]:
    """A network's output (float32), one for each frame."""
    if isinstance(output, Tensor):
        return list(output.float().chunk(count))
    parts = {head: part.float().chunk(count) for head, part in output.items()}
    return [{head: part[number] for head, part in parts.items()} for number in range(count)]


def _frame(columns: Mapping[str, Tensor], frame: str) -> Mapping[str, Tensor]:
    """The columns of one frame under the names of the first."""
    if not frame:
        return columns
    own = {quantity_of(c): values for c, values in columns.items() if frame_of(c) == frame}
    return {**columns, **own}
