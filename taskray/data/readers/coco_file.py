"""A file of COCO instances, checked: what its sections contain, and the fields of an annotation.

Many such files are made by hand or by tools, so nothing in them is taken for granted. What
concerns the whole file is refused with InputError; what is wrong in an image or an annotation
makes only that image unreadable: ValueError with its id and the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskray.data.readers.images import Size
from taskray.data.readers.reader import first_repeated
from taskray.errors import InputError
from taskray.files import read_json
from taskray.schema import IGNORE


@dataclass(frozen=True)
class Outline:
    """One object: ``shape`` is a list of polygons, or run lengths as in ``masks.fill_runs``."""

    area: float
    category: int
    crowd: bool
    shape: list[list[float]] | dict[str, Any]


def read_instances(file: Path) -> tuple[list[dict[str, Any]], set[int]]:
    """The images of the file, each with its ``annotations``, and the ids of its categories.

    Raises InputError if the file lacks a section, if two images or categories have one id, or if
    an annotation is of no image in it.
    """
    content = read_json(file)

    def refuse(reason: str) -> InputError:
        return InputError(str(file), reason)

    sections = {}
    for name in ("categories", "annotations", "images"):
        if name not in content:
            raise refuse(f"not COCO instances: no {name!r}")
        entries = content[name]
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise refuse(
                "not COCO instances: expected lists of sections under 'categories', "
                "'annotations' and 'images'"
            )
        ids = [json.dumps(entry.get("id")) for entry in entries]  # any type can be compared
        if name != "annotations" and (repeated := first_repeated(ids)) is not None:
            raise refuse(f"{name}: id {repeated} is missing or occurs twice")
        sections[name] = entries
    categories = [category.get("id") for category in sections["categories"]]
    for number in categories:
        if not _is_int(number) or not 0 <= number < IGNORE:
            raise refuse(f"got category id {number!r}, expected 0 to {IGNORE - 1}")
    for image in sections["images"]:
        try:
            _check(image, "image", "file_name", isinstance(image.get("file_name"), str), "text")
        except ValueError as error:
            raise refuse(str(error)) from None
    found: dict[str, list[Any]] = {json.dumps(image.get("id")): [] for image in sections["images"]}
    lost = []
    for annotation in sections["annotations"]:
        of = found.get(json.dumps(annotation.get("image_id")))
        if of is None:
            lost.append(annotation.get("image_id"))
        else:
            of.append(annotation)
    if lost:
        raise refuse(
            f"{len(lost)} annotations of images that it does not list "
            f"(first: image_id {_json(lost[0])})"
        )
    images = [
        {**image, "annotations": found[json.dumps(image.get("id"))]} for image in sections["images"]
    ]
    return images, set(categories)


def image_size(image: dict[str, Any]) -> Size:
    """Height and width that the file states for an image; ValueError if they are not whole."""
    for field in ("height", "width"):
        _check(image, "image", field, _is_int(image.get(field)), "a whole number")
    return image["height"], image["width"]


def outline(annotation: dict[str, Any], categories: Collection[int]) -> Outline:
    """The object of an annotation; ValueError names the first field of another type or range, or
    a category that is not in the file."""

    def check(field: str, fits: bool, expected: str) -> None:
        _check(annotation, "annotation", field, fits, expected)

    fields = ("area", "category_id", "iscrowd", "segmentation")
    values: list[Any] = [annotation.get(field) for field in fields]
    area, category, crowd, shape = values
    check("area", _is_number(area) and area >= 0, "a number from 0")
    check("category_id", _is_int(category), "a whole number")
    check("category_id", category in categories, "a category of the file")
    check("iscrowd", _is_int(crowd) and crowd in (0, 1), "0 or 1")
    if isinstance(shape, dict):
        counts = shape.get("counts")
        fits = isinstance(counts, str) or _is_list(counts, _is_int)
        fits = fits and _is_list(shape.get("size"), _is_int) and len(shape["size"]) == 2
    else:
        fits = bool(shape) and _is_list(shape, lambda polygon: _is_list(polygon, _is_number))
    check("segmentation", fits, "polygons or run lengths")
    return Outline(area, category, bool(crowd), shape)


def _check(entry: dict[str, Any], kind: str, field: str, fits: bool, expected: str) -> None:
    if not fits:
        got = _json(entry[field]) if field in entry else "missing"
        where = f"{kind} {_json(entry['id'])}" if "id" in entry else f"{kind} without id"
        raise ValueError(f"{where}: {field} is {got}, expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any, fits: Any) -> bool:
    return isinstance(value, list) and all(fits(one) for one in value)


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."
