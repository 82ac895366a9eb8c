"""Cityscapes (Cordts et al., CVPR 2016): street video from a car, one frame in thirty labelled."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from taskray.data.readers.class_map import class_map
from taskray.data.readers.images import (
    Size,
    check_camera,
    check_shape,
    nearest,
    open_image,
    read_ids,
    read_uint16,
    resize_camera,
    resize_image,
    size_of,
)
from taskray.data.readers.reader import Reader, Row, Sample, fingerprint_files
from taskray.data.readers.video import (
    check_row,
    checked_part,
    clips,
    columns_of,
    cut,
    folders,
    some_sample,
    too_short,
)
from taskray.errors import InputError
from taskray.job.config import Fraction
from taskray.schema import frame_suffix

CAMERA_SIZE: Size = (1024, 2048)
"""Size of the frames of the camera files and the disparities."""
NUM_IDS = 34
"""Label ids are 0 to 33; a class map lists some of them."""

Label = Literal["segmentation", "depth"]
FOLDERS: dict[Label, tuple[str, str]] = {
    "segmentation": ("gtFine", "gtFine_labelIds.png"),
    "depth": ("disparity", "disparity.png"),
}
"""The folder of each kind of label, and the end of its file names."""
NAME = re.compile(r"(?P<video>[^_]+_\d+)_(?P<frame>\d+)_")


class Cityscapes(Reader):
    """Frames, pairs or triplets at 17 Hz, or labelled frames.

    Layout: ``leftImg8bit/{split}/{city}/{city}_{video}_{frame}_leftImg8bit.png`` (labelled
    frames), ``leftImg8bit_sequence/...`` (the video around them), ``gtFine/..._gtFine_labelIds
    .png``, ``disparity/..._disparity.png`` (uint16; d = (p - 1) / 256 pixels of 2048x1024, 0
    invalid) and ``camera/..._camera.json`` (for 2048x1024, too). Images may have been resized.

    Args:
        path: the folder that contains these.
        split: ``train``, ``val`` or ``test``.
        cities: names of cities; null for all.
        labels: ``segmentation``, ``depth`` (from disparity, metres), or both: samples then begin
            at labelled frames and contain their labels. Empty: samples are from the video.
        class_map: the classes of the segmentation, a built-in class map with ids of
            ``cityscapes`` or the path of one.
        height, width: size of the frames in pixels.
        crop_bottom: fraction of the frame removed at the bottom, where the car's bonnet is.
        frames: frames in a sample.
        gap: frames from one frame of a sample to the next.
        stride: a sample begins at every ``stride``-th frame of a video (without labels).
        start, stop: part of each video's time, as fractions of its frames; all frames of a sample
            are in it, so that training and test data of other parts share no frame. Not for single
            labelled frames, which have no video around them: use ``split`` and ``cities``.
    """

    def __init__(
        self,
        path: str,
        split: Literal["train", "val", "test"] = "train",
        cities: list[str] | None = None,
        labels: tuple[Label, ...] = (),
        class_map: str = "cityscapes_19",
        height: Annotated[int, Field(ge=8)] = 96,
        width: Annotated[int, Field(ge=8)] = 256,
        crop_bottom: Annotated[float, Field(ge=0, lt=1)] = 0.25,
        frames: Literal[1, 2, 3] = 1,
        gap: Annotated[int, Field(ge=1)] = 1,
        stride: Annotated[int, Field(ge=1)] = 1,
        start: Fraction = 0.0,
        stop: Fraction = 1.0,
    ) -> None:
        self._path, self._split, self._cities = Path(path).expanduser(), split, cities
        self._labels, self._crop_bottom = labels, crop_bottom
        self._table = _table(class_map) if "segmentation" in labels else None
        self._size = (height, width)
        self._frames, self._gap, self._stride = frames, gap, stride
        self._part = checked_part(start, stop)
        self._alone = bool(labels) and frames == 1
        if self._alone and self._part != (0, 1):
            raise InputError(
                "start" if start else "stop",
                "not for single labelled frames, because a video has only one or few of them; "
                "expected other cities, or frames of 2 or 3",
            )
        self._images = "leftImg8bit" if self._alone else "leftImg8bit_sequence"
        self.columns = ("intrinsics", *columns_of(["image"], frames), *labels)

    def index(self) -> list[Row]:
        rows: list[Row] = []
        kinds = dict(FOLDERS[label] for label in self._labels)
        absent = list(kinds)
        for city in self._folders():
            videos = _videos(city, "leftImg8bit.png")
            if not videos:
                raise InputError(str(city), "no Cityscapes frames (*_leftImg8bit.png)")
            cameras = _videos(self._folder("camera", city.name), "camera.json")
            labels = {k: _videos(self._folder(k, city.name), end) for k, end in kinds.items()}
            absent = [kind for kind in absent if not labels[kind]]
            for video, whole in videos.items():
                present = cut(whole, self._part)
                starts = sorted(present)[:: self._stride]
                if labels:
                    here = {kind: found[video] for kind, found in labels.items()}
                    starts = sorted(
                        whole if self._alone else {n for of in here.values() for n in of}
                    )
                    starts = [n for n in starts if n in present or n not in whole]
                    rows += [row for n in starts for row in _without_label(video, n, here)]
                    starts = [n for n in starts if all(n in of for of in here.values())]
                found = clips(present, starts, self._frames, self._gap)
                for clip in found:
                    row: Row = {"key": f"{video}_{clip[0]:06d}", "city": city.name, "video": video}
                    row["images"] = [present[n] for n in clip]
                    row["labels"] = [of[video][clip[0]] for of in labels.values()]
                    row["camera"] = _nearest_camera(cameras[video], clip[0])
                    rows.append(row)
                if starts and not found:
                    rows.append(too_short(video, present, self._frames, self._gap))
        if absent or not rows:
            names = ", ".join(absent or kinds)
            what = f"no labels ({names}) for the frames" if names else "no frames"
            part = "" if self._part == (0, 1) else " in this part (start, stop)"
            raise InputError(str(self._path), f"{what} of {self._split}{part}")
        return some_sample(rows, self._path)

    def load(self, row: Row) -> Sample:
        check_row(row)
        if row["camera"] is None:
            raise ValueError(f"{row['video']}: no camera file (*_camera.json), so no intrinsics")
        camera = read_camera(self._folder("camera", row["city"]) / row["camera"])
        sample: Sample = {}
        for number, name in enumerate(row["images"], start=1):
            image = open_image(self._folder(self._images, row["city"]) / name)
            kept = self._kept(image.height)
            box = (0, 0, image.width, kept)
            sample[f"image{frame_suffix(number)}"] = resize_image(image, self._size, box)
            if number == 1:  # removing rows at the bottom does not change the intrinsics
                whole = resize_camera(camera["matrix"], CAMERA_SIZE, (image.height, image.width))
                matrix = resize_camera(whole, (kept, image.width), self._size)
                sample["intrinsics"] = matrix.astype(np.float32)
        for label, name in zip(self._labels, row["labels"], strict=True):
            file = self._folder(FOLDERS[label][0], row["city"]) / name
            values = read_uint16(file) if label == "depth" else read_ids(file, NUM_IDS - 1)
            check_shape(file, values.shape, size_of(image))
            values = nearest(values[: self._kept(len(values))], self._size)
            if label == "depth":
                sample["depth"] = depth_of(values, camera["baseline"] * camera["matrix"][0, 0])
            else:
                assert self._table is not None
                sample["segmentation"] = self._table[values][None]
        return sample

    def fingerprint(self) -> Any:
        files: list[Path] = []
        for row in self.index():
            if "problem" in row:
                continue
            folders = [self._images] * len(row["images"])
            folders += [FOLDERS[label][0] for label in self._labels]
            names = [*row["images"], *row["labels"]]
            pairs = [*zip(folders, names, strict=True), ("camera", row["camera"])]
            files += [self._folder(kind, row["city"]) / name for kind, name in pairs if name]
        classes = None if self._table is None else self._table.tolist()
        return [fingerprint_files(self._path, files), classes]

    def _folder(self, kind: str, city: str) -> Path:
        return self._path / kind / self._split / city

    def _folders(self) -> list[Path]:
        root = self._path / self._images / self._split
        return folders(root, self._cities, "city", "cities")

    def _kept(self, height: int) -> int:
        return max(1, round(height * (1 - self._crop_bottom)))


def read_camera(file: Path) -> dict[str, Any]:
    """``matrix`` [3, 3] float64 in pixels and ``baseline`` in metres; ValueError if the file
    lacks them, or if the matrix has no inverse."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        fx, fy, u0, v0 = (float(content["intrinsic"][key]) for key in ("fx", "fy", "u0", "v0"))
        baseline = float(content["extrinsic"]["baseline"])
    except (KeyError, TypeError, ValueError):
        expected = "intrinsic.{fx, fy, u0, v0} and extrinsic.baseline"
        raise ValueError(f"{file.name}: expected numbers {expected}") from None
    matrix = np.array([[fx, 0.0, u0], [0.0, fy, v0], [0.0, 0.0, 1.0]])
    return {"matrix": check_camera(matrix, file.name), "baseline": baseline}


def depth_of(disparity: np.ndarray, focal_baseline: float) -> np.ndarray:
    """Depth ``[1, H, W]`` float32 in metres, 0 invalid, from a disparity PNG."""
    pixels = (disparity.astype(np.float64) - 1) / 256
    depth = np.divide(focal_baseline, pixels, out=np.zeros_like(pixels), where=pixels > 0)
    return depth[None].astype(np.float32)


def _table(name: str) -> np.ndarray:
    return class_map(name).table("cityscapes")


def _videos(folder: Path, ending: str) -> dict[str, dict[int, str]]:
    """Of each video in a folder: frame number -> name of its file."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for file in sorted(folder.glob(f"*_{ending}")):
        match = NAME.match(file.name)
        if match:
            found[match["video"]][int(match["frame"])] = file.name
    return found


def _without_label(video: str, frame: int, labels: Mapping[str, Mapping[int, str]]) -> list[Row]:
    """Of a frame without one of its labels, a row that cannot be read, so that it is counted."""
    missing = [kind for kind, found in labels.items() if frame not in found]
    key = f"{video}_{frame:06d}"
    return [{"key": key, "problem": f"{key}: no file in {', '.join(missing)}"}] if missing else []


def _nearest_camera(cameras: dict[int, str], frame: int) -> str | None:
    """The camera file of the labelled frame nearest to a frame of the same video."""
    return cameras[min(cameras, key=lambda n: abs(n - frame))] if cameras else None
