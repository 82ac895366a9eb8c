"""Semantic segmentation from one image."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from taskray.data.readers.class_map import ClassMap
from taskray.data.readers.class_map import class_map as find_class_map
from taskray.errors import InputError
from taskray.schema import IGNORE
from taskray.tasks.pixel_classes import ClassWeights, PixelClasses


class Segmentation(PixelClasses):
    """A class per pixel, from one image: logits ``[B, C, H, W]``, learnt by cross entropy.

    Args:
        class_map: the classes: a built-in map (``world``, ``taskology``, ``cityscapes_7``,
            ``cityscapes_16``, ``cityscapes_19``, ``nyu_13``, ``vkitti2_cityscapes``) or a YAML
            file. The dataset's labels must be indices of it.
        num_classes: the number of classes, without names, instead of a class map.
        metric_classes: ``all``, or ``movable``: measure the map's movable classes alone.
        class_weights: factor on the loss of the pixels of a class, by its name; 1 for classes that
            are not named. Without them a network may miss a class that few pixels have.
    """

    quantities = ("segmentation",)
    labels = ("segmentation",)

    def __init__(
        self,
        class_map: str | None = None,
        num_classes: Annotated[int, Field(ge=2, le=IGNORE)] | None = None,
        metric_classes: Literal["all", "movable"] = "all",
        class_weights: ClassWeights | None = None,
    ) -> None:
        if class_map is not None and num_classes is not None:
            raise InputError("num_classes", "got a class_map as well, expected one of the two")
        if num_classes is not None:
            known = ClassMap(classes=tuple(map(str, range(num_classes))))
        else:
            known = find_class_map(class_map or "world")
        if metric_classes == "movable" and not known.movable:
            raise InputError("metric_classes", "got movable, expected a map with movable classes")
        measured = known.movable if metric_classes == "movable" else known.classes
        super().__init__(known.classes, measured, class_weights)
