"""COCO (Lin et al., ECCV 2014): photographs in which every object of 80 kinds is outlined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from taskray.data.readers.class_map import class_map
from taskray.data.readers.images import Box, Size, open_image, resize_image
from taskray.data.readers.masks import fill_polygon, fill_runs
from taskray.data.readers.reader import Reader, Row, Sample, fingerprint_files
from taskray.errors import InputError
from taskray.files import read_json
from taskray.schema import IGNORE


class Coco(Reader):
    """Images with a class per pixel, made from the outlines of objects.

    Layout: ``{split}/*.jpg`` and ``annotations/instances_{split}.json``. A pixel has the class of
    the smallest object that covers it. Pixels without an outline, and objects that the class map
    does not list, have its class ``rest``; crowds, which have one outline together, are ignored.

    An image is scaled until it covers the frame and cropped equally on both sides, so that the
    frame has no artificial border. COCO has no intrinsics.

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
        content = self._read()
        objects: dict[int, list[Any]] = {}
        try:
            known = {category["id"] for category in content["categories"]}
            self._check_ids(known)
            for a in content["annotations"]:
                one = [a["area"], a["category_id"], a["iscrowd"], a["segmentation"]]
                objects.setdefault(a["image_id"], []).append(one)
            rows = [
                {
                    "key": Path(image["file_name"]).stem,
                    "image": image["file_name"],
                    "size": [image["height"], image["width"]],
                    "objects": objects.get(image["id"], []),
                    "unknown": sorted({o[1] for o in objects.get(image["id"], [])} - known),
                }
                for image in content["images"]
            ]
        except KeyError as error:
            raise InputError(str(self._annotations), f"not COCO instances: no {error}") from None
        except TypeError:
            raise InputError(
                str(self._annotations),
                "not COCO instances: expected lists of sections under 'categories', "
                "'annotations' and 'images'",
            ) from None
        if not any((self._folder / row["image"]).is_file() for row in rows):
            raise InputError(
                str(self._folder), f"contains none of the {len(rows)} images of {self._file}"
            )
        return rows

    def load(self, row: Row) -> Sample:
        if row["unknown"]:
            raise ValueError(f"category {row['unknown'][0]} is not in {self._file}")
        image = open_image(self._folder / row["image"])
        size = (image.height, image.width)
        if size != tuple(row["size"]):
            expected = "x".join(map(str, row["size"]))
            raise ValueError(
                f"{row['image']}: got {size[0]}x{size[1]} pixels, "
                f"expected {expected} (from {self._file})"
            )
        box = centre_box(size, self._size)
        return {
            "image": resize_image(image, self._size, box),
            "segmentation": self._segmentation(row["objects"], size, box)[None],
        }

    def fingerprint(self) -> Any:
        images = sorted(self._folder.glob("*"))
        files = fingerprint_files(self._folder.parent, [self._annotations, *images])
        return [files, self._table.tolist(), self._rest]

    @property
    def _file(self) -> str:
        return self._annotations.name

    def _read(self) -> dict[str, Any]:
        return read_json(self._annotations)

    def _check_ids(self, ids: set[Any]) -> None:
        wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < IGNORE]
        if wrong:
            raise InputError(
                str(self._annotations), f"got category id {wrong[0]!r}, expected 0 to {IGNORE - 1}"
            )

    def _segmentation(self, objects: list[Any], size: Size, box: Box) -> np.ndarray:
        """Class indices ``[H, W]``: crowds first, then objects from the largest to the smallest,
        so that a small object in front of a larger one is visible."""
        classes = np.full(self._size, self._rest, dtype=np.uint8)
        for _, category, crowd, outline in sorted(objects, key=lambda o: (not o[2], -o[0])):
            index = IGNORE if crowd else self._table[category]
            if isinstance(outline, dict):
                inside = fill_runs(outline)
                if inside.shape != size:
                    raise ValueError(f"got a mask of {inside.shape}, expected {size} (the image)")
                classes[_show(inside, box, self._size)] = index
                continue
            for polygon in outline:
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
