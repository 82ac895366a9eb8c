"""The consistency losses of one task: its relations, evaluated on predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.errors import TaskrayError
from taskray.job.config import RelationConfig
from taskray.loop.metric_key import ConsistencyLoss
from taskray.loop.terms import checked_terms
from taskray.relations.opposed import Opposed
from taskray.relations.relation import Relation, at_source


@dataclass(frozen=True)
class WeightedRelation:
    """A relation with its weight in the job."""

    name: str
    relation: Relation
    config: RelationConfig
    scale: float = 1.0
    """The consuming task's own factor; 0 where the relation gives this task no gradient."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the predictions that it gets."""
        return (*self.relation.quantities, *map(at_source, self.relation.sources))

    def has_begun(self, step: int) -> bool:
        """Whether the relation ties the tasks of the job yet."""
        return step >= self.config.start_step

    def weight(self, step: int) -> float:
        """0 before ``start_step``, then rising linearly to the full weight."""
        if not self.has_begun(step):
            return 0.0
        since = step - self.config.start_step
        warmth = min(1.0, (since + 1) / max(1, self.config.warmup_steps))
        return self.scale * self.config.weight * warmth


@dataclass(frozen=True)
class ConsistencyLosses:
    """What the relations of one step give."""

    weighted: dict[str, Tensor]
    """Relation -> its loss times its weight; only those that have a gradient."""
    values: dict[ConsistencyLoss, Tensor]
    """Each relation's and each term's detached value without the weight, for the report."""
    opposed: dict[str, Tensor] = field(default_factory=dict)
    """Relation -> the loss of its own parameters, where they play against the network."""


def consistency_losses(
    relations: Sequence[WeightedRelation], known: Mapping[str, Tensor], batch: Batch, step: int
) -> ConsistencyLosses:
    """Evaluate the relations whose quantities are all ``known`` (the task's live prediction and
    its peers' stale ones, ``[B, ...]``) on a mediator batch."""
    weighted: dict[str, Tensor] = {}
    values: dict[ConsistencyLoss, Tensor] = {}
    opposed: dict[str, Tensor] = {}
    for one in relations:
        weight = one.weight(step)
        if weight == 0 or not known.keys() >= set(one.needs):
            continue
        terms = _terms(one, one.relation, known, batch)
        value = torch.stack(list(terms.values())).sum()
        if not value.requires_grad:  # no way to be more consistent
            continue
        weighted[one.name] = weight * value
        values[ConsistencyLoss(one.name)] = value.detach()
        if len(terms) > 1:
            values |= {ConsistencyLoss(one.name, t): v.detach() for t, v in terms.items()}
        if isinstance(one.relation, Opposed):
            detached = {name: prediction.detach() for name, prediction in known.items()}
            terms = _terms(one, one.relation.opponent_losses, detached, batch)
            opposed[one.name] = torch.stack(list(terms.values())).sum()
            values |= {ConsistencyLoss(one.name, t): v.detach() for t, v in terms.items()}
    return ConsistencyLosses(weighted, values, opposed)


def _terms(
    one: WeightedRelation,
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Any],
    known: Mapping[str, Tensor],
    batch: Batch,
) -> dict[str, Tensor]:
    """The terms of a relation's loss; where it fails, the shapes show more than the exception."""
    try:
        terms = loss(known, batch.tensors)
    except Exception as error:
        shapes = ", ".join(f"{q} {'x'.join(map(str, known[q].shape))}" for q in one.needs)
        kind = "" if isinstance(error, TaskrayError) else f"{type(error).__name__}: "
        raise TaskrayError(f"relation {one.name!r} failed on {shapes}: {kind}{error}") from error
    return checked_terms(terms, f"relation {one.name!r}")
