"""A batch becomes a task's prediction: one pass of its network over the frames asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from taskray.schema import at_frame, frame_of, quantity_of
from taskray.tasks.task import Output, Task

FIRST = ("",)
"""The first frame alone: what labels and metrics are about."""


def frames_of(quantities: Sequence[str]) -> tuple[str, ...]:
    """The suffixes of the frames on which these quantities lie; the first frame if none are
    named."""
    return tuple(sorted({frame_of(q) for q in quantities})) or FIRST


def inputs_of(task: Task, frames: Sequence[str]) -> tuple[str, ...]:
    """The columns that a task's network needs to predict on these frames."""
    if not task.per_frame:
        return task.inputs
    return tuple(dict.fromkeys(at_frame(c, frame) for frame in frames for c in task.inputs))


def predict(
    task: Task,
    network: Callable[[Tensor], Output],
    columns: Mapping[str, Tensor],
    frames: Sequence[str] = FIRST,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    """A task's quantities (float32) on these frames, named as in ``schema``. The frames go
    through the network together, as one batch."""
    frames = frames if task.per_frame else FIRST
    parts = [task.network_input(_frame(columns, frame)) for frame in frames]
    inputs = parts[0] if len(parts) == 1 else torch.cat(parts)
    if inputs.dim() == 4:  # only images have a memory format
        inputs = inputs.contiguous(memory_format=layout)
    output = network(inputs)
    if isinstance(output, Tensor):
        quantities = task.predict(output.float())
    else:
        quantities = task.predict({name: part.float() for name, part in output.items()})
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
