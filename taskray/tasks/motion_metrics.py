"""Metrics of the camera's motion and of object motion. How a set was cut into batches does not
matter; without anything to measure every value is NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from taskray.geometry.motion import rotation_angle
from taskray.geometry.warp import invert
from taskray.tasks.metrics import angle_deg

SHORTEST_STEP = 1e-3
"""Metres. A camera that moves less than this moves in no direction."""


class EgoMotionMetrics(Metric):  # type: ignore[misc]
    """``ate rotation_deg translation_deg`` of ``camera_motion`` 1 -> 2.

    ``rotation_deg`` is the mean angle between predicted and true rotation; ``translation_deg``
    that between the directions of the translations, of pairs whose camera moves (the length of a
    translation is the scale of the scene, which unsupervised training does not know).

    ``ate`` is the absolute trajectory error in metres as on KITTI odometry (Zhou et al., CVPR
    2017): in every run of ``snippet - 1`` rows on end, in the order of the set, the motions are
    chained to a trajectory of ``snippet`` camera positions; the predicted one is scaled to the
    true one by least squares; the error is the root of the summed squared distances over the
    number of positions (theirs; not the root of the mean). It is meant for sets whose rows follow
    on one another, like the pairs of a video at a stride of one; where they do not, it is the
    error of doing one row's motion after the other's. Each row is read once, so ``snippet = 2``
    measures single pairs.
    """

    full_state_update = False
    predicted: list[Tensor]
    true: list[Tensor]

    def __init__(self, snippet: int = 5) -> None:
        super().__init__()
        self.snippet = snippet
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        self.predicted.append(prediction["camera_motion"].double())
        self.true.append(batch["camera_motion"].double())

    def compute(self) -> dict[str, Tensor]:
        if not len(self.true):  # a list, or one tensor where processes have joined theirs
            nothing = torch.full((), torch.nan)
            return {"ate": nothing, "rotation_deg": nothing, "translation_deg": nothing}
        predicted, true = _joined(self.predicted), _joined(self.true)
        apart = predicted[:, :3, :3] @ true[:, :3, :3].transpose(1, 2)
        moves = true[:, :3, 3].norm(dim=1) > SHORTEST_STEP
        directions = angle_deg(predicted[moves, :3, 3], true[moves, :3, 3])
        return {
            "ate": trajectory_error(predicted, true, self.snippet).float(),
            "rotation_deg": torch.rad2deg(rotation_angle(apart)).mean().float(),
            "translation_deg": directions.mean().float(),
        }


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)


def trajectory_error(predicted_n44: Tensor, true_n44: Tensor, snippet: int) -> Tensor:
    """Mean error in metres of all trajectories of ``snippet`` positions; NaN if there is none."""
    found, wanted = positions(predicted_n44, snippet), positions(true_n44, snippet)
    squared = found.square().sum(dim=(1, 2), keepdim=True).clamp(min=1e-24)
    scale = (found * wanted).sum(dim=(1, 2), keepdim=True) / squared
    apart = (scale * found - wanted).square().sum(dim=(1, 2))
    return (apart.sqrt() / snippet).mean()


def positions(motions_n44: Tensor, snippet: int) -> Tensor:
    """Camera positions of all runs of ``snippet - 1`` motions on end, in the axes of each run's
    first camera: ``[n - snippet + 2, snippet, 3]``."""
    back = invert(motions_n44)  # camera k + 1 to camera k
    runs = max(0, len(back) - snippet + 2)
    pose = torch.eye(4, dtype=back.dtype, device=back.device).expand(runs, 4, 4)
    places = [pose[:, :3, 3]]
    for step in range(snippet - 1):
        pose = pose @ back[step : step + runs]
        places.append(pose[:, :3, 3])
    return torch.stack(places, dim=1)


class ObjectMotionMetrics(Metric):  # type: ignore[misc]
    """``moving_error still_error``: mean length in metres of the difference between predicted and
    true ``object_motion``, over the pixels that move and over those that stand still."""

    full_state_update = False
    errors: Tensor
    counts: Tensor

    NAMES = ("moving_error", "still_error")

    def __init__(self) -> None:
        super().__init__()
        self.add_state("errors", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        apart = (prediction["object_motion"] - batch["object_motion"]).double().norm(dim=1)
        mask = batch["motion_mask"][:, 0]
        for number, where in enumerate((mask == 1, mask == 0)):
            self.errors[number] += apart[where].sum()
            self.counts[number] += where.sum()

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.NAMES, (self.errors / self.counts).float(), strict=True))


class MotionMetrics(Metric):  # type: ignore[misc]
    """Those of the camera's motion and, where it is labelled, of object motion."""

    full_state_update = False

    def __init__(self, snippet: int = 5, object_labels: bool = True) -> None:
        super().__init__()
        parts: list[Metric] = [EgoMotionMetrics(snippet)]
        if object_labels:
            parts.append(ObjectMotionMetrics())
        self.parts: Any = torch.nn.ModuleList(parts)

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        for metric in self.parts:
            metric.update(prediction, batch)

    def compute(self) -> dict[str, Tensor]:
        return {name: value for metric in self.parts for name, value in metric.compute().items()}

    def reset(self) -> None:
        super().reset()
        for metric in self.parts:
            metric.reset()
