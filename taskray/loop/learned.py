"""Everything that one task learns: its network, its relations' parameters, its weighting's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from taskray.relations.relation import Relation
from taskray.weighting.weighting import Weighting

RELATIONS, WEIGHTING = "relations.", "weighting."
"""What the names of their weights begin with in a checkpoint; those of the network have no such
beginning, so a network alone reads the checkpoint of a task without learned relations."""


class Learned(nn.Module):
    """One module for the optimizer, the device and the checkpoint.

    Args:
        network: the task's network.
        relations: by name; those that are modules are learned, too.
        weighting: how losses become a step.
    """

    def __init__(
        self, network: nn.Module, relations: Mapping[str, Relation], weighting: Weighting
    ) -> None:
        super().__init__()
        self.network, self.weighting = network, weighting
        learned = {n: r for n, r in relations.items() if isinstance(r, nn.Module)}
        self.relations = nn.ModuleDict(learned)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in a checkpoint."""
        return {
            **self.network.state_dict(),
            **{RELATIONS + name: value for name, value in self.relations.state_dict().items()},
            **{WEIGHTING + name: value for name, value in self.weighting.state_dict().items()},
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint, whose names and shapes must be those of
        :meth:`weights`."""
        own = {k: v for k, v in weights.items() if not k.startswith((RELATIONS, WEIGHTING))}
        self.network.load_state_dict(own)
        for prefix, module in ((RELATIONS, self.relations), (WEIGHTING, self.weighting)):
            part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            module.load_state_dict(part)
