"""What a task is: the quantities it predicts, how a network's output becomes them, its
supervised loss and its metrics.

A task of your own subclasses :class:`Task`; a job names it by import path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from taskray.schema import quantity_of

if TYPE_CHECKING:  # importing it takes longer than torch itself: only who measures pays
    from torchmetrics import Metric

    from taskray.data.readers.reader import Reader

Output = Tensor | Mapping[str, Tensor]
"""What a network gives: one tensor ``[B, C, H, W]``, or several by name; float32."""


class Task(ABC):
    """One vision task. Its ``__init__`` arguments are what a job may set under ``task``."""

    quantities: tuple[str, ...]
    """Names of the predicted quantities (``schema.QUANTITIES``); the first names the task."""
    per_frame: bool = True
    """Whether the network sees one frame at a time. Then a relation may ask for its quantities on
    any frame of the mediator's rows (``depth_2``); else they are predicted as they are named."""
    inputs: tuple[str, ...] = ("image",)
    """Dataset columns that the network needs."""
    labels: tuple[str, ...]
    """Dataset columns that the supervised loss and the metrics need."""
    in_channels: int = 3
    """Channels of the network's input."""
    out_channels: int
    """Channels that the network must give."""
    network_arguments: Mapping[str, Any] = {}
    """What else a network for this task is built with, and a job does not set twice: the ``grid``
    of a point cloud."""

    def predicts(self, quantity: str) -> bool:
        """Whether this task can give a quantity: ``depth_2`` is depth on the second frame."""
        return (quantity_of(quantity) if self.per_frame else quantity) in self.quantities

    def check_labels(self, reader: Reader) -> None:
        """Refuse (InputError) a dataset to learn from, or to be measured on, whose labels this
        task would misread. Any will do, unless a task says so."""
        return None

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse (TaskrayError) labels that the loss could not take. Called before a batch leaves
        the CPU: a look at the values on a GPU would hold the step up."""
        return None

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The network's input ``[B, in_channels, H, W]`` from the columns of a batch."""
        return batch["image"]

    @abstractmethod
    def predict(self, output: Any) -> dict[str, Tensor]:
        """Quantities in the units of ``schema`` from the network's output (:data:`Output`),
        ``[B, out_channels, H, W]`` unless the network is made for this task."""

    @abstractmethod
    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Named scalar losses against the labels; their sum is minimised. A batch without one
        valid label gives a loss of 0 that still has a gradient (of zeros), never NaN."""

    @abstractmethod
    def metric(self) -> Metric:
        """A fresh metric with ``update(prediction, batch)`` and ``compute() -> dict[str, Tensor]``;
        names and units as in the result file (ratios in [0, 1], angles in degrees)."""
