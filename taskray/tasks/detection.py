"""3D boxes from one LiDAR sweep: PointPillars' head, targets and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from taskray.errors import InputError
from taskray.geometry.grid import Grid
from taskray.geometry.overlap import non_maximum_suppression
from taskray.job.config import Fraction
from taskray.tasks.anchor_maps import (
    CAR,
    FARTHEST,
    LARGEST_TURN,
    PAPER_GRID,
    Detections,
    as_map,
    smooth_l1,
)
from taskray.tasks.anchors import HEADINGS, IGNORED, Anchor, Anchors, wrap
from taskray.tasks.constant import Constant, Fixed
from taskray.tasks.task import LabelValues, Task

if TYPE_CHECKING:
    from taskray.data.readers.reader import Reader
    from taskray.tasks.detection_metrics import DetectionMetrics

CHANNELS = 9
"""For each anchor: box minus anchor, logit of the direction, logit of the class."""
DIRECTION, LOGIT = 7, 8
LARGEST_LOGIT, LARGEST_LOG_SIZE = 15.0, 3.0
"""Bounds of what is predicted: finite in float16, and beyond any true value."""
PRIOR_LOGIT = math.log(0.01 / 0.99)
"""Added to the logit of the class: an untrained network has a confidence of 0.01 (Lin et al. 2017,
4.1)."""
ALPHA, GAMMA = 0.25, 2.0
"""Parameters of the focal loss."""
BOX_WEIGHT, DIRECTION_WEIGHT = 2.0, 0.2
CANDIDATES = 300
"""The suppression of overlapping detections looks at this many anchors, those of highest score."""


class Detection(Task):
    """Boxes around objects in one sweep, for one or several classes (Taskology 3.2.2; Lang et al.
    2019).

    Losses as published, over all anchors of a batch, divided by the number of those that are
    matched with a box: ``class``, the focal loss; ``box``, twice the smooth L1 loss of box minus
    anchor, x and y over the anchor's diagonal, z over its height, and the sine for theta, which
    leaves open which way along its axis a box points; ``direction``, 0.2 times the cross entropy of
    that. So axis and direction are learnt separately (one vector for both does not learn the
    direction), and the heading of a box, for APH, is an angle of the full circle.

    Boxes whose centre is off the grid count neither in losses nor in metrics. A sample whose boxes
    are all NaN counts as an empty scene; a dataset in which some samples are unlabelled is refused.

    Args:
        grid: the cells of the map; see :class:`taskray.geometry.grid.Grid`. The network gets the
            same.
        classes: the anchors of each class; see :class:`taskray.tasks.anchors.Anchor`.
        min_score: detections of less confidence are dropped.
        max_overlap: of two detections of a class that overlap by more, seen from above, the less
            confident is dropped.
        max_boxes: at most so many detections of a sweep are kept.
    """

    quantities = ("detection",)
    inputs = ("points",)
    labels = ("boxes",)
    in_channels = 4

    def __init__(
        self,
        grid: Grid = PAPER_GRID,
        classes: Annotated[list[Anchor], Field(min_length=1)] = [CAR],  # noqa: B006
        min_score: Fraction = 0.05,
        max_overlap: Fraction = 0.5,
        max_boxes: Annotated[int, Field(ge=1)] = 100,
    ) -> None:
        self.anchors = Anchors(grid, classes)
        self.min_score, self.max_overlap, self.max_boxes = min_score, max_overlap, max_boxes
        self.out_channels = {"detection": CHANNELS * self.anchors.per_cell}
        self.network_arguments = {"grid": grid}

    def check_labels(self, reader: Reader) -> None:
        if reader.unlabelled and "boxes" in reader.columns:
            lost = "a sweep without its boxes would count as an empty scene"
            if reader.stored is not None:
                raise InputError("path", f"some rows have no boxes, expected them in all: {lost}")
            raise InputError("rows", f"expected 'labelled' where label_fraction is below 1: {lost}")

    def label_values(self, batch: Mapping[str, Tensor]) -> Sequence[LabelValues]:
        return [self.anchors.label_values("boxes", batch)]

    def network_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Sweeps ``[B, P, 4]``."""
        return batch["points"]

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        raw = as_map(output, self.anchors, CHANNELS)
        sizes = self.anchors.sizes(raw)[..., None, None]
        diagonal, height = self.anchors.diagonals(raw)[:, None, None, None], sizes[:, 2:3]
        parts = [
            (raw[:, :, :2] * diagonal).clamp(-FARTHEST, FARTHEST),
            (raw[:, :, 2:3] * height).clamp(-FARTHEST, FARTHEST),
            raw[:, :, 3:6].clamp(-LARGEST_LOG_SIZE, LARGEST_LOG_SIZE),
            wrap(raw[:, :, 6:7].clamp(-LARGEST_TURN, LARGEST_TURN), math.pi),
            raw[:, :, 7:8].clamp(-LARGEST_LOGIT, LARGEST_LOGIT),
            (raw[:, :, 8:] + PRIOR_LOGIT).clamp(-LARGEST_LOGIT, LARGEST_LOGIT),
        ]
        return {"detection": torch.cat(parts, dim=2)}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        boxes, detection = batch["boxes"], prediction["detection"]
        assigned = self.anchors.assign(boxes)
        sample, *where = torch.where(assigned >= 0)
        count = max(1, len(sample))
        true = boxes[sample, assigned[(sample, *where)], :7]
        target = self.anchors.encode(true, where)
        chosen = detection.movedim(2, -1)[(sample, *where)]
        diagonal = self.anchors.diagonals(target)[where[0], None]
        height = self.anchors.sizes(target)[where[0], 2:3]
        difference = chosen[:, :7] - target[:, :7]
        error = torch.cat(
            [
                difference[:, :2] / diagonal,
                difference[:, 2:3] / height,
                difference[:, 3:6],
                difference[:, 6:].sin(),
            ],
            dim=1,
        )
        wrong_way = functional.softplus(-chosen[:, DIRECTION] * target[:, 7]).sum()
        return {
            "class": focal_loss(detection[:, :, LOGIT], assigned) / count,
            "box": BOX_WEIGHT * smooth_l1(error) / count,
            "direction": DIRECTION_WEIGHT * wrong_way / count,
        }

    @torch.no_grad()
    def detections(self, detection_ba8yx: Tensor) -> list[Detections]:
        """The boxes of each sweep: the anchors of highest score, without those that overlap a
        better one of their class."""
        found = []
        for maps in detection_ba8yx:
            logits = maps[:, LOGIT].float()
            scores, best = logits.sigmoid().flatten().topk(min(CANDIDATES, logits.numel()))
            best = best[scores >= self.min_score]
            where = torch.unravel_index(best, logits.shape)
            boxes = self.anchors.decode(maps.float().movedim(1, -1)[where][:, :8], where)
            known = torch.tensor([c.label for c in self.anchors.classes], device=best.device)
            found.append(
                self._without_rivals(boxes, scores[: len(best)], known[where[0] // len(HEADINGS)])
            )
        return found

    def _without_rivals(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
        kept = [torch.zeros(0, dtype=torch.long, device=boxes.device)]
        for kind in self.anchors.classes:
            (own,) = torch.where(labels == kind.label)
            kept.append(own[non_maximum_suppression(boxes[own], scores[own], self.max_overlap)])
        chosen = torch.cat(kept)
        chosen = chosen[scores[chosen].argsort(descending=True, stable=True)][: self.max_boxes]
        return Detections(boxes[chosen], scores[chosen], labels[chosen])

    def constant(self) -> Constant:
        """No detection."""
        channels = CHANNELS * self.anchors.per_cell
        return Fixed(self.predict(torch.full((1, channels, *self.anchors.grid.shape), -100.0)))

    def metric(self) -> DetectionMetrics:
        from taskray.tasks.detection_metrics import DetectionMetrics

        return DetectionMetrics(self.detections, self.anchors)


def focal_loss(logits_bayx: Tensor, assigned_bayx: Tensor) -> Tensor:
    """Sum of the focal loss (Lin et al. 2017, eq. 5) over anchors that are not ignored."""
    truth = (assigned_bayx >= 0).to(logits_bayx.dtype)
    cross = functional.binary_cross_entropy_with_logits(logits_bayx, truth, reduction="none")
    confidence = logits_bayx.sigmoid()
    wrong = torch.where(truth > 0, 1 - confidence, confidence)
    weight = torch.where(truth > 0, ALPHA, 1 - ALPHA) * wrong**GAMMA
    return torch.where(assigned_bayx == IGNORED, 0.0, weight * cross).sum()
