"""7-Scenes (Shotton et al., CVPR 2013): indoor video with measured depth and camera poses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from taskray.data.readers.images import (
    FocalLength,
    Offset,
    camera_matrix,
    check_shape,
    metres,
    nearest,
    open_image,
    read_uint16,
    resize_image,
    size_of,
)
from taskray.data.readers.reader import Reader, Row, Sample, fingerprint_files
from taskray.data.readers.video import (
    check_row,
    clips,
    columns_of,
    folders,
    motion_columns,
    motions,
    read_motion,
    some_sample,
    too_short,
)
from taskray.errors import InputError
from taskray.geometry.normals import normals_from_depth
from taskray.schema import frame_suffix

NORMALS_WINDOW = 1 / 40
"""Fraction of the frame's width over which slopes of the depth are averaged. At 3 m the sensor's
noise between two neighbouring pixels is as large as the slope itself: averaged over 3 pixels of
320, the normals of two frames 1/30 s apart differ by 10 degrees (median), over 9 pixels by 3."""


class SevenScenes(Reader):
    """Frames, pairs or triplets of one scene, from a hand-held Kinect at about 30 Hz.

    Layout: ``seq-NN/frame-NNNNNN.{color.png, depth.png, pose.txt}``: depth in uint16 millimetres,
    0 and 65535 invalid; poses 4x4, camera to world, in metres. Single frames need no poses. Depth
    and colour are used as if from the same camera, as the dataset's authors advise. Normals are
    computed from the measured depth, averaged over neighbouring pixels, and zero where that is
    not possible.

    Args:
        path: the folder of a scene, which contains the sequences.
        sequences: names of the sequences (``[seq-01]``); null for all.
        height, width: size of the frames in pixels.
        stride: a sample begins at every ``stride``-th frame of a sequence.
        frames: frames in a sample.
        gap: frames from one frame of a sample to the next.
        focal, x0, y0: camera matrix for 640x480 frames.
    """

    def __init__(
        self,
        path: str,
        sequences: list[str] | None = None,
        height: Annotated[int, Field(ge=8)] = 96,
        width: Annotated[int, Field(ge=8)] = 128,
        stride: Annotated[int, Field(ge=1)] = 1,
        frames: Literal[1, 2, 3] = 1,
        gap: Annotated[int, Field(ge=1)] = 5,
        focal: FocalLength = 585.0,
        x0: Offset = 320.0,
        y0: Offset = 240.0,
    ) -> None:
        self._path = Path(path).expanduser()
        self._sequences = sequences
        self._size = (height, width)
        self._stride, self._frames, self._gap = stride, frames, gap
        self._camera = (focal, focal, x0, y0)
        columns = columns_of(("image", "depth", "normals"), frames)
        self.columns = ("intrinsics", *columns, *motion_columns(frames))

    def index(self) -> list[Row]:
        rows: list[Row] = []
        for sequence in self._folders():
            present = _frames(sequence)
            if not present:
                raise InputError(str(sequence), "no 7-Scenes frames (frame-NNNNNN.color.png)")
            starts = sorted(present)[:: self._stride]
            found = clips(present, starts, self._frames, self._gap)
            for clip in found:
                names = [present[n] for n in clip]
                key = f"{sequence.name}/{names[0]}"
                rows.append({"key": key, "sequence": sequence.name, "frames": names})
            if not found:
                rows.append(too_short(sequence.name, present, self._frames, self._gap))
        return some_sample(rows, self._path)

    def load(self, row: Row) -> Sample:
        check_row(row)
        sample: Sample = {"intrinsics": camera_matrix(*self._camera, (480, 640), self._size)}
        poses = []
        for number, name in enumerate(row["frames"], start=1):
            frame, end = self._path / row["sequence"] / name, frame_suffix(number)
            image = open_image(frame.with_name(f"{name}.color.png"))
            depth_file = frame.with_name(f"{name}.depth.png")
            depth = metres(read_uint16(depth_file))
            check_shape(depth_file, depth.shape, size_of(image))
            sample[f"image{end}"] = resize_image(image, self._size)
            sample[f"depth{end}"] = nearest(depth, self._size)[None]
            sample[f"normals{end}"] = nearest(self._normals(depth), self._size)
            if self._frames > 1:  # a single frame has no motion
                poses.append(read_pose(frame.with_name(f"{name}.pose.txt")))
        return sample | motions(poses)

    def fingerprint(self) -> Any:
        files = (f for s in self._folders() for f in sorted(s.glob("frame-*.*")))
        return fingerprint_files(self._path, files)

    def _folders(self) -> list[Path]:
        return folders(self._path, self._sequences, "sequence", "sequences (seq-NN)", "seq-*")

    def _normals(self, depth: np.ndarray) -> np.ndarray:
        """``[3, h, w]`` at the size of the depth map, which gives the most exact slopes."""
        size = (depth.shape[0], depth.shape[1])
        intrinsics = torch.from_numpy(camera_matrix(*self._camera, (480, 640), size))
        window = 2 * round(size[1] * NORMALS_WINDOW / 2) + 1
        normals, valid = normals_from_depth(
            torch.from_numpy(depth)[None, None], intrinsics[None], window=window
        )
        return (normals * valid)[0].numpy()


def read_pose(file: Path) -> np.ndarray:
    """A 4x4 camera-to-world matrix, float64; ValueError if the file contains anything else."""
    return read_motion(file.read_text(encoding="utf-8"), (4, 4), file.name)


def _frames(sequence: Path) -> dict[int, str]:
    """Frame number -> the common prefix of the names of its files."""
    found = (re.fullmatch(r"(frame-(\d+))\.color\.png", file.name) for file in sequence.iterdir())
    return {int(match[2]): match[1] for match in found if match}
