"""Relations inside one task: between its own live predictions, on its labelled batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from taskray.job.config import InnerRelationConfig
from taskray.loop.consistency import WeightedRelation
from taskray.loop.terms import merged


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
    head are multiplied by 1 minus its weight. Without such a term, as on a batch that has no label
    of the head, it is a loss of its own.
    """
    joined = dict(losses)
    for relation in relations:
        if (value := weighted.get(relation.name)) is None:
            continue
        terms = terms_of.get(relation.config.blend_into or "", ())
        for term in terms:
            joined[term] = (1 - relation.weight(step)) * joined[term]
        if terms:
            joined[terms[0]] = joined[terms[0]] + value
        else:
            joined = merged(joined, {relation.name: value})
    return joined
