"""The losses of one task on its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor

from taskray.data.streams.augment import augment
from taskray.errors import naming_cause
from taskray.job.config import TaskConfig
from taskray.loop.interfaces import Stream
from taskray.loop.meters import Meter
from taskray.loop.metric_key import SupervisedLoss
from taskray.loop.network import Network
from taskray.loop.terms import checked_terms, merged


class Supervised:
    """Draws a batch from each labelled dataset and computes the task's losses on it.

    Args:
        network: of the task.
        config: of the task.
        streams: of the labelled datasets; none for a task without labels.
        random: of the augmentation.
        meter: gets the losses, and the time of waiting for batches.
    """

    def __init__(
        self,
        network: Network,
        config: TaskConfig,
        streams: Sequence[Stream],
        random: Generator,
        meter: Meter,
    ) -> None:
        self.network, self.config, self.streams = network, config, streams
        self.random, self.meter = random, meter
        self._what = f"the loss of task {config.task.name!r}"

    def losses(self) -> dict[str, Tensor]:
        """The task's losses, by term, on the next batch of each dataset. TaskrayError where two
        datasets give the same term."""
        losses: dict[str, Tensor] = {}
        for stream in self.streams:
            losses = merged(losses, self._losses_on(stream))
        for term, value in losses.items():
            self.meter.add(SupervisedLoss(term), value.detach())
        return losses

    def _losses_on(self, stream: Stream) -> dict[str, Tensor]:
        task, network = self.network.task, self.network
        with self.meter.waiting():
            batch = stream.next()
        task.check_batch(batch.tensors)
        batch = augment(batch, self.config.augment, self.random, labelled=True)
        batch = network.to_device(batch)
        prediction = network.predict(batch)
        with naming_cause(lambda: self._what):
            return checked_terms(task.loss(prediction, batch.tensors), self._what)

    def state_dict(self) -> list[Any]:
        """The position in each dataset."""
        return [stream.state_dict() for stream in self.streams]

    def load_state_dict(self, positions: Sequence[Any]) -> None:
        for stream, position in zip(self.streams, positions, strict=True):
            stream.load_state_dict(position)
