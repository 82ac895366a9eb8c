"""Weightings that combine the gradients of the losses: the aggregators of torchjd.

``taskray.weighting.aggregated:PCGrad`` is ``torchjd.aggregation.PCGrad``, and so on, with the
arguments of that class; our names for them are in ``taskray.job.plugins.BUILTIN``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taskray.weighting.borrowed import (
    borrowed,
    call_once,
    hidden_state,
    load_hidden_state,
    quiet,
)
from taskray.weighting.weighting import Weighting, total_of


class Aggregated(Weighting):
    """An aggregator of torchjd as a weighting.

    The Jacobian has a row for each head and a column for each number in the *shared* parameters:
    those that the losses of more than one head reach, which is the encoder of a network with
    separate decoders. A parameter of one head gets that head's gradient. It costs a backward pass
    through the encoder for each head.

    The rows are those of the heads with labels in the batch. Each set of heads that occurs has an
    aggregator with a state of its own; a head that is alone has its gradient. Where the
    aggregator refuses so few heads (Krum and TrimmedMean have a smallest number), the step
    descends on the sum of their losses, and so does PCD without the first head, because that is
    its primary objective.

    Args:
        heads: see :class:`Weighting`.
        aggregator: makes it for some of the heads.
        needs_first: it gives the first head a role that no other head can take.
    """

    def __init__(
        self,
        heads: Sequence[str],
        aggregator: Callable[[Sequence[str]], nn.Module],
        needs_first: bool = False,
    ) -> None:
        super().__init__(heads)
        self._make, self._needs_first = aggregator, needs_first
        self._aggregators: dict[tuple[str, ...], nn.Module] = {}
        self._kept: dict[tuple[str, ...], Any] = {}
        if heads:  # a wrong argument is refused here, not in the first step
            aggregator(self.heads)
        self._refused = {n for n in range(2, len(self.heads)) if not self._takes(self.heads[:n])}

    def backward(
        self,
        losses: Mapping[str, Tensor],
        added: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        of_heads, rest = self.by_head(losses)
        values, others = list(of_heads.values()), [*rest, *added.values()]
        # A solver fails on NaN with a message of its own; the sum lets the caller find it.
        combined = self._combines(tuple(of_heads))
        if not combined or not bool(torch.stack(values).isfinite().all()):
            return _backward([*values, *others])
        rows = [
            torch.autograd.grad(
                value,
                parameters,
                allow_unused=True,
                retain_graph=bool(others) or number < len(values) - 1,
            )
            for number, value in enumerate(values)
        ]
        shared = []
        for index, (parameter, *gradients) in enumerate(zip(parameters, *rows, strict=True)):
            reached = [g for g in gradients if g is not None]
            if len(reached) > 1:
                shared.append(index)
            elif reached:
                _set_gradient(parameter, reached[0])
        if shared:
            matrix = _matrix(rows, shared, parameters)
            aggregator = self._aggregator(tuple(of_heads), matrix.device)
            with quiet():
                gradient = aggregator(matrix)
            sizes = [parameters[i].numel() for i in shared]
            for index, part in zip(shared, gradient.split(sizes), strict=True):
                _set_gradient(parameters[index], part.view_as(parameters[index]))
        total = torch.stack(values).sum().detach()
        return total + _backward(others) if others else total

    def _takes(self, heads: tuple[str, ...]) -> bool:
        try:
            call_once(self._make(heads), torch.eye(len(heads)))
        except ValueError:
            return False
        return True

    def _combines(self, heads: tuple[str, ...]) -> bool:
        """False: a step with these heads is on the sum of their losses."""
        if len(heads) < 2 or len(heads) in self._refused:
            return False
        return not self._needs_first or heads[0] == self.heads[0]

    def _aggregator(self, heads: tuple[str, ...], device: torch.device) -> nn.Module:
        """That of these heads. It is made, with the state of a checkpoint, where it is first
        used, because only the gradients show on which device it has to be."""
        if heads not in self._aggregators:
            made = self._make(heads).to(device)
            load_hidden_state(made, self._kept.pop(heads, {}), device)
            self._aggregators[heads] = made
        return self._aggregators[heads]

    def state(self) -> dict[str, Any]:
        made = {heads: hidden_state(a) for heads, a in self._aggregators.items()}
        return {" ".join(heads): kept for heads, kept in (self._kept | made).items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._aggregators = {}
        self._kept = {tuple(heads.split()): kept for heads, kept in state.items()}


def _matrix(
    rows: Sequence[Sequence[Tensor | None]], columns: Sequence[int], parameters: Sequence[Tensor]
) -> Tensor:
    """The Jacobian ``[heads, numbers]`` of some of the parameters."""
    matrix = parameters[0].new_empty(len(rows), sum(parameters[i].numel() for i in columns))
    for number, row in enumerate(rows):
        parts = (torch.zeros_like(parameters[i]) if (g := row[i]) is None else g for i in columns)
        torch.cat([part.reshape(-1) for part in parts], out=matrix[number])
    return matrix


def _set_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """In the parameter's memory layout, as autograd does: a fused optimizer reads the two side by
    side without a look at their strides."""
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    parameter.grad = gradient


def _backward(losses: Sequence[Tensor]) -> Tensor:
    total = total_of(losses)
    assert total is not None, "a step has a loss"
    total.backward()  # type: ignore[no-untyped-call]
    return total.detach()


WRAPPERS: dict[str, Callable[..., Weighting]] = {"PCD": partial(Aggregated, needs_first=True)}
"""How an aggregator becomes a weighting, where it is not :class:`Aggregated` alone."""


def __getattr__(name: str) -> Any:
    """The aggregator of torchjd that has this name, as a weighting."""
    return borrowed("torchjd.aggregation", name, WRAPPERS.get(name, Aggregated))
