"""A task's prediction by a network, as the loop makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from taskray.data.streams.batch import Batch
from taskray.job.config import TaskConfig
from taskray.loop.network import FIRST, Network
from taskray.tasks.task import Task


def predict(
    task: Task, module: nn.Module, columns: Mapping[str, Tensor], frames: Sequence[str] = FIRST
) -> dict[str, Tensor]:
    """The live prediction, in the module's present mode."""
    trains = module.training
    network = Network(task, module, TaskConfig(task="depth"), "cpu")
    module.train(trains)
    return network.predict(Batch(dict(columns)), frames)
