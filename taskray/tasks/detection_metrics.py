"""Average precision of boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import shapely
import torch
from torch import Tensor
from torchmetrics import Metric

from taskray.geometry.boxes import ground_corners
from taskray.geometry.overlap import height_overlap
from taskray.tasks.anchor_maps import Detections
from taskray.tasks.anchors import Anchors, wrap

KINDS = ("3d", "bev")


class DetectionMetrics(Metric):  # type: ignore[misc]
    """``ap_3d aph_3d ap_bev aph_bev`` of boxes, in [0, 1].

    In each sweep, in the order of confidence, each detection is matched with the box of its class
    that it overlaps most, of those not yet matched, if the overlap is at least the class's
    ``iou``; then it is right. Overlap is of volumes (3D) or areas seen from above (BEV), of
    rotated boxes, by shapely.

    AP is the exact area under the interpolated curve of precision over recall, of all detections
    of the whole set: at each recall the highest precision at that recall or above. In APH each
    right detection counts 1 - |dtheta| / pi in precision (Sun et al. 2020, whose formula, like
    Taskology 4.2, prints the error itself). With several classes their mean, over those of which
    there are boxes, and each alone as ``class_<label>/ap_3d``.

    Boxes of other classes, and those whose centre is off the grid, are not counted: they are not
    missed, and a detection that fits one of the latter is not wrong. Without one box every value is
    NaN.

    Args:
        detect: boxes found in each sweep from ``detection`` maps.
        anchors: the grid, and the classes with their ``iou``.
    """

    full_state_update = False
    right: list[Tensor]
    truths: Tensor

    def __init__(self, detect: Callable[[Tensor], list[Detections]], anchors: Anchors) -> None:
        super().__init__()
        self.detect, self.anchors = detect, anchors
        # a row for each detection: class number, score; then for 3D and for BEV 1 if it is right,
        # else 0 (NaN: not counted), and the same times how right its heading is
        self.add_state("right", default=[], dist_reduce_fx="cat")
        zeros = torch.zeros(len(anchors.classes), dtype=torch.int64)
        self.add_state("truths", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        for found, boxes in zip(self.detect(prediction["detection"]), batch["boxes"], strict=True):
            on_grid = self.anchors.grid.holds(boxes)
            for number, kind in enumerate(self.anchors.classes):
                own, of_kind = found.labels == kind.label, boxes[:, 7] == kind.label
                true, beside = boxes[of_kind & on_grid], boxes[of_kind & ~on_grid]
                self.truths[number] += len(true)
                rows = self._compared(found.boxes[own], true, beside, kind.iou)
                label = torch.full((len(rows), 1), number, dtype=rows.dtype)
                scores = found.scores[own].double().cpu()[:, None]
                self.right.append(torch.cat([label, scores, rows], dim=1).to(self.truths.device))

    @staticmethod
    def _compared(found: Tensor, true: Tensor, beside: Tensor, least: float) -> Tensor:
        """``[n, 4]``: right and how right the heading, in 3D and BEV, of detections, best first."""
        found, true, beside = (boxes.double().cpu() for boxes in (found, true, beside))
        columns = []
        for overlap, off_grid in zip(overlaps(found, true), overlaps(found, beside), strict=True):
            match = greedy_match(overlap, least)
            hit = match >= 0
            right, heading = hit.double(), torch.zeros(len(found), dtype=torch.float64)
            right[~hit & (off_grid >= least).any(dim=1)] = math.nan
            turn = wrap(found[hit, 6] - true[match[hit], 6]).abs()
            heading[hit] = 1 - turn / math.pi
            columns += [right, heading]
        return torch.stack(columns, dim=1)

    def compute(self) -> dict[str, Tensor]:
        parts = self.right if isinstance(self.right, list) else [self.right]
        rows = torch.cat([torch.zeros(0, 6, dtype=torch.float64), *(p.cpu() for p in parts)])
        each = {
            kind.label: self._of_class(rows[rows[:, 0] == number, 1:], int(self.truths[number]))
            for number, kind in enumerate(self.anchors.classes)
        }
        names = [f"{name}_{kind}" for kind in KINDS for name in ("ap", "aph")]
        values = {}
        for name in names:
            known = [v[name] for v in each.values() if not math.isnan(v[name])]
            values[name] = sum(known) / len(known) if known else math.nan
        if len(each) > 1:
            values |= {f"class_{k}/{name}": v[name] for k, v in each.items() for name in names}
        return {name: torch.tensor(value) for name, value in values.items()}

    @staticmethod
    def _of_class(rows: Tensor, truths: int) -> dict[str, float]:
        rows = rows[rows[:, 0].argsort(descending=True, stable=True)]
        values = {}
        for number, kind in enumerate(KINDS):
            right, heading = rows[:, 1 + 2 * number : 3 + 2 * number].unbind(dim=1)
            counts = ~right.isnan()
            right, heading = right[counts], heading[counts]
            values[f"ap_{kind}"] = average_precision(right, right, truths)
            values[f"aph_{kind}"] = average_precision(right, heading, truths)
        return values


def overlaps(found_nd: Tensor, true_md: Tensor) -> tuple[Tensor, Tensor]:
    """Overlap over union of rotated boxes in 3D and seen from above, ``[n, m]`` each."""
    a, b = (shapely.polygons(ground_corners(boxes).numpy()) for boxes in (found_nd, true_md))
    shared = torch.from_numpy(shapely.area(shapely.intersection(a[:, None], b[None])))
    area_a, area_b = (x[:, 3:5].prod(dim=1) for x in (found_nd, true_md))
    volume = shared * height_overlap(found_nd, true_md)
    volume_a, volume_b = area_a * found_nd[:, 5], area_b * true_md[:, 5]
    return (
        volume / (volume_a[:, None] + volume_b - volume),
        shared / (area_a[:, None] + area_b - shared),
    )


def greedy_match(overlap_nm: Tensor, least: float) -> Tensor:
    """The box that each detection is matched with, ``[n]``, -1 for none: in their order, the box
    that it overlaps most, of those not yet matched, if the overlap is at least ``least``."""
    match = torch.full((len(overlap_nm),), -1)
    if not overlap_nm.shape[1]:
        return match
    left = overlap_nm.clone()
    for row in range(len(left)):
        best = int(left[row].argmax())
        if left[row, best] >= least:
            match[row] = best
            left[:, best] = -1.0
    return match


def average_precision(right_n: Tensor, credit_n: Tensor, truths: int) -> float:
    """Area under interpolated precision over recall, of detections from the best on: ``right`` is
    1 or 0, ``credit`` is what each adds to precision. NaN where there are no boxes."""
    if truths == 0:
        return math.nan
    precision = credit_n.cumsum(0) / torch.arange(1, len(right_n) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0) if len(right_n) else precision
    return float((right_n * best_from_here).sum() / truths)
