"""NYU Depth v2 (Silberman et al., ECCV 2012) as a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from taskray.data.readers.class_map import class_map as find_class_map
from taskray.data.readers.images import (
    FocalLength,
    Offset,
    camera_matrix,
    check_shape,
    metres,
    nearest,
    open_image,
    read_ids,
    read_uint16,
    resize_image,
    size_of,
)
from taskray.data.readers.reader import Reader, Row, Sample, fingerprint_files
from taskray.errors import InputError
from taskray.schema import IGNORE


class NYUv2(Reader):
    """Indoor frames with dense depth and 40 classes.

    Layout: ``{split}/rgb/NNNN.jpg``, ``{split}/depth/NNNN.png`` (uint16 millimetres, 0 invalid)
    and ``{split}/label40/NNNN.png`` (class index 0 to 254, 255 ignored). Edges are the pixels whose
    right or lower neighbour is of another stored class; a pixel is ignored where its class is.
    There are no normals, because the depth is stored in steps of some centimetres. Frames are not
    consecutive.

    Args:
        path: the folder that contains the splits.
        split: ``train`` or ``test``, as published.
        height, width: size of the frames in pixels.
        fx, fy, x0, y0: camera matrix for 640x480 frames.
        class_map: the classes of the segmentation, a built-in class map with ids of ``nyuv2``
            (``nyu_13``) or the path of one; null: the stored indices.
    """

    columns = ("image", "depth", "segmentation", "edges", "intrinsics")

    def __init__(
        self,
        path: str,
        split: Literal["train", "test"] = "train",
        height: Annotated[int, Field(ge=8)] = 96,
        width: Annotated[int, Field(ge=8)] = 128,
        fx: FocalLength = 518.86,
        fy: FocalLength = 519.47,
        x0: Offset = 325.58,
        y0: Offset = 253.74,
        class_map: str | None = None,
    ) -> None:
        self._folder = Path(path).expanduser() / split
        self._size = (height, width)
        self._table = find_class_map(class_map).table("nyuv2") if class_map is not None else None
        self._intrinsics = camera_matrix(fx, fy, x0, y0, (480, 640), self._size)

    def index(self) -> list[Row]:
        images = self._folder / "rgb"
        rows = [{"key": file.stem, "image": file.name} for file in sorted(images.glob("*.jpg"))]
        if not rows:
            raise InputError(str(images), "no NYUv2 images (*.jpg) in this folder")
        return rows

    def load(self, row: Row) -> Sample:
        image = open_image(self._folder / "rgb" / row["image"])
        files = [self._folder / name / f"{row['key']}.png" for name in ("depth", "label40")]
        depth, labels = read_uint16(files[0]), read_ids(files[1])
        for file, values in zip(files, (depth, labels), strict=True):
            check_shape(file, values.shape, size_of(image))
        stored = nearest(labels, self._size)
        return {
            "image": resize_image(image, self._size),
            "depth": nearest(metres(depth), self._size)[None],
            "segmentation": (stored if self._table is None else self._table[stored])[None],
            "edges": edges_of(stored)[None],
            "intrinsics": self._intrinsics,
        }

    def fingerprint(self) -> Any:
        files = (
            self._folder / folder / (row["image"] if folder == "rgb" else f"{row['key']}.png")
            for row in self.index()
            for folder in ("rgb", "depth", "label40")
        )
        return fingerprint_files(self._folder, files)


def edges_of(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H, W]``: 1 where the right or lower neighbour is of another class, else 0; 255 where the
    pixel is ignored. An ignored neighbour makes no edge."""
    known = classes != IGNORE
    edges = np.zeros(classes.shape, np.uint8)
    edges[:-1] |= (classes[:-1] != classes[1:]) & known[1:]
    edges[:, :-1] |= (classes[:, :-1] != classes[:, 1:]) & known[:, 1:]
    return np.where(known, edges, IGNORE).astype(np.uint8)
