"""Masks of objects as COCO stores them: polygons and run lengths, to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from taskray.data.readers.images import Box, Size


def fill_polygon(points: Sequence[float], size: Size, box: Box) -> np.ndarray:
    """The pixels of a frame whose centres are inside a polygon, bool ``[H, W]``.

    ``points`` are x, y, x, y ... in pixels of the image, from its upper left corner; ``box`` is
    the part of the image that the frame shows. A point is inside if an odd number of edges is to
    the left of it. Raises ValueError for less than three points.
    """
    corners = np.asarray(points, dtype=np.float64)
    if corners.size < 6 or corners.size % 2 or not np.isfinite(corners).all():
        raise ValueError(
            f"got a polygon of {corners.size} numbers, expected an even number of at least 6"
        )
    height, width = size
    left, top, right, bottom = box
    x = (corners[0::2] - left) * width / (right - left) - 0.5  # now centres are whole numbers
    y = (corners[1::2] - top) * height / (bottom - top) - 0.5
    flips = np.zeros((height, width + 1), dtype=np.int32)
    for x0, y0, x1, y1 in zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True):
        first, last = np.clip(np.ceil([min(y0, y1), max(y0, y1)]), 0, height).astype(int)
        if first < last:  # the edge crosses these rows
            rows = np.arange(first, last)
            crossing = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
            columns = np.clip(np.ceil(crossing), 0, width).astype(int)
            np.add.at(flips, (rows, columns), 1)
    inside: np.ndarray = np.cumsum(flips[:, :width], axis=1) % 2 == 1
    return inside


def run_lengths(text: str) -> list[int]:
    """The run lengths in COCO's compressed form.

    A number is written in groups of 5 bits, the lowest first, each as a character from ``'0'``
    on. A sixth bit is set if more groups follow; the last bit of the last group is the sign. From
    the fourth number on, each is stored as the difference to the number two before it.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - ord("0")
        if not 0 <= code < 64:
            raise ValueError(f"invalid character {character!r} in run lengths")
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths end in the middle of a number")
    return lengths


def fill_runs(runs: dict[str, Any]) -> np.ndarray:
    """Bool ``[h, w]``, at the image's size, from run lengths down the columns, the first run
    outside: ``{size: [h, w], counts: [..]}`` or ``counts`` compressed to text.

    Raises ValueError if the lengths do not add up to the image.
    """
    height, width = runs["size"]
    counts = runs["counts"]
    lengths = np.asarray(run_lengths(counts) if isinstance(counts, str) else counts, np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"got run lengths of {lengths.sum()} pixels, expected {height}x{width}")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T
