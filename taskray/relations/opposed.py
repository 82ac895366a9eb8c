"""Relations that play a game against the network: each of the two has a loss of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from taskray.job.config import OptimizerConfig
from taskray.relations.relation import Relation


class Opposed(nn.Module, Relation):
    """A relation whose own parameters descend on :meth:`opponent_losses`, with an optimizer of
    their own, while the network descends on the relation's loss, as on that of any other.

    In :meth:`forward` the own parameters must be constants. The loop detaches the predictions that
    it gives to :meth:`opponent_losses`. So neither loss moves the other side. Both use the
    parameters from before the step; then each side is updated once.
    """

    optimizer: OptimizerConfig
    """Of the relation's own parameters."""

    @abstractmethod
    def opponent_losses(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Named scalar terms whose sum is the loss of the relation's own parameters. Neither the
        relation's weight nor the task's weighting applies to them."""
