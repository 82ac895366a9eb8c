"""What a checkpoint of a task has besides weights: all that the next step depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from taskray.loop.meters import Totals

if TYPE_CHECKING:
    from taskray.loop.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Step, optimizers, positions in the datasets, random numbers, the weighting's own state."""
    device = trainer.network.device
    return {
        "step": trainer.steps_made,
        **trainer.optimization.state_dict(),
        "totals": trainer.meter.totals.state_dict(),
        "dedicated": trainer.supervised.state_dict(),
        "mediator": trainer.ahead.state_dict() if trainer.ahead else None,
        "augmentation_random": trainer.random.get_state(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "weighting": trainer.learned.weighting.state(),
    }


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Take what :func:`state_of` returned; a checkpoint of before may lack the last two."""
    device = trainer.network.device
    trainer.steps_made = state["step"]
    trainer.optimization.load_state_dict(state)
    trainer.meter.totals = Totals.from_state(state["totals"])
    trainer.supervised.load_state_dict(state["dedicated"])
    if trainer.ahead and state["mediator"]:
        trainer.ahead.load_state_dict(state["mediator"])
    trainer.random.set_state(state["augmentation_random"])
    torch.set_rng_state(state["torch_random"])
    if device.type == "cuda" and state.get("cuda_random") is not None:
        torch.cuda.set_rng_state(state["cuda_random"], device)
    trainer.learned.weighting.load_state(state.get("weighting", {}))
