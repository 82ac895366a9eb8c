"""KITTI odometry (Geiger et al., CVPR 2012): stereo video from a car, with its trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from taskray.data.readers.images import check_camera, open_image, resize_camera, resize_image
from taskray.data.readers.reader import Reader, Row, Sample, fingerprint_files
from taskray.data.readers.video import (
    check_row,
    checked_part,
    clips,
    columns_of,
    cut,
    folders,
    motion_columns,
    motions,
    read_motion,
    read_numbers,
    some_sample,
    too_short,
)
from taskray.errors import InputError
from taskray.job.config import Fraction
from taskray.schema import frame_suffix


class KittiOdometry(Reader):
    """Frames, pairs or triplets of one camera, at 10 Hz, and the camera's motion in metres.

    Layout: ``sequences/NN/image_C/NNNNNN.png``, ``sequences/NN/calib.txt`` (a line ``PC:`` of 3x4
    numbers for each camera, for frames of the size they have) and ``poses/NN.txt`` (a line of 3x4
    numbers for each frame: left grey camera to world, metres; sequences 11-21 have none).

    Args:
        path: the folder that contains ``sequences`` and ``poses``.
        sequences: names of the sequences (``["07"]``); null for all.
        camera: 0 and 1 are the left and right grey cameras, 2 and 3 the colour ones. Grey frames
            have three equal channels.
        poses: include ``camera_motion``; false for sequences without poses.
        height, width: size of the frames in pixels.
        frames: frames in a sample.
        gap: frames from one frame of a sample to the next.
        stride: a sample begins at every ``stride``-th frame of a sequence.
        start, stop: part of each sequence's time, as fractions of its frames; all frames of a
            sample are in it, so that training and test data of other parts share no frame.
    """

    def __init__(
        self,
        path: str,
        sequences: list[str] | None = None,
        camera: Literal[0, 1, 2, 3] = 0,
        poses: bool = True,
        height: Annotated[int, Field(ge=8)] = 64,
        width: Annotated[int, Field(ge=8)] = 208,
        frames: Literal[1, 2, 3] = 2,
        gap: Annotated[int, Field(ge=1)] = 1,
        stride: Annotated[int, Field(ge=1)] = 1,
        start: Fraction = 0.0,
        stop: Fraction = 1.0,
    ) -> None:
        self._path = Path(path).expanduser()
        self._sequences, self._camera, self._poses = sequences, camera, poses
        self._size = (height, width)
        self._frames, self._gap, self._stride = frames, gap, stride
        self._part = checked_part(start, stop)
        motions = motion_columns(frames) if poses else []
        self.columns = ("intrinsics", *columns_of(["image"], frames), *motions)

    def index(self) -> list[Row]:
        rows = []
        for folder in self._folders():
            name = folder.name
            names = {int(file.stem): file.name for file in self._images(folder)}
            if not names:
                raise InputError(f"{folder}/image_{self._camera}", "no frames (NNNNNN.png)")
            names = cut(names, self._part)
            lines = self._pose_lines(name)
            starts = sorted(names)[:: self._stride]
            found = clips(names, starts, self._frames, self._gap)
            for clip in found:
                row: Row = {"key": f"{name}/{clip[0]:06d}", "sequence": name}
                row["images"] = [names[n] for n in clip]
                if self._poses:  # unparsed: a malformed line makes only its row unreadable
                    row["poses"] = [lines[n] if n < len(lines) else "" for n in clip]
                rows.append(row)
            if not found:
                rows.append(too_short(name, names, self._frames, self._gap))
        return some_sample(rows, self._path)

    def load(self, row: Row) -> Sample:
        check_row(row)
        folder = self._path / "sequences" / row["sequence"]
        matrix, offset = self._calibration(folder / "calib.txt")
        sample: Sample = {}
        for number, name in enumerate(row["images"], start=1):
            image = open_image(folder / f"image_{self._camera}" / name)
            sample[f"image{frame_suffix(number)}"] = resize_image(image, self._size)
            if number == 1:
                resized = resize_camera(matrix, (image.height, image.width), self._size)
                sample["intrinsics"] = resized.astype(np.float32)
        if self._poses:
            where = self._pose_file(row["sequence"]).name
            to_camera_0 = np.linalg.inv(offset)
            poses = [read_motion(line, (3, 4), where) @ to_camera_0 for line in row["poses"]]
            sample |= motions(poses)
        return sample

    def fingerprint(self) -> Any:
        files = []
        for folder in self._folders():
            files += [*self._images(folder), folder / "calib.txt"]
            files += [self._pose_file(folder.name)] if self._poses else []
        return fingerprint_files(self._path, files)

    def _folders(self) -> list[Path]:
        root = self._path / "sequences"
        found = folders(root, self._sequences, "sequence", "sequences (NN)")
        for file in (self._pose_file(folder.name) for folder in found if self._poses):
            if not file.is_file():
                raise InputError(str(file), "no such file (poses: false reads frames alone)")
        return found

    def _images(self, folder: Path) -> list[Path]:
        found = (folder / f"image_{self._camera}").glob("*.png")
        return sorted(file for file in found if file.stem.isdigit())

    def _pose_file(self, sequence: str) -> Path:
        return self._path / "poses" / f"{sequence}.txt"

    def _pose_lines(self, sequence: str) -> list[str]:
        if not self._poses:
            return []
        return self._pose_file(sequence).read_text(encoding="utf-8").splitlines()

    def _calibration(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        """The camera matrix ``[3, 3]``, and the motion from camera 0 to this one ``[4, 4]``."""
        name = f"P{self._camera}"
        lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
        rows = {key.strip(): values for key, _, values in lines}
        if name not in rows:
            raise ValueError(f"{file.name}: no line {name!r}")
        projection = read_numbers(rows[name], (3, 4), f"{file.name}: {name}")
        matrix = check_camera(projection[:, :3], f"{file.name}: {name}")
        offset = np.eye(4)
        offset[:3, 3] = np.linalg.solve(matrix, projection[:, 3])
        return matrix, offset
