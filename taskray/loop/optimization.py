"""How a task descends: weighting, clipping, optimizer, and the learning rate as a pure function of
the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskray.errors import TaskrayError
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
        self.parameters = learned.together()
        self.optimizer = build_optimizer(self.parameters, config)
        self.opponents = {
            name: build_optimizer(relation.parameters(), relation.optimizer)
            for name, relation in learned.opponents.items()
        }

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config, step, self.total_steps)

    def descend(
        self,
        losses: Mapping[str, Tensor],
        step: int,
        checked: bool,
        opposed: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update on named losses; returns the objective and the gradient's norm, both detached.
        Opponents, by the name of their relation, are updated on the losses in ``opposed``.

        ``checked``: raise NotFinite, with nothing updated, where one of the two is not finite. The
        check forces a device sync on CUDA, so there only losses that come from peers are checked;
        the others are checked in their sums, once a chunk, before any checkpoint is written.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = self.learned.weighting.backward(losses, self.learned.network)
        norm = clip(self.parameters, self.config)
        _check(norm, total, checked)
        updated = [(self.optimizer, self.config)]
        for name, loss in (opposed or {}).items():
            relation, optimizer = self.learned.opponents[name], self.opponents[name]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            _check(clip(relation.parameters(), relation.optimizer), loss.detach(), checked)
            updated.append((optimizer, relation.optimizer))
        for optimizer, config in updated:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, self.total_steps)
            optimizer.step()
        return total, norm

    def state_dict(self) -> dict[str, Any]:
        """Of all optimizers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "opponents": {name: each.state_dict() for name, each in self.opponents.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        for name, optimizer in self.opponents.items():
            optimizer.load_state_dict(state["opponents"][name])


def clip(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Tensor:
    """Scale the gradient down to the job's norm; returns the norm before that, detached."""
    most = config.clip_norm or float("inf")
    return nn.utils.clip_grad_norm_(parameters, most).detach()


def _check(norm: Tensor, loss: Tensor, checked: bool) -> None:
    if checked and not torch.isfinite(norm):
        what = "its gradient" if torch.isfinite(loss) else "the loss"
        raise NotFinite(f"{what} is not finite (loss {float(loss):g})")


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizer that the job names. Fused: on a CPU, too, it takes a quarter of the time."""
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
