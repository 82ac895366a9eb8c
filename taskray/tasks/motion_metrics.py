"""Metrics of the camera's motion and of object motion. They do not depend on how a set was cut into
batches; without data every value is NaN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from taskray.data.streams.batch import PLACE
from taskray.geometry.motion import rotation_angle
from taskray.geometry.warp import invert
from taskray.tasks.metrics import angle_deg

SHORTEST_STEP = 1e-3
"""Metres. The direction of a shorter movement of the camera is not measured."""


class EgoMotionMetrics(Metric):  # type: ignore[misc]
    """``ate rotation_deg translation_deg`` of ``camera_motion`` 1 -> 2.

    ``rotation_deg`` is the mean angle between predicted and true rotation; ``translation_deg``
    that between the directions of the translations, of pairs whose camera moves (the length of a
    translation is in the scale of the scene, which unsupervised training does not determine).

    ``ate`` is the absolute trajectory error in metres as on KITTI odometry (Zhou et al., CVPR
    2017): in every run of ``snippet - 1`` consecutive rows of one sequence, the motions are
    chained to a trajectory of ``snippet`` camera positions; the predicted one is scaled to the
    true one by least squares; the error is the root of the summed squared distances over the
    number of positions (as published; not the root of the mean). Rows are consecutive if the
    numbers of their first frames are as close as any in the set; each should begin at the frame
    where the one before ends (a reader's stride equal to its gap). A set without such a run, like
    rows of separate scenes, has no ``ate``; ``snippet = 2`` measures single pairs of any set.

    The places of rows in their sequences are ``batch.PLACE``, which evaluation adds to each batch;
    without it all rows are of one sequence.
    """

    full_state_update = False
    predicted: list[Tensor]
    true: list[Tensor]
    places: list[Tensor]

    def __init__(self, snippet: int = 5) -> None:
        super().__init__()
        self.snippet = snippet
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")
        self.add_state("places", [], dist_reduce_fx="cat")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        place = batch.get(PLACE)
        if place is None:
            first, rows = sum(len(t) for t in self.true), len(batch["camera_motion"])
            place = torch.tensor([(0, first + row) for row in range(rows)])
        self.places.append(place.to(self.device))
        self.predicted.append(prediction["camera_motion"].double())
        self.true.append(batch["camera_motion"].double())

    def compute(self) -> dict[str, Tensor]:
        if not len(self.true):  # a list, or one tensor after torchmetrics joined processes
            nothing = torch.full((), torch.nan)
            return {"ate": nothing, "rotation_deg": nothing, "translation_deg": nothing}
        predicted, true = _joined(self.predicted), _joined(self.true)
        apart = predicted[:, :3, :3] @ true[:, :3, :3].transpose(1, 2)
        moves = true[:, :3, 3].norm(dim=1) > SHORTEST_STEP
        follows = consecutive(_joined(self.places))
        directions = angle_deg(predicted[moves, :3, 3], true[moves, :3, 3])
        return {
            "ate": trajectory_error(predicted, true, self.snippet, follows).float(),
            "rotation_deg": torch.rad2deg(rotation_angle(apart)).mean().float(),
            "translation_deg": directions.mean().float(),
        }


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)


def consecutive(places_n2: Tensor) -> Tensor:
    """Whether each row but the last is followed by the next of its sequence, bool ``[n - 1]``:
    the smallest step of frame numbers in the set is the step between consecutive rows."""
    step = places_n2[1:] - places_n2[:-1]
    onward = (step[:, 0] == 0) & (step[:, 1] > 0)
    return onward & (step[:, 1] == step[onward, 1].min()) if onward.any() else onward


def trajectory_error(
    predicted_n44: Tensor, true_n44: Tensor, snippet: int, follows: Tensor
) -> Tensor:
    """Mean error in metres of all trajectories of ``snippet`` positions, of rows of which each
    ``follows`` the one before (:func:`consecutive`); NaN if there is none."""
    found, wanted = positions(predicted_n44, snippet), positions(true_n44, snippet)
    if snippet > 2:
        whole = follows.unfold(0, snippet - 2, 1).all(dim=1) if len(found) else follows[:0]
        found, wanted = found[whole], wanted[whole]
    squared = found.square().sum(dim=(1, 2), keepdim=True).clamp(min=1e-24)
    scale = (found * wanted).sum(dim=(1, 2), keepdim=True) / squared
    apart = (scale * found - wanted).square().sum(dim=(1, 2))
    return (apart.sqrt() / snippet).mean()


def positions(motions_n44: Tensor, snippet: int) -> Tensor:
    """Camera positions of all runs of ``snippet - 1`` consecutive motions, in the axes of each
    run's first camera: ``[n - snippet + 2, snippet, 3]``."""
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
    true ``object_motion``, over moving and over still pixels."""

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
