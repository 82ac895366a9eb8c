"""GradNorm (Chen et al., ICML 2018): weights that make the heads' gradients equally large, larger
for a head that learns more slowly than the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from taskray.errors import TaskrayError
from taskray.weighting.weighting import Weighting, check_positive, total_of

SMALLEST = 1e-3
"""Smallest weight: a negative one would reverse what its head learns."""


class GradNorm(Weighting):
    """Algorithm 1 of the paper, with the sum of all weights kept at n, the number of heads.

    With the gradient norms G_i = w_i |dL_i/dW| of the last weight W that the losses of all heads
    of the batch reach, and the relative rates r_i = (L_i / L_i(0)) / mean, the weights descend on
    sum |G_i - mean(G) r_i^alpha|, whose target is a constant. Here L_i(0) is the mean of the
    head's first losses, because a single one is noise.

    A head without labels in a batch has no part in that step, and its weight stays. Losses must be
    above 0.

    Args:
        alpha: strength of the balance of rates; 0 makes the gradients equally large.
        lr: of the weights' own Adam.
        window: losses of each head in its L(0); a weight is 1 until then.
    """

    weights: Tensor
    initial: Tensor
    seen: Tensor

    def __init__(
        self,
        alpha: Annotated[float, Field(ge=0)] = 1.5,
        lr: Annotated[float, Field(gt=0)] = 0.025,
        window: Annotated[int, Field(ge=1)] = 20,
        heads: Sequence[str] = (),
    ) -> None:
        super().__init__(heads)
        self.alpha, self.lr, self.window = alpha, lr, window
        for name, start in (("weights", 1.0), ("initial", 0.0), ("seen", 0.0)):
            self.register_buffer(name, torch.full((len(self.heads),), start))
        self._optimizer: torch.optim.Adam | None = None
        self._last_shared: dict[tuple[str, ...], int] = {}

    def backward(
        self,
        losses: Mapping[str, Tensor],
        added: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        of_heads, rest = self.by_head(losses)
        weighted = {h: self.weights[self.heads.index(h)].clone() * v for h, v in of_heads.items()}
        if of_heads:
            check_positive(of_heads, "gradnorm")
            self._learn(of_heads, parameters)
        total = total_of([*weighted.values(), *rest, *added.values()])
        assert total is not None, "a step has a loss"
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    def _learn(self, losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> None:
        """One step of the weights."""
        here = torch.tensor([self.heads.index(head) for head in losses], device=self.seen.device)
        values = torch.stack([value.detach() for value in losses.values()])
        counted = self.seen[here] < self.window
        self.seen[here] += counted
        self.initial[here] += counted * (values - self.initial[here]) / self.seen[here]
        if len(losses) < 2 or bool((self.seen[here] < self.window).any()):
            return
        norms = self._gradient_norms(losses, parameters)
        scaled = self.weights[here] * norms
        rates = values / self.initial[here]
        targets = scaled.mean() * (rates / rates.mean()) ** self.alpha
        before = self.weights.clone()
        self.weights.grad = torch.zeros_like(before)
        self.weights.grad[here] = torch.sign(scaled - targets) * norms
        self._adam().step()
        after = torch.zeros_like(before)
        after[here] = self.weights[here].clamp(min=SMALLEST)
        after[here] *= before[here].sum() / after.sum()
        absent = torch.ones_like(before).index_fill_(0, here, 0.0)
        self.weights.copy_(after + absent * before)
        self.weights.grad = None

    def _gradient_norms(self, losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """|dL_i/dW| of each loss, ``[losses]``."""
        heads = tuple(losses)  # some of the heads may share a later weight than all of them do
        if heads not in self._last_shared:
            self._last_shared[heads] = _last_shared(list(losses.values()), parameters)
        weight = parameters[self._last_shared[heads]]
        gradients = [
            torch.autograd.grad(value, weight, retain_graph=True, allow_unused=True)[0]
            for value in losses.values()
        ]
        zero = weight.new_zeros(())
        return torch.stack([zero if g is None else g.norm() for g in gradients])

    def _adam(self) -> torch.optim.Adam:
        if self._optimizer is None:  # not before the weights are on their device
            self._optimizer = torch.optim.Adam([self.weights], self.lr)
        return self._optimizer

    def state(self) -> dict[str, Any]:
        return {} if self._optimizer is None else {"optimizer": self._optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self._adam().load_state_dict(state["optimizer"])


def _last_shared(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> int:
    """The number of the last weight (not a bias or a norm's scale) that all losses reach."""
    reached = [
        [g is not None for g in torch.autograd.grad(v, parameters, None, True, allow_unused=True)]
        for v in losses
    ]
    common = [i for i, p in enumerate(parameters) if p.dim() > 1 and all(r[i] for r in reached)]
    if not common:
        raise TaskrayError("weighting 'gradnorm': the heads share no weight of the network")
    return common[-1]
