"""A task made of tasks: one network that predicts the quantities of several tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from taskray.errors import InputError, TaskrayError
from taskray.job import plugins
from taskray.job.config import Plugin
from taskray.models.heads import at_scale, head_and_scale
from taskray.tasks.constant import Several
from taskray.tasks.ego_motion import FRAMES, stacked
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.data.readers.reader import Reader
    from taskray.tasks.head_metrics import HeadMetrics

HeadName = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
"""Part of the names of losses, metrics and weights."""


class Multi(Task):
    """Several tasks, the heads, on one network that has an output for each.

    The network gets the input of the head that reads the most columns; the columns of every other
    head must be among them. So a head that predicts from one frame alone may share the network of
    one that predicts from a pair. Its quantities are then those of the first frame only
    (:meth:`is_per_frame`), unless ``each_frame`` is set.

    Losses are named ``<head>/<term>``. Where the network returns intermediate predictions
    (:mod:`taskray.models.heads`), the prediction has their quantities, too (``depth@1``), and to
    each term the mean over their scales is added (DenseMTL eq. 6). Each head has metrics of its own
    (:class:`taskray.tasks.head_metrics.HeadMetrics`). A batch may lack the labels of a head: then
    that head has neither loss nor metric there, and a batch without any label has no loss at all
    (an empty mapping).

    Args:
        heads: the tasks by head, each with one head of its own and with quantities that no other
            predicts.
        unlabelled: heads whose labels are never read: they learn from relations alone.
        full_names: every metric is named ``<head>/<name>``, not only one that two heads share.
        each_frame: the network predicts the heads of one frame from the first frame of its input
            alone (``frames_and_pairs``), so they predict on any frame.
        frames: 2: the network gets pairs of frames also where every head reads one frame.
    """

    def __init__(
        self,
        heads: Mapping[str, Task],
        unlabelled: Collection[str] = (),
        full_names: bool = False,
        each_frame: bool = False,
        frames: Literal[1, 2] = 1,
    ) -> None:
        self._heads, self._each_frame = dict(heads), each_frame
        self._labelled = {h: t for h, t in heads.items() if h not in unlabelled}
        self._leader = max(heads.values(), key=lambda t: (len(t.inputs), t.passes))
        _check_heads(self._heads, self._leader)
        self._full_names = full_names
        self.quantities = tuple(q for t in heads.values() for q in t.quantities)
        self.labels = tuple(dict.fromkeys(c for t in self._labelled.values() for c in t.labels))
        self.inputs, self.passes = self._leader.inputs, self._leader.passes
        self.in_channels = self._leader.in_channels
        self._makes_pairs = frames == 2 and self.inputs != FRAMES
        if self._makes_pairs:
            if self.inputs != FRAMES[:1]:
                raise InputError(
                    "frames", f"got 2 with heads that read {_listed(self.inputs)}, expected 1"
                )
            self.inputs, self.in_channels = FRAMES, 2 * self.in_channels
        self.out_channels = {h: c for h, t in heads.items() for c in t.out_channels.values()}
        self.network_arguments = {
            name: value for t in heads.values() for name, value in t.network_arguments.items()
        }
        self.per_frame = all(map(self.is_per_frame, self.quantities))

    @property
    def heads(self) -> Mapping[str, Task]:
        return self._heads

    def is_per_frame(self, quantity: str) -> bool:
        return any(
            task.is_per_frame(quantity) and (self._each_frame or task.inputs == self.inputs)
            for task in self._heads.values()
            if quantity in task.quantities
        )

    def check_labels(self, reader: Reader) -> None:
        for task in self._labelled_in(reader.columns).values():
            task.check_labels(reader)

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        for task in self._labelled_in(batch).values():
            task.check_batch(batch)

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        heads = self._labelled_in(batch).values()
        return [found for task in heads for found in task.label_values(batch)]

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As of the head that reads the most columns."""
        return (
            stacked(batch, reverse=False)
            if self._makes_pairs
            else self._leader.network_input(batch)
        )

    def predict(self, output: Any) -> dict[str, Tensor]:
        """All quantities; a head that needs fewer passes than the network makes gets the first."""
        outputs = {next(iter(self._heads)): output} if isinstance(output, Tensor) else output
        names = {name: head_and_scale(name) for name in outputs}
        final = {head for head, scale in names.values() if scale is None}
        if final != self._heads.keys() or {head for head, _ in names.values()} != final:
            raise TaskrayError(
                f"the network returns {_listed(outputs)}, expected a tensor for each head: "
                f"{_listed(self._heads)}"
            )
        prediction: dict[str, Tensor] = {}
        for name in (*self._heads, *(n for n in names if n not in self._heads)):
            head, scale = names[name]
            task = self._heads[head]
            rows = len(outputs[name]) // self.passes * task.passes
            found = task.predict(outputs[name][:rows])
            if scale is not None:
                found = {at_scale(quantity, scale): values for quantity, values in found.items()}
            prediction |= found
        return prediction

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The losses ``<head>/<term>`` of the heads whose labels are in the batch."""
        scales = _intermediate(prediction)
        return {
            f"{head}/{term}": value
            for head, task in self._labelled_in(batch).items()
            for term, value in _at_all_scales(task, prediction, scales, batch).items()
        }

    def constant(self) -> Several:
        """The constants of the labelled heads that have one."""
        constants = {head: task.constant() for head, task in self._labelled.items()}
        return Several(
            *((c, self._labelled[head].labels) for head, c in constants.items() if c is not None)
        )

    def metric(self) -> HeadMetrics:
        from taskray.tasks.head_metrics import HeadMetrics  # see Task: torchmetrics is slow

        return HeadMetrics(
            {head: task.metric() for head, task in self._labelled.items()},
            {head: task.labels for head, task in self._labelled.items()},
            self._full_names,
        )

    def _labelled_in(self, columns: Collection[str]) -> dict[str, Task]:
        """The heads whose labels are all among the columns."""
        return {h: t for h, t in self._labelled.items() if all(c in columns for c in t.labels)}


def multi(
    heads: Annotated[dict[HeadName, Plugin], Field(min_length=1)],
    full_names: bool = False,
    each_frame: bool = False,
    frames: Literal[1, 2] = 1,
) -> Multi:
    """A task made of tasks (:class:`Multi`), from their descriptions in a job.

    Args:
        heads: a task by head: a name, or a name with arguments, as under ``task``
            (``{depth: depth, normals: {name: normals, loss: l1}}``).
        full_names: every metric is named ``<head>/<name>``, not only one that two heads share: so
            it has the same name whatever other heads there are.
        each_frame: beside heads that read a pair of frames, heads that read one are predicted from
            that one alone, on any frame of a row (``depth_2``). The network must be one that does
            so: ``frames_and_pairs``.
        frames: 2: the network gets pairs of frames also where every head reads one frame.
    """
    tasks = {
        head: plugins.build("task", task.name, task.arguments, f"heads.{head}")
        for head, task in heads.items()
    }
    return Multi(tasks, full_names=full_names, each_frame=each_frame, frames=frames)


def _intermediate(prediction: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The intermediate predictions, one mapping for each scale, by quantity."""
    by_scale: dict[int, dict[str, Tensor]] = {}
    for name, values in prediction.items():
        quantity, scale = head_and_scale(name)
        if scale is not None:
            by_scale.setdefault(scale, {})[quantity] = values
    return list(by_scale.values())


def _at_all_scales(
    task: Task,
    prediction: Mapping[str, Tensor],
    scales: Sequence[Mapping[str, Tensor]],
    batch: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A head's terms: those of its final prediction plus the mean over intermediate ones."""
    terms = task.loss(prediction, batch)
    further = [task.loss(found, batch) for found in scales if {*task.quantities} <= found.keys()]
    return {
        term: value + torch.stack([found[term] for found in further]).mean() if further else value
        for term, value in terms.items()
    }


def _check_heads(heads: Mapping[str, Task], leader: Task) -> None:
    """Raise InputError unless the heads fit one network."""
    owners: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    for head, task in heads.items():
        key = f"heads.{head}"
        if len(task.heads) > 1:
            raise InputError(
                key, f"got a task with the heads {_listed(task.heads)}, expected those themselves"
            )
        if not set(task.inputs) <= set(leader.inputs) or task.passes > leader.passes:
            raise InputError(
                key,
                f"reads {_listed(task.inputs)}, expected columns that the network of "
                f"{leader.quantities[0]!r} reads: {_listed(leader.inputs)}",
            )
        for quantity in task.quantities:
            if quantity in owners:
                raise InputError(key, f"predicts {quantity!r}, as head {owners[quantity]!r} does")
            owners[quantity] = head
        for name, value in task.network_arguments.items():
            if arguments.setdefault(name, value) != value:
                raise InputError(key, f"needs another {name} of the network than the other heads")


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)
