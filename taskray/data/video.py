"""What readers of video share: which frames make a sample, and how the camera moves in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from taskray.data.reader import Row
from taskray.errors import InputError
from taskray.schema import frame_suffix

Fraction = Annotated[float, Field(ge=0, le=1)]
Part = tuple[float, float]
"""Where the part of a video begins and ends, as fractions of its frames."""


def columns_of(names: Iterable[str], frames: int) -> list[str]:
    """The columns of all frames of a sample, frame by frame."""
    return [name + frame_suffix(k) for k in range(1, frames + 1) for name in names]


def motion_columns(frames: int) -> list[str]:
    """``camera_motion`` from each frame of a sample to the next."""
    return [f"camera_motion{frame_suffix(k)}" for k in range(1, frames)]


def checked_part(start: float, stop: float) -> Part:
    """The part of each video from ``start`` to ``stop``; InputError where that is none."""
    if start >= stop:
        raise InputError(f"stop: expected more than start, {start:g} (got {stop:g})")
    return start, stop


def cut(present: Mapping[int, str], part: Part) -> dict[int, str]:
    """The frames of one part of a video, number -> name: no sample reaches out of it."""
    numbers = sorted(present)
    first, last = (round(fraction * len(numbers)) for fraction in part)
    return {number: present[number] for number in numbers[first:last]}


def clips(
    present: Collection[int], starts: Iterable[int], frames: int, gap: int
) -> list[list[int]]:
    """Frame numbers of the samples of one video: ``frames`` of them, ``gap`` apart, from each of
    ``starts``; those of which a frame is not present are left out."""
    known = set(present)
    wanted = ([start + gap * k for k in range(frames)] for start in starts)
    return [clip for clip in wanted if known.issuperset(clip)]


def too_short(key: str, present: Collection[int], frames: int, gap: int) -> Row:
    """The row of a video that holds no sample: reading it fails, so it is counted and named."""
    has = f"{len(present)} frame" + ("s" if len(present) != 1 else "")
    need = f"{frames} frames, {gap} apart" if frames > 1 else "a frame"
    return {"key": key, "problem": f"{key}: the video has {has}, a sample needs {need}"}


def check_row(row: Row) -> None:
    """Raises ValueError where the row stands for a video that holds no sample."""
    if "problem" in row:
        raise ValueError(row["problem"])


def some_sample(rows: Sequence[Row], where: Path) -> list[Row]:
    """The rows, if one of them at least can be read; InputError says why none can."""
    if rows and all("problem" in row for row in rows):
        raise InputError(f"{where}: no sample in any of {len(rows)} videos; {rows[0]['problem']}")
    return list(rows)


def camera_motions(poses: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Columns ``camera_motion``, ``camera_motion_2`` ... of a sample, ``[4, 4]`` float32 in
    metres, from the poses of its frames, ``[4, 4]`` float64, camera to world."""
    pairs = zip(motion_columns(len(poses)), poses, poses[1:], strict=False)
    return {name: (np.linalg.inv(to) @ of).astype(np.float32) for name, of, to in pairs}


def check_pose(pose: np.ndarray, where: str) -> np.ndarray:
    """A camera-to-world matrix as it is; ValueError, naming ``where``, if it is no rigid motion."""
    if abs(np.linalg.det(pose[:3, :3]) - 1) > 0.05:
        raise ValueError(f"{where}: its rotation is none (determinant is not 1)")
    return pose
