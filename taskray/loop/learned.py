"""Everything that one task learns: its network, its relations' parameters, its weighting's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from taskray.relations.opposed import Opposed
from taskray.relations.relation import Relation
from taskray.weighting.weighting import RELATION, Weighting

WEIGHTING = "weighting:"
"""What the names of its weights begin with in a checkpoint, as ``RELATION`` those of a relation.
Those of the network have no such beginning, so a network alone can read the checkpoint of a task
with learned relations."""


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
        self.relations = nn.ModuleList(learned.values())
        self.opponents = {n: r for n, r in relations.items() if isinstance(r, Opposed)}
        self._parts = {"": network, WEIGHTING: weighting}
        self._parts |= {f"{RELATION}{name}.": relation for name, relation in learned.items()}

    def together(self) -> dict[str, nn.Parameter]:
        """The parameters that descend on the task's losses, by their names in a checkpoint: all
        but those of opponents."""
        opponents = self.opponents.values()
        return {
            prefix + name: parameter
            for prefix, part in self._parts.items()
            if part not in opponents
            for name, parameter in part.named_parameters()
        }

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in a checkpoint."""
        return {
            prefix + name: value
            for prefix, part in self._parts.items()
            for name, value in part.state_dict().items()
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint, whose names and shapes must be those of
        :meth:`weights`."""
        for prefix, part in self._parts.items():
            part.load_state_dict({name: weights[prefix + name] for name in part.state_dict()})


def of_network(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint's weights those of the network."""
    return {k: v for k, v in weights.items() if not k.startswith((RELATION, WEIGHTING))}
