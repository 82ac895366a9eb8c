"""Point clouds and boxes as pictures, seen from above."""

from __future__ import annotations

import numpy as np
import torch

from taskray.geometry.boxes import ground_corners
from taskray.report.panels import INVALID, PALETTE

GROUND, SKY = -2.0, 1.0
"""Heights over the sensor in metres: points at GROUND are dark, points at SKY are bright."""


def birds_eye(points: np.ndarray, boxes: np.ndarray | None, reach: float, size: int) -> np.ndarray:
    """uint8 RGB ``[size, size, 3]`` of a sweep ``[P, 4]`` and its boxes ``[M, 9]``, with the
    sensor in the middle, forward up, and ``reach`` metres to each side.

    Higher points are brighter. Boxes have the colour of their class and a line from the centre to
    the front. Rows of NaN are left out.
    """
    from PIL import Image, ImageDraw

    def pixel(places: np.ndarray) -> np.ndarray:
        return np.asarray((1 - places[..., [1, 0]] / reach) * size / 2)

    picture = np.full((size, size, 3), np.array(INVALID) // 2, np.uint8)
    points = points[np.isfinite(points).all(axis=1)]
    points = points[points[:, 2].argsort()]  # so that the highest point of a pixel is on top
    place = np.floor(pixel(points[:, :2])).astype(int)
    inside = ((place >= 0) & (place < size)).all(axis=1)
    height = np.clip((points[inside, 2:3] - GROUND) / (SKY - GROUND), 0, 1)
    picture[place[inside, 1], place[inside, 0]] = (90 + 165 * height).astype(np.uint8)

    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    boxes = boxes[np.isfinite(boxes).all(axis=1)] if boxes is not None else np.zeros((0, 9))
    corners = ground_corners(torch.from_numpy(boxes)).numpy()
    for box, outline in zip(boxes, corners, strict=True):
        colour = tuple(int(v) for v in PALETTE[int(box[7]) % len(PALETTE)])
        draw.polygon([(float(x), float(y)) for x, y in pixel(outline)], outline=colour)
        front = pixel(np.stack([box[:2], outline[[0, 3]].mean(axis=0)]))
        draw.line([(float(x), float(y)) for x, y in front], fill=colour)
    return np.asarray(image)


def reach_of(points: np.ndarray) -> float:
    """The distance from the sensor in metres that contains 98 % of the points ``[..., P, 4]``."""
    distance = np.abs(points[..., :2]).max(axis=-1)
    distance = distance[np.isfinite(distance)]
    return max(float(np.percentile(distance, 98)), 1.0) if distance.size else 1.0
