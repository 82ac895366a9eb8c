"""Overlap of rotated boxes against values worked out by hand and against shapely; what of
overlapping boxes is kept."""

from __future__ import annotations

import math

import pytest
import shapely
import torch
from torch import Tensor

from taskray.geometry.boxes import ground_corners
from taskray.geometry.overlap import (
    ground_iou,
    ground_overlap,
    height_overlap,
    non_maximum_suppression,
)


def box(
    x: float, y: float, length: float, width: float, degrees: float = 0.0, z: float = 0.0
) -> Tensor:
    """One box, 2 m high."""
    return torch.tensor([[x, y, z, length, width, 2.0, math.radians(degrees)]])


def random_boxes(number: int, seed: int, spread: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(number, 7, generator=generator, dtype=torch.float64)
    low = torch.tensor([-spread, -spread, -1.0, 0.5, 0.5, 0.5, -math.pi])
    high = torch.tensor([spread, spread, 1.0, 6.0, 3.0, 3.0, math.pi])
    return low + values * (high - low)


OCTAGON = 8 * (math.sqrt(2) - 1)
"""Area that a square of 2 m shares with itself turned by 45 degrees."""
PAIRS = {
    "the same box": (box(1, 2, 4, 2, 30), box(1, 2, 4, 2, 30), 8.0),
    "the same box turned by half a circle": (box(1, 2, 4, 2, 30), box(1, 2, 4, 2, 210), 8.0),
    "one in the other": (box(0, 0, 10, 10, 20), box(1, 1, 2, 1, 50), 2.0),
    "the other in the one": (box(1, 1, 2, 1, 50), box(0, 0, 10, 10, 20), 2.0),
    "a half covered": (box(0, 0, 4, 2), box(2, 0, 4, 2), 4.0),
    "sides that touch from outside": (box(0, 0, 4, 2), box(4, 0, 4, 2), 0.0),
    "sides that touch from inside": (box(0, 0, 4, 2), box(1, 0, 2, 2), 4.0),
    "a cross": (box(3, 3, 6, 2), box(3, 3, 6, 2, 90), 4.0),
    "an octagon": (box(0, 0, 2, 2), box(0, 0, 2, 2, 45), OCTAGON),
    "a corner": (box(0, 0, 2, 2), box(1.5, 1.5, 2, 2), 0.25),
    "far apart": (box(0, 0, 2, 2), box(50, 0, 2, 2, 10), 0.0),
    "a box of no area": (box(0, 0, 2, 2), box(0, 0, 0, 0), 0.0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_area_that_boxes_share_is_that_worked_out_by_hand(name: str) -> None:
    a, b, area = PAIRS[name]
    assert float(ground_overlap(a, b)) == pytest.approx(area, abs=1e-6)
    assert float(ground_overlap(b, a)) == pytest.approx(area, abs=1e-6)


def test_the_overlap_is_shapely_s() -> None:
    a, b = random_boxes(60, 0), random_boxes(70, 1)
    first, second = (shapely.polygons(ground_corners(boxes).numpy()) for boxes in (a, b))
    area = torch.from_numpy(shapely.area(shapely.intersection(first[:, None], second[None])))
    assert (area > 0.1).sum() > 400
    torch.testing.assert_close(ground_overlap(a, b), area, atol=1e-6, rtol=1e-6)
    union = torch.from_numpy(shapely.area(shapely.union(first[:, None], second[None])))
    torch.testing.assert_close(ground_iou(a, b), area / union, atol=1e-6, rtol=1e-6)


def test_far_from_the_sensor_nothing_is_lost_to_rounding() -> None:
    a, b = random_boxes(30, 2), random_boxes(30, 3)
    moved = torch.tensor([1e4, -1e4, 0, 0, 0, 0, 0])
    torch.testing.assert_close(ground_overlap(a + moved, b + moved), ground_overlap(a, b))


def test_in_space_the_height_counts_as_well() -> None:
    a, b = box(0, 0, 4, 2, 30), box(0, 0, 4, 2, 30, z=1.0)
    assert float(ground_iou(a, b)) == pytest.approx(1.0)
    assert float(height_overlap(a, b)) == pytest.approx(1.0)
    assert float(height_overlap(a, box(0, 0, 4, 2, 30, z=2.5))) == 0


def test_no_boxes_overlap_nothing() -> None:
    assert ground_overlap(random_boxes(3, 0), torch.zeros(0, 7)).shape == (3, 0)
    assert non_maximum_suppression(torch.zeros(0, 7), torch.zeros(0), 0.5).tolist() == []


def test_of_overlapping_boxes_the_best_is_kept() -> None:
    boxes = torch.cat([box(0, 0, 4, 2), box(0.2, 0, 4, 2), box(0, 6, 4, 2), box(0.1, 6, 4, 2, 5)])
    scores = torch.tensor([0.6, 0.9, 0.3, 0.8])
    assert non_maximum_suppression(boxes, scores, 0.5).tolist() == [1, 3]
    assert non_maximum_suppression(boxes, scores, 1.0).tolist() == [1, 3, 0, 2]


def test_a_box_is_not_dropped_for_one_that_was_itself_dropped() -> None:
    chain = torch.cat([box(0, 0, 4, 2), box(1, 0, 4, 2), box(2, 0, 4, 2)])
    kept = non_maximum_suppression(chain, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    assert kept.tolist() == [0, 2]


def test_of_equal_scores_the_first_is_kept() -> None:
    boxes = torch.cat([box(0, 0, 4, 2), box(0.1, 0, 4, 2)])
    assert non_maximum_suppression(boxes, torch.tensor([0.5, 0.5]), 0.5).tolist() == [0]


def test_what_is_kept_is_what_the_definition_says() -> None:
    boxes = random_boxes(120, 4)
    scores = torch.rand(120, generator=torch.Generator().manual_seed(5))
    overlap = ground_iou(boxes, boxes)
    expected: list[int] = []
    for candidate in scores.argsort(descending=True).tolist():
        if all(overlap[candidate, better] <= 0.3 for better in expected):
            expected.append(candidate)
    assert non_maximum_suppression(boxes, scores, 0.3).tolist() == expected
