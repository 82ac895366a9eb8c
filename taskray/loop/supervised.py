"""The losses of one task on its labelled batches: its own, and those of relations inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Generator, Tensor

from taskray.data.streams.augment import augment
from taskray.data.streams.batch import Batch
from taskray.errors import naming_cause
from taskray.job.config import TaskConfig
from taskray.loop.consistency import ConsistencyLosses, consistency_losses
from taskray.loop.inner import InnerRelation, join
from taskray.loop.interfaces import Stream
from taskray.loop.meters import Meter
from taskray.loop.metric_key import MetricKey, SupervisedLoss
from taskray.loop.network import Network, labelled_frames
from taskray.loop.terms import checked_terms, merged
from taskray.models.heads import head_and_scale
from taskray.tasks.task import Task


class Supervised:
    """Draws a batch from each labelled dataset and computes the task's losses on it.

    Args:
        network: of the task.
        config: of the task.
        streams: of the labelled datasets; none for a task without labels.
        relations: inside the task.
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
        relations: Sequence[InnerRelation] = (),
    ) -> None:
        self.network, self.config, self.streams = network, config, streams
        self.random, self.meter, self.relations = random, meter, relations
        related = [q for one in relations for q in one.relation.quantities]
        self._frames = labelled_frames(network.task, related)
        self.predictions: dict[str, Tensor] = {}
        """Of the last :meth:`losses`, detached: each quantity on the first dataset with labels of
        its head."""
        self._what = f"the loss of task {config.task.name!r}"
        self._batches: list[Batch] = []

    def losses(self, step: int) -> dict[str, Tensor]:
        """The losses of a step, by term, on the next batch of each dataset; those of a relation are
        added up over the datasets. TaskrayError where two datasets give the same term."""
        self.predictions = {}
        batches = [self._next_batch(stream) for stream in self.streams]
        self._batches = [
            self.network.to_device(augment(b, self.config.augment, self.random, labelled=True))
            for b in without_empty_labels(batches, self.network.task)
        ]
        losses, shown = self._losses_on_batches(step)
        for key, value in shown:
            self.meter.add(key, value)
        return losses

    def again(self, step: int) -> dict[str, Tensor]:
        """The losses on the batches of :meth:`losses` once more, with the present weights;
        detached."""
        losses, _ = self._losses_on_batches(step)
        return {name: value.detach() for name, value in losses.items()}

    def _losses_on_batches(
        self, step: int
    ) -> tuple[dict[str, Tensor], list[tuple[MetricKey, Tensor]]]:
        """The losses of a step, and the values for the report."""
        losses: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        shown: list[tuple[MetricKey, Tensor]] = []
        for batch in self._batches:
            terms, related = self._losses_on(batch, step)
            losses = merged(losses, terms)
            for name, value in related.weighted.items():
                weighted[name] = weighted[name] + value if name in weighted else value
            shown += related.values.items()
        shown += [(SupervisedLoss(term), value.detach()) for term, value in losses.items()]
        if not weighted:
            return losses, shown
        heads = self.network.task.heads
        terms_of = {
            head: [t for t in losses if len(heads) == 1 or t.startswith(f"{head}/")]
            for head in heads
        }
        return join(losses, weighted, self.relations, terms_of, step), shown

    def _next_batch(self, stream: Stream) -> Batch:
        with self.meter.waiting():
            batch = stream.next()
        self.network.task.check_batch(batch.tensors)
        return batch

    def _losses_on(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], ConsistencyLosses]:
        prediction = self.network.predict(batch, self._frames)
        self._keep(prediction, batch)
        with naming_cause(lambda: self._what):
            loss = self.network.task.loss(prediction, batch.tensors)
            terms = checked_terms(loss, self._what)
        fitting = [one for one in self.relations if one.fits(batch.tensors)]
        return terms, consistency_losses(fitting, prediction, batch, step)

    def _keep(self, prediction: Mapping[str, Tensor], batch: Batch) -> None:
        for head in self.network.task.heads.values():
            if all(label in batch.tensors for label in head.labels):
                for name, values in prediction.items():
                    if head_and_scale(name)[0] in head.quantities:
                        self.predictions.setdefault(name, values.detach())

    def state_dict(self) -> list[Any]:
        """The position in each dataset."""
        return [stream.state_dict() for stream in self.streams]

    def load_state_dict(self, positions: Sequence[Any]) -> None:
        for stream, position in zip(self.streams, positions, strict=True):
            stream.load_state_dict(position)


def without_empty_labels(batches: Sequence[Batch], task: Task) -> list[Batch]:
    """The batches of a step without the labels of those heads, of several, for which none is valid
    in any of them: their losses would be 0, which a weighting would take for a head that has
    nothing more to learn. Batches without any valid label are unchanged."""
    if len(task.heads) == 1:
        return list(batches)
    there, empty = set[str](), set[str]()
    for head in task.heads.values():
        labelled = [b for b in batches if all(column in b.tensors for column in head.labels)]
        if labelled:
            valid = any(_any_valid(head, batch) for batch in labelled)
            (there if valid else empty).update(head.labels)
    empty -= there
    if not there or not empty:
        return list(batches)
    return [
        replace(b, tensors={n: t for n, t in b.tensors.items() if n not in empty}) for b in batches
    ]


def _any_valid(head: Task, batch: Batch) -> bool:
    """Whether a label of the head is valid in a batch that has its columns. The first row answers
    for most batches, and to look at all of them costs a hundredth of a step."""
    columns = {name: batch.tensors[name] for name in head.labels}
    for rows in (slice(1), slice(1, None)):
        found = head.label_values({name: values[rows] for name, values in columns.items()})
        if not found or any(bool(label.valid.any()) for label in found):
            return True
    return False
