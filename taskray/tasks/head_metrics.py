"""The metrics of a task with several heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class HeadMetrics(Metric):  # type: ignore[misc]
    """The metrics of each head, over the batches that have its labels. A head that no batch had
    labels for has no metrics; before the first batch all have, and their values are undefined.

    A name that two heads share becomes ``<head>/<name>``. Heads with metrics of one class share
    their names in any case, so that a name does not depend on the labels of a dataset.

    Args:
        metrics: by head.
        labels: the columns that the metric of a head needs.
        full_names: every name becomes ``<head>/<name>``.
    """

    full_state_update = False

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        labels: Mapping[str, Collection[str]],
        full_names: bool = False,
    ) -> None:
        super().__init__()
        self.heads: Any = torch.nn.ModuleDict(metrics)
        self.labels = dict(labels)
        kinds = Counter(type(metric) for metric in metrics.values())
        self.named = {h for h, m in metrics.items() if full_names or kinds[type(m)] > 1}

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        for head, metric in self.heads.items():
            if all(column in batch for column in self.labels[head]):
                metric.update(prediction, batch)

    def compute(self) -> dict[str, Tensor]:
        updated = [head for head, metric in self.heads.items() if metric.update_called]
        found = {head: self.heads[head].compute() for head in updated or self.heads}
        uses = Counter(name for values in found.values() for name in values)
        return {
            f"{head}/{name}" if head in self.named or uses[name] > 1 else name: value
            for head, values in found.items()
            for name, value in values.items()
        }

    def reset(self) -> None:
        super().reset()
        for metric in self.heads.values():
            metric.reset()
