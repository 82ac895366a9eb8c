"""KITTI tracking (Geiger et al., CVPR 2012): LiDAR video from a car, with tracked 3D boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from taskray.data.readers.labelling import WhichRows, mark_labelled
from taskray.data.readers.point_clouds import nearest_boxes, pad, thin_out
from taskray.data.readers.reader import Reader, Row, Sample, fingerprint_files
from taskray.data.readers.video import (
    checked_part,
    clips,
    cut,
    motions,
    read_motion,
    read_numbers,
    some_sample,
    too_short,
)
from taskray.errors import InputError
from taskray.geometry.boxes import points_in_boxes
from taskray.job.config import Fraction
from taskray.schema import frame_suffix

CLASSES: tuple[str, ...] = (
    "car", "van", "truck", "pedestrian", "person", "cyclist", "tram", "misc",
)  # fmt: skip
"""The dataset's types in lower case, in the order of the class indices."""
IGNORED = "dontcare"
"""Type of image regions without labels: not a box of an object."""
FARTHEST = 1000.0
"""Metres: no LiDAR measures farther."""
FIELDS = 17
"""Values in a line of labels: frame, track, type, truncated, occluded, alpha, 4 of a 2D box,
height, width, length, x, y, z, rotation_y (18 with a detector's score, which is not read)."""


class KittiTracking(Reader):
    """One to three sweeps of one sequence, at 10 Hz, with the boxes of labelled objects.

    Layout: ``training/{velodyne/NNNN/NNNNNN.bin, label_02/NNNN.txt, calib/NNNN.txt}``, and for
    ``lidar_motion`` ``training/poses/NNNN.txt``: one 3x4 camera-to-world matrix in each line, in
    metres, of the rectified camera 0. The labels give boxes in that camera's axes by the centre of
    their bottom; the samples give them in LiDAR axes by their centre. Classes: :data:`CLASSES`.

    Args:
        path: the folder that contains ``training``.
        sequence: its number (0 for ``0000``).
        frames: sweeps in a sample.
        motion: include ``lidar_motion`` between them, which needs the poses.
        gap: sweeps from one sweep of a sample to the next.
        stride: a sample begins at every ``stride``-th sweep.
        start, stop: part of the sequence's time, as fractions; all sweeps of a sample are in it,
            so that training and test data of other parts share no sweep.
        max_points: rows of ``points``; a larger sweep is reduced to a random subset.
        max_boxes: rows of ``boxes``; of more boxes the nearest are kept.
        min_box_points: boxes that contain fewer of the kept points are left out.
        label_fraction: fraction of samples that keep their boxes, chosen by ``seed``; a smaller
            fraction is a subset of a larger one. The boxes of the other samples are all NaN.
        rows: ``labelled`` or ``unlabelled`` keeps only those samples.
        seed: of the choices of samples and points.
    """

    def __init__(
        self,
        path: str,
        sequence: Annotated[int, Field(ge=0, le=9999)] = 0,
        frames: Literal[1, 2, 3] = 1,
        motion: bool = True,
        gap: Annotated[int, Field(ge=1)] = 1,
        stride: Annotated[int, Field(ge=1)] = 1,
        start: Fraction = 0.0,
        stop: Fraction = 1.0,
        max_points: Annotated[int, Field(ge=1)] = 16384,
        max_boxes: Annotated[int, Field(ge=1)] = 32,
        min_box_points: Annotated[int, Field(ge=0)] = 5,
        label_fraction: Fraction = 1.0,
        rows: WhichRows = "all",
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self._root = Path(path).expanduser() / "training"
        self._name = f"{sequence:04d}"
        self._frames, self._gap, self._stride = frames, gap, stride
        self._motion = motion and frames > 1
        self._part = checked_part(start, stop)
        self._max_points, self._max_boxes = max_points, max_boxes
        self._min_box_points = min_box_points
        self._labels, self._seed = (label_fraction, seed, rows), seed
        self.unlabelled = label_fraction < 1 and rows != "labelled"
        columns = ["points", "boxes"]
        for number in range(2, frames + 1):
            columns += [f"points_{number}", f"boxes_{number}"]
            columns += [f"lidar_motion{frame_suffix(number - 1)}"] if motion else []
        self.columns = tuple(columns)

    def index(self) -> list[Row]:
        for file in self._tables():
            if not file.is_file():
                hint = " (not needed with motion: false)" if file.parent.name == "poses" else ""
                raise InputError(str(file), f"no such file, expected one of KITTI tracking{hint}")
        try:
            read_calibration(self._file("calib"))
        except ValueError as error:  # all samples need it
            raise InputError(str(self._file("calib").parent), str(error)) from None
        sweeps = self._sweeps()
        rows: list[Row] = [
            {"key": f"{self._name}/{clip[0]:06d}", "sweeps": clip}
            for clip in clips(sweeps, sweeps[:: self._stride], self._frames, self._gap)
        ]
        if not rows:
            rows = [too_short(self._name, sweeps, self._frames, self._gap)]
        return mark_labelled(some_sample(rows, self._root), *self._labels)

    def load(self, row: Row) -> Sample:
        to_lidar = np.linalg.inv(read_calibration(self._file("calib")))
        sample: Sample = {}
        for number, sweep in enumerate(row["sweeps"], start=1):
            points, boxes = self._points(sweep), np.zeros((0, 9))
            if row["labelled"]:
                boxes = read_boxes(self._file("label_02"), sweep, to_lidar)
                boxes = nearest_boxes(boxes[self._held(points, boxes)], self._max_boxes)
            sample[f"points{frame_suffix(number)}"] = pad(points, self._max_points)
            sample[f"boxes{frame_suffix(number)}"] = pad(boxes, self._max_boxes)
        if self._motion:
            to_camera = np.linalg.inv(to_lidar)
            poses = read_poses(self._file("poses"), row["sweeps"])
            sample |= motions([pose @ to_camera for pose in poses], "lidar_motion")
        return {column: sample[column] for column in self.columns}

    def fingerprint(self) -> Any:
        sweeps = (self._sweep(number) for number in self._sweeps())
        return fingerprint_files(self._root, [*self._tables(), *sweeps])

    def _sweeps(self) -> list[int]:
        """Numbers of the sweeps in the part ``start`` to ``stop`` of the sequence."""
        folder = self._root / "velodyne" / self._name
        present = {int(f.stem): f.name for f in folder.glob("*.bin") if f.stem.isdigit()}
        if not present:
            raise InputError(str(folder), "no sweeps of KITTI tracking (NNNNNN.bin)")
        return list(cut(present, self._part))

    def _points(self, sweep: int) -> np.ndarray:
        points = read_sweep(self._sweep(sweep))
        rng = np.random.default_rng([self._seed, sweep])
        return np.asarray(points[thin_out(len(points), self._max_points, rng)])

    def _held(self, points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        inside = points_in_boxes(torch.from_numpy(points).double(), torch.from_numpy(boxes))
        return (inside.sum(dim=0) >= self._min_box_points).numpy()

    def _tables(self) -> list[Path]:
        names = ["label_02", "calib"] + (["poses"] if self._motion else [])
        return [self._file(name) for name in names]

    def _file(self, name: str) -> Path:
        return self._root / name / f"{self._name}.txt"

    def _sweep(self, number: int) -> Path:
        return self._root / "velodyne" / self._name / f"{number:06d}.bin"


def read_sweep(file: Path) -> np.ndarray:
    """Points ``[P, 4]`` float32: x y z in metres, reflectance. ValueError if there are none, or
    if the file does not contain whole points: numbers of another type, or more of them for each
    point, give positions and reflectances that no sensor measures."""
    data = file.read_bytes()
    if not data:
        raise ValueError(f"{file.name}: contains no points")
    if len(data) % 16:
        raise ValueError(f"{file.name}: got {len(data)} bytes, expected a multiple of 16")
    points = np.frombuffer(data, dtype="<f4").reshape(-1, 4)
    if not np.isfinite(points).all():
        raise ValueError(f"{file.name}: contains values that are not finite")
    for name, values, lowest, highest in (
        ("coordinates in metres", points[:, :3], -FARTHEST, FARTHEST),
        ("reflectance", points[:, 3], 0.0, 1.0),
    ):
        if values.min() < lowest or values.max() > highest:
            raise ValueError(
                f"{file.name}: got {name} of {values.min():.3g} to {values.max():.3g}, expected "
                f"{lowest:g} to {highest:g}; is each point float32 x y z reflectance?"
            )
    return points


def read_calibration(file: Path) -> np.ndarray:
    """4x4 from the axes of the LiDAR to those of the rectified camera 0, ``R0_rect @
    Tr_velo_to_cam``; ValueError if a matrix is missing or is not a rigid motion."""
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        key, *numbers = line.split(maxsplit=1) or [""]
        found[key.removesuffix(":")] = "".join(numbers)

    def matrix(names: tuple[str, ...], shape: tuple[int, int]) -> np.ndarray:
        key = next((name for name in names if name in found), None)
        if key is None:
            raise ValueError(f"{file.name}: no {names[0]}")
        return read_motion(found[key], shape, f"{file.name}: {key}")

    from_lidar = matrix(("Tr_velo_to_cam", "Tr_velo_cam"), (3, 4))
    return np.asarray(matrix(("R0_rect", "R_rect"), (3, 3)) @ from_lidar)


def read_boxes(file: Path, frame: int, to_lidar: np.ndarray) -> np.ndarray:
    """Boxes ``[N, 9]`` of a frame, as in ``schema``, in LiDAR axes; ``to_lidar`` is 4x4 from the
    rectified camera 0. ValueError if a line is malformed."""
    boxes = []
    for name, values in _labels_of(file, frame):
        height, width, length, *bottom, rotation_y = values[8:15]
        centre = np.array(bottom) - (0.0, height / 2, 0.0)  # the camera's y points down
        ahead = to_lidar[:3, :3] @ (np.cos(rotation_y), 0.0, -np.sin(rotation_y))
        place = to_lidar[:3, :3] @ centre + to_lidar[:3, 3]
        theta = np.arctan2(ahead[1], ahead[0])
        track = values[0]
        boxes.append([*place, length, width, height, theta, CLASSES.index(name), track])
    return np.array(boxes, dtype=np.float64).reshape(-1, 9)


def read_poses(file: Path, frames: Sequence[int]) -> list[np.ndarray]:
    """4x4 camera-to-world matrices of the frames; ValueError if one is missing or malformed."""
    lines = file.read_text(encoding="utf-8").splitlines()
    if max(frames) >= len(lines):
        raise ValueError(
            f"poses/{file.name}: got {len(lines)} lines, expected a line for frame {max(frames)}"
        )
    return [
        read_motion(lines[frame], (3, 4), f"poses/{file.name} line {frame + 1}") for frame in frames
    ]


def _labels_of(file: Path, frame: int) -> Iterator[tuple[str, np.ndarray]]:
    """Type of each labelled object of a frame, with the numbers of its line (track id first)."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"label_02/{file.name} line {number}"
        words = line.split()
        if not words:
            continue
        if not words[0].isdigit():
            raise ValueError(f"{where}: got {words[0]!r}, expected a frame number")
        if int(words[0]) != frame:
            continue
        if len(words) not in (FIELDS, FIELDS + 1):
            raise ValueError(f"{where}: got {len(words)} values, expected {FIELDS}")
        name = words[2].lower().removesuffix("_sitting")
        if name == IGNORED:
            continue
        if name not in CLASSES:
            raise ValueError(f"{where}: unknown type {words[2]!r}")
        numbers = [words[1], *words[3:]]
        values = read_numbers(" ".join(numbers), (len(numbers),), where)
        if values[8:11].min() <= 0:
            raise ValueError(f"{where}: expected a box of positive height, width and length")
        yield name, values
