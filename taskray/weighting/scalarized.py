"""Weightings that combine the values of the losses: those of torchjd, and FLS.

``taskray.weighting.scalarized:UW`` is ``torchjd.scalarization.UW``, and so on, with the arguments
of that class; our names for them are in ``taskray.job.plugins.BUILTIN``.

Sums of weights: ``equal`` and ``random`` have weights that sum to 1, so their steps are n times
smaller than those of ``sum`` and ``dwa``, whose weights sum to n, the number of heads.

``uncertainty`` takes every loss as that of a regression, L / (2 sigma^2) + log sigma. The form of
the paper for classes, L / sigma^2 + log sigma, has another sigma and, once that is learnt, the same
weight, 1 / (2 L).

A head without labels in a batch has its last loss in that step, as a constant: it gets no gradient,
and the other heads keep the weights that they would have beside it. Before its first loss that
constant is 1, which changes no logarithm and no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.weighting.borrowed import borrowed, hidden_state, load_hidden_state, make
from taskray.weighting.weighting import Weighting, check_positive


class Carrying(Weighting):
    """Gives the losses of all heads as one tensor, in every step.

    Args:
        heads: see :class:`Weighting`.
        needs_positive: the weighting's name, where it needs losses above 0; else empty.
    """

    last: Tensor

    def __init__(self, heads: Sequence[str], needs_positive: str = "") -> None:
        super().__init__(heads)
        self.needs_positive = needs_positive
        self.register_buffer("last", torch.ones(len(self.heads)))

    def values(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The losses of all heads, ``[n]``. TaskrayError for one that is not above 0 and has to
        be."""
        if self.needs_positive:
            check_positive(losses, self.needs_positive)
        values = torch.stack(
            [losses[h] if h in losses else self.last[i] for i, h in enumerate(self.heads)]
        )
        self.last = values.detach()
        return values


class Scalarized(Carrying):
    """A scalarizer of torchjd as a weighting.

    Args:
        heads: see :class:`Weighting`.
        scalarizer: makes it for these heads.
        needs_positive: see :class:`Carrying`.
    """

    def __init__(
        self,
        heads: Sequence[str],
        scalarizer: Callable[[Sequence[str]], nn.Module],
        needs_positive: str = "",
    ) -> None:
        super().__init__(heads, needs_positive)
        self.scalarizer = scalarizer(self.heads)

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        value: Tensor = self.scalarizer(self.values(losses))
        return value

    def state(self) -> dict[str, Any]:
        return hidden_state(self.scalarizer)

    def load_state(self, state: Mapping[str, Any]) -> None:
        load_hidden_state(self.scalarizer, state, self.last.device)


class DWA(Scalarized):
    """Dynamic weight average (Liu et al., CVPR 2019): a head's weight follows the ratio of its mean
    losses over the last two windows; ones at first.

    Args:
        temperature: a larger value makes the weights more equal.
        window: steps on labels in a mean (an epoch in the paper).
    """

    def __init__(
        self,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
        window: Annotated[int, Field(ge=1)] = 100,
        heads: Sequence[str] = (),
    ) -> None:
        arguments = {"temperature": temperature}
        super().__init__(heads, partial(make, "torchjd.scalarization:DWA", arguments))
        self.window = window

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        total = super().forward(losses)
        scalarizer: Any = self.scalarizer
        if scalarizer._n_batches >= self.window:
            scalarizer.step()
        return total


class Followed(Scalarized):
    """A scalarizer that learns from how much a step has changed the losses (FAMO): the task
    predicts a second time after each step on labels."""

    def stepped(self, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        of_heads, _ = self.by_head(losses())
        if of_heads:
            scalarizer: Any = self.scalarizer
            scalarizer.update(self.values(of_heads))


class Focused(Carrying):
    """The focused loss strategy of MultiNet++ (Chennupati et al., 2019, eq. 3): the geometric mean
    of all losses times the geometric mean of those in focus. It needs losses above 0.

    Args:
        focus: the heads in focus, at least one.
    """

    def __init__(
        self, focus: Annotated[list[str], Field(min_length=1)], heads: Sequence[str] = ()
    ) -> None:
        super().__init__(heads, "focused")
        for head in focus:
            if head not in self.heads:
                raise InputError(
                    "focus", f"no head {head!r}, expected some of {', '.join(self.heads)}"
                )
        self.focus = [self.heads.index(head) for head in focus]

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        logarithms = self.values(losses).log()
        return (logarithms.mean() + logarithms[self.focus].mean()).exp()


WRAPPERS: dict[str, Callable[..., Weighting]] = {
    "FAMO": partial(Followed, needs_positive="famo"),
    "GeometricMean": partial(Scalarized, needs_positive="geometric"),
}
"""How a scalarizer becomes a weighting, where it is not :class:`Scalarized` alone."""


def __getattr__(name: str) -> Any:
    """The scalarizer of torchjd that has this name, as a weighting."""
    return borrowed("torchjd.scalarization", name, WRAPPERS.get(name, Scalarized))
