"""A weighting: how the losses of one step become one gradient.

            losses of heads                 every other loss (of a relation, of a discriminator)
    depth/l1  depth/smooth  classes/ce                     depth_normals
        └───── + ─────┘         │                                │  has its weight already
             depth           classes                             │
               └── weighting ───┘                                │
                       └─────────────────── + ───────────────────┘──▶ gradient

A weighting combines *heads*, as the papers do, so the terms of one head are added first. A loss of
no head keeps the weight that its own section of the job gives it, and is added to the result.

A weighting of your own subclasses :class:`Weighting`; a job names it by import path under
``tasks.<name>.weighting``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskray.errors import InputError, TaskrayError

RELATION = "relation:"
"""What the name of a relation begins with where a loss or a weight of it is named beside those of
the task."""


class Weighting(nn.Module):
    """Its ``__init__`` arguments are what a job may set; ``heads`` comes from taskray.

    One that combines the losses' values defines :meth:`forward`; one that compares their gradients
    defines :meth:`backward`. Parameters are trained by the task's optimizer together with the
    network's; parameters, buffers and :meth:`state` are part of the checkpoint.

    Args:
        heads: the heads of the task that have labels, in its order. A batch may lack any of them.
    """

    def __init__(self, heads: Sequence[str] = ()) -> None:
        super().__init__()
        self.heads = tuple(heads)

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """One scalar from ``{head: scalar}``, at least one, those of the batch's labels."""
        raise NotImplementedError

    def backward(
        self,
        losses: Mapping[str, Tensor],
        added: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        """Put the gradient of this step into the parameters' ``grad``, which is empty before.

        Args:
            losses: the task's losses on its labels, ``{name: scalar}``; may be empty.
            added: losses that are only added: each has its weight already; may be empty.
            parameters: all that the task learns, the network's first.

        Returns:
            The objective, a detached scalar, for the report.
        """
        of_heads, rest = self.by_head(losses)
        total = total_of([*rest, *added.values()])
        if of_heads:
            total = self(of_heads) if total is None else self(of_heads) + total
        assert total is not None, "a step has a loss"
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    def stepped(self, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """The parameters were updated. ``losses()`` are those of :meth:`backward` on the same
        batches after the update, detached; they cost a forward pass, so ask only where they are
        needed."""
        return None

    def by_head(self, losses: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The sum of each head's losses, in the order of ``heads``, and the losses of no head.

        A loss belongs to the head whose name it has before a ``/``; all losses of a task with one
        head belong to that, but those of relations, whose names begin with ``RELATION``.
        """
        terms: dict[str, list[Tensor]] = {head: [] for head in self.heads}
        rest: list[Tensor] = []
        for name, value in losses.items():
            terms.get(self.head_of(name) or "", rest).append(value.reshape(()))
        return {h: _sum(values) for h, values in terms.items() if values}, rest

    def head_of(self, name: str) -> str | None:
        """The head that a loss belongs to; None: to none of them."""
        if name.startswith(RELATION):
            return None
        if len(self.heads) == 1:
            return self.heads[0]
        head, slash, _ = name.partition("/")
        return head if slash and head in self.heads else None

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides parameters and buffers: tensors, numbers, text,
        lists, tuples and dicts of them."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        return None


class Sum(Weighting):
    """The sum of all losses. A head without labels in a batch has no part in that step."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        return _sum(list(losses.values()))


class Fixed(Sum):
    """The sum with a constant factor on some losses.

    Args:
        weights: factor by head (``depth``) or by loss (``depth/l1``, which replaces that of its
            head); 1 where none is given.
    """

    def __init__(self, weights: dict[str, float], heads: Sequence[str] = ()) -> None:
        super().__init__(heads)
        self.weights = dict(weights)
        for name in weights:
            known = name in self.heads or self.head_of(name) is not None
            if len(self.heads) > 1 and not known:
                raise InputError(
                    f"weights.{name}", f"no such head, expected one of {', '.join(self.heads)}"
                )

    def backward(
        self,
        losses: Mapping[str, Tensor],
        added: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        weighted = {name: self._factor(name) * value for name, value in losses.items()}
        return super().backward(weighted, added, parameters)

    def _factor(self, name: str) -> float:
        return self.weights.get(name, self.weights.get(self.head_of(name) or "", 1.0))


def total_of(losses: Sequence[Tensor]) -> Tensor | None:
    """Their sum; None of nothing."""
    return _sum(losses) if losses else None


def check_positive(losses: Mapping[str, Tensor], name: str) -> None:
    """Raise TaskrayError for a loss that is not above 0. On CUDA the check waits for the device."""
    values: list[float] = torch.stack(list(losses.values())).tolist()
    for head, value in zip(losses, values, strict=True):
        if value <= 0:
            raise TaskrayError(
                f"weighting {name!r}: got {value:g} as the loss of head {head!r}, "
                "expected more than 0"
            )


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return losses[0].reshape(()) if len(losses) == 1 else torch.stack(list(losses)).sum()
