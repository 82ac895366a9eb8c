"""Shared by the readers of video: folders of videos, the frames of a sample, sensor motion."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from taskray.data.readers.reader import Row
from taskray.errors import InputError
from taskray.schema import frame_suffix

Part = tuple[float, float]
"""Begin and end of a part of a video, as fractions of its frames."""


def folders(
    root: Path, names: Sequence[str] | None, one: str, many: str, pattern: str = "*"
) -> list[Path]:
    """The folders of these names below ``root``, or (None) all of them, in order.

    InputError if one is missing or there is none; ``one`` and ``many`` are their kind in words.
    """
    if names is None:
        found = sorted(path for path in root.glob(pattern) if path.is_dir())
    else:
        found = [root / name for name in names]
    for folder in found:
        if not folder.is_dir():
            raise InputError(str(folder), f"no such {one}")
    if not found:
        raise InputError(str(root), f"no {many} in this folder")
    return found


def columns_of(names: Iterable[str], frames: int) -> list[str]:
    """The columns of all frames of a sample, frame by frame."""
    return [name + frame_suffix(k) for k in range(1, frames + 1) for name in names]


def motion_columns(frames: int, name: str = "camera_motion") -> list[str]:
    """The columns of the motion from each frame of a sample to the next."""
    return [name + frame_suffix(k) for k in range(1, frames)]


def checked_part(start: float, stop: float) -> Part:
    """The part of each video from ``start`` to ``stop``; InputError if it is empty."""
    if start >= stop:
        raise InputError("stop", f"got {stop:g}, expected more than start, {start:g}")
    return start, stop


def cut(present: Mapping[int, str], part: Part) -> dict[int, str]:
    """The frames of one part of a video, number -> name."""
    numbers = sorted(present)
    first, last = (round(fraction * len(numbers)) for fraction in part)
    return {number: present[number] for number in numbers[first:last]}


def clips(
    present: Collection[int], starts: Iterable[int], frames: int, gap: int
) -> list[list[int]]:
    """Frame numbers of the samples of one video: ``frames`` numbers, ``gap`` apart, from each of
    ``starts``; a sample with a missing frame is left out."""
    known = set(present)
    wanted = ([start + gap * k for k in range(frames)] for start in starts)
    return [clip for clip in wanted if known.issuperset(clip)]


def too_short(key: str, present: Collection[int], frames: int, gap: int) -> Row:
    """The row of a video without a sample: reading it fails, so it is counted and named."""
    has = f"{len(present)} frame" + ("s" if len(present) != 1 else "")
    need = f"{frames} frames, {gap} apart" if frames > 1 else "a frame"
    return {"key": key, "problem": f"{key}: the video has {has}, a sample needs {need}"}


def check_row(row: Row) -> None:
    """Raises ValueError if the row was made by :func:`too_short`."""
    if "problem" in row:
        raise ValueError(row["problem"])


def some_sample(rows: Sequence[Row], where: Path) -> list[Row]:
    """The rows, if at least one contains a sample; InputError with the first reason otherwise."""
    if rows and all("problem" in row for row in rows):
        raise InputError(
            str(where), f"no sample in any of {len(rows)} videos; {rows[0]['problem']}"
        )
    return list(rows)


def motions(poses: Sequence[np.ndarray], name: str = "camera_motion") -> dict[str, np.ndarray]:
    """Columns ``camera_motion``, ``camera_motion_2`` ... of a sample, ``[4, 4]`` float32 in
    metres, from the poses of its frames, ``[4, 4]`` float64, sensor to world."""
    pairs = zip(motion_columns(len(poses), name), poses, poses[1:], strict=False)
    return {name: (np.linalg.inv(to) @ of).astype(np.float32) for name, of, to in pairs}


def read_numbers(text: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Float64 of this shape; ValueError, naming ``where``, if the text contains anything else."""
    try:
        values = np.array(text.split(), dtype=np.float64)
    except ValueError:
        values = np.empty(0)
    if values.size != np.prod(shape) or not np.isfinite(values).all():
        wanted = "x".join(map(str, shape))
        raise ValueError(f"{where}: got {text.strip()[:40]!r}, expected {wanted} finite numbers")
    return values.reshape(shape)


def read_motion(text: str, shape: tuple[int, int], where: str) -> np.ndarray:
    """A rigid motion ``[4, 4]`` float64; the text contains its first rows and columns, of
    ``shape``. ValueError, naming ``where``, if it contains anything else."""
    motion = np.eye(4)
    motion[: shape[0], : shape[1]] = read_numbers(text, shape, where)
    determinant = np.linalg.det(motion[:3, :3])
    if abs(determinant - 1) > 0.05:
        raise ValueError(
            f"{where}: got a determinant of {determinant:.3g}, expected 1 (a rotation)"
        )
    return motion
