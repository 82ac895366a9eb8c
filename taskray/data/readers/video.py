"""What readers of video share: where videos lie, which frames make a sample, and how the sensor
moves in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from taskray.data.readers.reader import Row
from taskray.errors import InputError
from taskray.schema import frame_suffix

Part = tuple[float, float]
"""Where the part of a video begins and ends, as fractions of its frames."""


def folders(
    root: Path, names: Sequence[str] | None, one: str, many: str, pattern: str = "*"
) -> list[Path]:
    """The folders below ``root`` of these names, or (None) all of them, in order. InputError, which
    calls them ``one`` and ``many``, where one is missing or there is none."""
    if names is None:
        found = sorted(path for path in root.glob(pattern) if path.is_dir())
    else:
        found = [root / name for name in names]
    for folder in found:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such {one}")
    if not found:
        raise InputError(f"{root}: no {many} in this folder")
    return found


def columns_of(names: Iterable[str], frames: int) -> list[str]:
    """The columns of all frames of a sample, frame by frame."""
    return [name + frame_suffix(k) for k in range(1, frames + 1) for name in names]


def motion_columns(frames: int, name: str = "camera_motion") -> list[str]:
    """The columns of the motion from each frame of a sample to the next."""
    return [name + frame_suffix(k) for k in range(1, frames)]


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


def motions(poses: Sequence[np.ndarray], name: str = "camera_motion") -> dict[str, np.ndarray]:
    """Columns ``camera_motion``, ``camera_motion_2`` ... of a sample, ``[4, 4]`` float32 in
    metres, from the poses of its frames, ``[4, 4]`` float64, sensor to world."""
    pairs = zip(motion_columns(len(poses), name), poses, poses[1:], strict=False)
    return {name: (np.linalg.inv(to) @ of).astype(np.float32) for name, of, to in pairs}


def read_numbers(text: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Float64 of this shape; ValueError, naming ``where``, if the text holds anything else."""
    try:
        values = np.array(text.split(), dtype=np.float64)
    except ValueError:
        values = np.empty(0)
    if values.size != np.prod(shape) or not np.isfinite(values).all():
        wanted = "x".join(map(str, shape))
        raise ValueError(f"{where}: expected {wanted} finite numbers, got {text.strip()[:40]!r}")
    return values.reshape(shape)


def read_motion(text: str, shape: tuple[int, int], where: str) -> np.ndarray:
    """A rigid motion ``[4, 4]`` float64, of which the text holds the first rows and columns;
    ValueError, naming ``where``, if it holds anything else."""
    motion = np.eye(4)
    motion[: shape[0], : shape[1]] = read_numbers(text, shape, where)
    if abs(np.linalg.det(motion[:3, :3]) - 1) > 0.05:
        raise ValueError(f"{where}: its rotation is none (determinant is not 1)")
    return motion
