"""What a task is: the quantities it predicts, how a network's output becomes them, its
supervised loss and its metrics.

A task of your own subclasses :class:`Task`; a job names it by import path. A task made of tasks is
:class:`taskray.tasks.multi.Multi`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from taskray.schema import quantity_of

if TYPE_CHECKING:  # importing it takes longer than importing torch: it is imported to measure only
    from torchmetrics import Metric

    from taskray.data.readers.reader import Reader
    from taskray.tasks.constant import Constant

Output = Tensor | Mapping[str, Tensor]
"""What a network returns: the tensor of its one head (``[B, C, H, W]`` unless the network is made
for the task), or ``{head: tensor}``; float32."""


@dataclass(frozen=True)
class LabelValues:
    """What a batch has of one label: ``values`` (any shape), which of the labels are ``valid`` (any
    shape, bool), and the values that are ``expected`` (``0.1 to 10 m``)."""

    label: str
    values: Tensor
    valid: Tensor
    expected: str


class Task(ABC):
    """One vision task. Its ``__init__`` arguments are what a job may set under ``task``."""

    quantities: tuple[str, ...]
    """Names of the predicted quantities (``schema.QUANTITIES``); the first names the task."""
    per_frame: bool = True
    """Whether the network gets one frame at a time. Then a relation may use the quantities of any
    frame of the mediator's rows (``depth_2``); else they are predicted as they are named. Ask
    :meth:`is_per_frame`, which a task with several heads answers for each quantity."""
    passes: int = 1
    """Network inputs for each row of a batch: 2 where the network gets a pair in both orders."""
    inputs: tuple[str, ...] = ("image",)
    """Dataset columns that the network needs."""
    labels: tuple[str, ...]
    """Dataset columns that the supervised loss and the metrics need."""
    in_channels: int = 3
    """Channels of the network's input."""
    out_channels: Mapping[str, int]
    """Channels that the network must return, by head. A simple task has one head, named after its
    first quantity: ``{"depth": 1}``."""
    network_arguments: Mapping[str, Any] = {}
    """Further arguments of a network for this task, which a job does not set a second time: the
    ``grid`` of a point cloud."""

    @property
    def heads(self) -> Mapping[str, Task]:
        """The tasks that this one is made of, by head; a simple task is its own only one."""
        return {self.quantities[0]: self}

    def is_per_frame(self, quantity: str) -> bool:
        """Whether a quantity is predicted on any frame; see :attr:`per_frame`."""
        return self.per_frame

    def predicts(self, quantity: str) -> bool:
        """Whether this task predicts a quantity: ``depth_2`` is depth on the second frame."""
        if quantity in self.quantities:
            return True
        base = quantity_of(quantity)
        return base in self.quantities and self.is_per_frame(base)

    def check_labels(self, reader: Reader) -> None:
        """Raise InputError for a dataset to learn from, or to be measured on, whose labels this
        task would misread. By default any dataset is accepted."""
        return None

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Raise TaskrayError for labels that the loss cannot take. Called before a batch leaves
        the CPU: to read the values on a GPU would delay the step."""
        return None

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        """The labels of a batch that may be invalid, one entry for each label; a run whose dataset
        has no valid value of one of them is refused. By default every label is valid."""
        return ()

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The network's input ``[passes * B, in_channels, H, W]`` from the columns of a batch."""
        return batch["image"]

    @abstractmethod
    def predict(self, output: Any) -> dict[str, Tensor]:
        """Quantities in the units of ``schema`` from the network's output (:data:`Output`)."""

    @abstractmethod
    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Named scalar losses against the labels. A batch without one valid label gives a loss of
        0 that still has a gradient (of zeros), never NaN."""

    @abstractmethod
    def metric(self) -> Metric:
        """A fresh metric with ``update(prediction, batch)`` and ``compute() -> dict[str, Tensor]``;
        names and units as in the result file (ratios in [0, 1], angles in degrees)."""

    def constant(self) -> Constant | None:
        """A fresh constant predictor, the yardstick of this task's metrics
        (:mod:`taskray.tasks.constant`); None: there is none."""
        return None
