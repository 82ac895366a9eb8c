"""COCO (Lin et al., ECCV 2014): photographs in which every object of 80 kinds is outlined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from taskray.data.readers.class_map import class_map
from taskray.data.readers.coco_file import Outline, image_size, outline, read_instances
from taskray.data.readers.images import Box, Size, open_image, resize_image, size_of, turned
from taskray.data.readers.masks import fill_polygon, fill_runs
from taskray.data.readers.reader import Reader, Row, Sample, fingerprint_files
from taskray.errors import InputError
from taskray.schema import IGNORE


class Coco(Reader):
    """Images with a class per pixel, made from the outlines of objects.

    Layout: ``{split}/*.jpg`` and ``annotations/instances_{split}.json``. A pixel has the class of
    the smallest object that covers it. Pixels without an outline, and objects that the class map
    does not list, have its class ``rest``; crowds, which have one outline together, are ignored.

    An image is scaled until it covers the frame and cropped equally on both sides, so that the
    frame has no artificial border. The outlines are those of the image as it is shown, turned by
    its EXIF orientation. COCO has no intrinsics.

    Args:
        path: the folder that contains these.
        split: name of the folder of images (``train2017``, ``val2017``).
        class_map: the classes, a built-in class map with ids of ``coco`` or the path of one.
        height, width: size of the frames in pixels.
    """

    columns = ("image", "segmentation")

    def __init__(
        self,
        path: str,
        split: str = "train2017",
        class_map: str = "taskology",
        height: Annotated[int, Field(ge=8)] = 96,
        width: Annotated[int, Field(ge=8)] = 128,
    ) -> None:
        self._folder = Path(path).expanduser() / split
        self._annotations = self._folder.parent / "annotations" / f"instances_{split}.json"
        self._table, self._rest = _classes(class_map)
        self._size = (height, width)

    def index(self) -> list[Row]:
        images, categories = read_instances(self._annotations)
        if not any((self._folder / image["file_name"]).is_file() for image in images):
            raise InputError(
                str(self._folder), f"contains none of the {len(images)} images of {self._file}"
            )
        known = sorted(categories)
        return [
            {"key": Path(image["file_name"]).stem, "image": image, "categories": known}
            for image in images
        ]

    def load(self, row: Row) -> Sample:
        stated = image_size(row["image"])
        outlines = [outline(one, row["categories"]) for one in row["image"]["annotations"]]
        file = self._folder / row["image"]["file_name"]
        image = open_image(file)
        size = size_of(image)
        if size != stated:
            raise ValueError(
                f"{file.name}: got {size[0]}x{size[1]} pixels, "
                f"expected {stated[0]}x{stated[1]} (from {self._file}){turned(size, stated)}"
            )
        box = centre_box(size, self._size)
        return {
            "image": resize_image(image, self._size, box),
            "segmentation": self._segmentation(outlines, size, box)[None],
        }

    def fingerprint(self) -> Any:
        images = sorted(self._folder.glob("*"))
        files = fingerprint_files(self._folder.parent, [self._annotations, *images])
        return [files, self._table.tolist(), self._rest]

    @property
    def _file(self) -> str:
        return self._annotations.name

    def _segmentation(self, outlines: list[Outline], size: Size, box: Box) -> np.ndarray:
        """Class indices ``[H, W]``: crowds first, then objects from the largest to the smallest,
        so that a small object in front of a larger one is visible."""
        classes = np.full(self._size, self._rest, dtype=np.uint8)
        for one in sorted(outlines, key=lambda o: (not o.crowd, -o.area)):
            index = IGNORE if one.crowd else self._table[one.category]
            if isinstance(one.shape, dict):
                inside = fill_runs(one.shape)
                if inside.shape != size:
                    raise ValueError(f"got a mask of {inside.shape}, expected {size} (the image)")
                classes[_show(inside, box, self._size)] = index
                continue
            for polygon in one.shape:
                classes[fill_polygon(polygon, self._size, box)] = index
        return classes


def centre_box(size: Size, wanted: Size) -> Box:
    """The largest part of an image, in its middle, of the aspect ratio of ``wanted``."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    height, width = wanted[0] * scale, wanted[1] * scale
    left, top = max(0.0, (size[1] - width) / 2), max(0.0, (size[0] - height) / 2)
    # rounding may put an edge just outside, and Pillow refuses a box beyond the image
    return (left, top, min(left + width, size[1]), min(top + height, size[0]))


def _show(mask: np.ndarray, box: Box, size: Size) -> np.ndarray:
    """The values of a mask at the pixel centres of a frame that shows ``box`` of the image."""
    left, top, right, bottom = box
    rows = (top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]).astype(int)
    columns = (left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]).astype(int)
    shown: np.ndarray = mask[rows[:, None], columns]
    return shown


def _classes(name: str) -> tuple[np.ndarray, int]:
    """The class index of each category, and that of pixels without an outline."""
    found = class_map(name)
    rest = IGNORE if found.rest is None else found.classes.index(found.rest)
    return found.table("coco"), rest
