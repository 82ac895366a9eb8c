"""A batch becomes a task's prediction: one pass of its network over the frames asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from taskray.schema import at_frame, frame_of, quantity_of
from taskray.tasks.task import Output, Task

FIRST = ("",)
"""The first frame alone: what labels and metrics are about."""


def frames_of(task: Task, quantities: Sequence[str]) -> tuple[str, ...]:
    """The suffixes of the frames on which a task predicts these quantities; the first frame for
    those that are not predicted frame by frame, and if none are named."""
    frames = {"" if q in task.quantities else frame_of(q) for q in quantities}
    return tuple(sorted(frames)) or FIRST


def inputs_of(task: Task, frames: Sequence[str]) -> tuple[str, ...]:
    """The columns that a task's network needs to predict on these frames."""
    return tuple(dict.fromkeys(at_frame(c, frame) for frame in frames for c in task.inputs))


def predicted_on(task: Task, frames: Sequence[str]) -> tuple[str, ...]:
    """What a task predicts from these frames, named as in ``schema``."""
    return tuple(
        at_frame(quantity, frame)
        for frame in frames
        for quantity in task.quantities
        if not frame or task.is_per_frame(quantity)
    )


def predict(
    task: Task,
    network: Callable[[Tensor], Output],
    columns: Mapping[str, Tensor],
    frames: Sequence[str] = FIRST,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    """A task's quantities (float32) on these frames, named as in ``schema``. The frames pass the
    network together, as one batch. A quantity that is not predicted frame by frame comes from the
    first frame alone."""
    parts = [task.network_input(_frame(columns, frame)) for frame in frames]
    inputs = parts[0] if len(parts) == 1 else torch.cat(parts)
    if inputs.dim() == 4:  # only images have a memory format
        inputs = inputs.contiguous(memory_format=layout)
    outputs = _split(network(inputs), len(frames))
    return {
        at_frame(quantity, frame): values
        for frame, output in zip(frames, outputs, strict=True)
        for quantity, values in task.predict(output).items()
        if not frame or task.is_per_frame(quantity)
    }


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
