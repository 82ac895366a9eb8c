"""A weighting: how the named losses of one step become one gradient.

A weighting of your own subclasses :class:`Weighting`; a job names it by import path under
``tasks.<name>.weighting``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Weighting(nn.Module):
    """Its ``__init__`` arguments are what a job may set.

    Parameters of it are trained by the task's optimizer together with the network's; parameters
    and buffers are part of the checkpoint.
    """

    @abstractmethod
    def backward(self, losses: Mapping[str, Tensor], network: nn.Module) -> Tensor:
        """Put the gradient of this step into the parameters' ``grad``, which is empty before.

        Args:
            losses: scalars with a gradient, by name; those of relations carry their weights.
            network: the task's network, for weightings that compare the losses' gradients.

        Returns:
            The objective, a detached scalar, for the report.
        """


class Sum(Weighting):
    """The sum of all losses."""

    def backward(self, losses: Mapping[str, Tensor], network: nn.Module) -> Tensor:
        total = sum(losses.values(), start=next(iter(losses.values())).new_zeros(()))
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()
