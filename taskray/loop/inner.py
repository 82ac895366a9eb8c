"""Relations inside one task: between its own live predictions, on its labelled batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from taskray.job.config import InnerRelationConfig
from taskray.loop.consistency import WeightedRelation
from taskray.loop.terms import merged
from taskray.weighting.weighting import RELATION


@dataclass(frozen=True)
class InnerRelation(WeightedRelation):
    """A relation inside a task with its weight in the job."""

    config: InnerRelationConfig

    def fits(self, columns: Mapping[str, Tensor]) -> bool:
        """Whether the labels that it needs are in the batch."""
        return all(label in columns for label in self.relation.labels)


def join(
    losses: Mapping[str, Tensor],
    weighted: Mapping[str, Tensor],
    relations: Sequence[InnerRelation],
    terms_of: Mapping[str, Sequence[str]],
    step: int,
) -> dict[str, Tensor]:
    """The losses of one step on labels together with those of the relations.

    Args:
        losses: the task's losses, by term.
        weighted: relation -> its loss times its weight.
        relations: all relations of the task.
        terms_of: head -> those of its terms that are among the losses.
        step: of the task.

    A relation with ``blend_into`` becomes part of the first term of that head, and all terms of the
    head are multiplied by 1 minus its weight, for each such relation. Without such a term, as on a
    batch that has no label of the head, it is a loss of its own, which belongs to no head.
    """
    joined = dict(losses)
    blended = {r.name: terms_of.get(r.config.blend_into or "", ()) for r in relations}
    found = [r for r in relations if r.name in weighted]
    for relation in found:
        for term in blended[relation.name]:
            joined[term] = (1 - relation.weight(step)) * joined[term]
    for relation in found:
        value, terms = weighted[relation.name], blended[relation.name]
        if terms:
            joined[terms[0]] = joined[terms[0]] + value
        else:
            joined = merged(joined, {RELATION + relation.name: value})
    return joined
