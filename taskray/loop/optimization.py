"""How a task descends: weighting, clipping, optimizer, and the learning rate as a pure function of
the step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from taskray.errors import InputError, TaskrayError
from taskray.job.config import OptimizerConfig
from taskray.loop.learned import Learned


class NotFinite(TaskrayError):
    """A loss or a gradient that is NaN or infinite; nothing was updated."""


class Optimization:
    """One optimizer over everything that a task learns, and one over each of its opponents. An
    opponent is no group of the task's optimizer, because its loss would pass the weighting, and its
    gradient would count in the norm by which the network's is clipped.

    Args:
        learned: network, relations and weighting, on their device.
        config: the optimizer, its schedule, and clipping.
        total_steps: of the task, over which the learning rate falls.
    """

    def __init__(self, learned: Learned, config: OptimizerConfig, total_steps: int) -> None:
        self.learned, self.config, self.total_steps = learned, config, total_steps
        self.updates = Updates(learned.together(), config)
        self._learned = [p for p in learned.together().values() if p.requires_grad]
        self.opponents = {
            name: Updates(dict(relation.named_parameters()), relation.optimizer)
            for name, relation in learned.opponents.items()
        }

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the task's own parameters."""
        return self.updates.optimizer

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config, step, self.total_steps)

    def descend(
        self,
        losses: Mapping[str, Tensor],
        step: int,
        checked: bool,
        opposed: Mapping[str, Tensor] | None = None,
        added: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor]:
        """Update on named losses; returns the objective and the gradient's norm, both detached.
        Opponents, by the name of their relation, are updated on the losses in ``opposed``.

        The weighting combines ``losses``, those of the task on its labels; ``added`` are the
        others, which have their weights already.

        ``checked``: raise NotFinite, with nothing updated, where one of the two is not finite. The
        check forces a device sync on CUDA, so there only losses that come from peers are checked;
        the others are checked in their sums, once a chunk, before any checkpoint is written.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = self.learned.weighting.backward(losses, added, self._learned)
        norm = self.updates.clip()
        _check(norm, total, checked)
        updated = [self.updates]
        for name, loss in (opposed or {}).items():
            opponent = self.opponents[name]
            opponent.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            _check(opponent.clip(), loss.detach(), checked)
            updated.append(opponent)
        for updates in updated:
            updates.make(step, self.total_steps)
        return total, norm

    def state_dict(self) -> dict[str, Any]:
        """Of all optimizers."""
        opponents = {name: each.optimizer.state_dict() for name, each in self.opponents.items()}
        return {"optimizer": self.optimizer.state_dict(), "opponents": opponents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        for name, each in self.opponents.items():
            each.optimizer.load_state_dict(state["opponents"][name])


class Updates:
    """An optimizer over named parameters, with the clipping and the rates that the job gives it.
    InputError for a part in ``lr_factors`` that has no parameter."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters, self.config = list(parameters.values()), config
        groups = parameter_groups(parameters, config.lr_factors)
        self._factors = [factor for _, factor in groups]
        self.optimizer = _optimizer([{"params": found} for found, _ in groups], config)

    def clip(self) -> Tensor:
        """Scale the gradient down to the job's norm; returns the norm before that, detached."""
        most = self.config.clip_norm or float("inf")
        return nn.utils.clip_grad_norm_(self.parameters, most).detach()

    def make(self, step: int, total_steps: int) -> None:
        """Update the parameters, with the rates of this step."""
        rate = learning_rate(self.config, step, total_steps)
        for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = factor * rate
        self.optimizer.step()


def _check(norm: Tensor, loss: Tensor, checked: bool) -> None:
    if checked and not torch.isfinite(norm):
        what = "its gradient" if torch.isfinite(loss) else "the loss"
        raise NotFinite(f"{what} is not finite (loss {float(loss):g})")


def parameter_groups(
    named: Mapping[str, nn.Parameter], factors: Mapping[str, float]
) -> list[tuple[list[nn.Parameter], float]]:
    """The parameters with one factor on the rate, and that factor: first those without one of
    their own."""
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in ("", *factors)}
    for name, parameter in named.items():
        parts = [p for p in factors if name == p or name.startswith((f"{p}.", f"{p}:"))]
        groups[max(parts, key=len, default="")].append(parameter)
    for part in factors:
        if not groups[part]:
            known = ", ".join(dict.fromkeys(re.split(r"[.:]", name)[0] for name in named))
            raise InputError(f"lr_factors.{part}", f"no weight has this name; known: {known}")
    return [(found, factors.get(part, 1.0)) for part, found in groups.items() if found]


def _optimizer(parameters: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused: on a CPU, too, it takes a quarter of the time."""
    match config.name:
        case "adam" | "adamw":
            kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
            return kind(
                parameters,
                config.lr,
                betas=config.betas,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case "sgd":
            return torch.optim.SGD(
                parameters, config.lr, config.momentum, weight_decay=config.weight_decay
            )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate for the given step in [0, total_steps). Having no state, it resumes for free."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    low = config.final_fraction
    match config.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - (1 - low) * progress
        case "cosine":
            factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * factor
