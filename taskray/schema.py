"""Every quantity that modules exchange: its shape, unit, range and sign.

Conventions
-----------
* Camera axes: x right, y down, z forward. Pixel ``(i, j)`` is (row, column);
  its homogeneous form is ``p = (j, i, 1)``.
* Depth is z in metres (not the ray length); 0 means *not measured*.
* ``camera_motion`` M is 4x4 and takes a point from camera 1 to camera 2:
  ``X2 = R12 @ X1 + T12 (+ m * delta12)`` with ``M = [[R12, T12], [0, 1]]``.
* ``object_motion`` delta12 is on the pixels of frame 1, in metres, in the axes of
  camera 2: the movement of the visible point relative to the scene.
* Normals are unit vectors in camera axes that face the camera: ``n . ray < 0``.
* Segmentation is a class index per pixel; 255 is ignored.
* Maps of point clouds are from above: row y, column x, both increasing (``geometry.grid``). Each
  cell has two anchors for each class of a task, in the order of its classes: at the cell's
  centre, of the class's size and height, heading 0 first, then pi/2. A prediction for an anchor
  is *box minus anchor*: in metres for x y z, ``log(box / anchor)`` for l w h, radians for theta.
  The difference of theta is in (-pi/2, pi/2] and gives the axis of a box; a separate logit gives
  its direction along that axis.
* Point clouds and boxes are in the axes of the LiDAR of their frame: x forward, y left, z up,
  metres; a box's heading theta is about z, from x towards y, in (-pi, pi].

A dataset row contains one frame, a pair or a triplet. The columns of the first frame have the
plain name; those of frame k have the suffix ``_k`` (``image_2``). ``camera_motion`` is 1 -> 2 and
``camera_motion_2`` is 2 -> 3. ``intrinsics`` is shared by all frames of a row. Predictions are
named the same way: a network with one input frame predicts ``depth`` for the first frame and
``depth_2`` for the second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

IGNORE = 255
"""Segmentation value of pixels that are left out of losses and metrics."""


@dataclass(frozen=True)
class Quantity:
    """One named tensor; ``shape`` is that of one sample, with H and W for the frame size."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    unit: str
    meaning: str


QUANTITIES: dict[str, Quantity] = {
    q.name: q
    for q in (
        Quantity(
            "image",
            (3, "H", "W"),
            "uint8",
            "RGB, 0-255 stored, [0, 1] in training",
            "colour frame",
        ),
        Quantity(
            "intrinsics",
            (3, 3),
            "float32",
            "pixels",
            "camera matrix K: fx, fy, principal point (x0, y0) at pixel centres",
        ),
        Quantity(
            "depth",
            (1, "H", "W"),
            "float32",
            "metres along z, 0 invalid",
            "distance of the surface from the image plane",
        ),
        Quantity(
            "normals",
            (3, "H", "W"),
            "float32",
            "unit vectors, camera axes; 0 0 0 invalid",
            "surface normals facing the camera",
        ),
        Quantity(
            "segmentation",
            (1, "H", "W"),
            "uint8",
            "class index, 255 ignored",
            "semantic class per pixel",
        ),
        Quantity(
            "edges",
            (1, "H", "W"),
            "uint8",
            "1 edge, 0 none, 255 ignored",
            "occlusion and object boundaries",
        ),
        Quantity(
            "camera_motion",
            (4, 4),
            "float32",
            "metres, camera k to camera k+1",
            "rigid motion of the camera to the next frame",
        ),
        Quantity(
            "camera_motion_back",
            (4, 4),
            "float32",
            "metres, camera k to camera k-1",
            "rigid motion of the camera to the frame before",
        ),
        Quantity(
            "object_motion",
            (3, "H", "W"),
            "float32",
            "metres, axes of camera k+1",
            "movement of the visible point relative to the scene, to the next frame",
        ),
        Quantity(
            "object_motion_back",
            (3, "H", "W"),
            "float32",
            "metres, axes of camera k-1",
            "the same, to the frame before",
        ),
        Quantity(
            "motion_mask",
            (1, "H", "W"),
            "uint8",
            "1 moving, 0 still, 255 ignored",
            "pixels of objects that move relative to the scene",
        ),
        Quantity(
            "points",
            ("P", 4),
            "float32",
            "x y z in metres, reflectance in [0, 1]; rows of NaN are empty",
            "LiDAR sweep in the axes of its sensor",
        ),
        Quantity(
            "boxes",
            ("M", 9),
            "float32",
            "x y z l w h in metres, theta in radians, class index, track id; rows of NaN are empty",
            "upright boxes around objects, in the axes of the frame's LiDAR; x y z is the centre",
        ),
        Quantity(
            "lidar_motion",
            (4, 4),
            "float32",
            "metres, LiDAR k to LiDAR k+1",
            "rigid motion of the LiDAR to the next frame",
        ),
        Quantity(
            "detection",
            ("A", 9, "Y", "X"),
            "float32",
            "x y z in metres, log of l w h, theta in radians, logits of direction and class",
            "for each anchor the most likely box, as the difference of box and anchor; see above",
        ),
        Quantity(
            "box_flow",
            ("A", "D", "Y", "X"),
            "float32",
            "x y in metres, theta in radians; these three for each other frame",
            "for each anchor the movement of its box: box in another frame minus box in this one, "
            "each in the axes of its frame; the previous frame first, then the one before it",
        ),
    )
}

PREDICTED_SHAPES: dict[str, tuple[int | str, ...]] = {
    "segmentation": ("C", "H", "W"),  # predictions are logits, labels are indices
    "motion_mask": (2, "H", "W"),
}
"""Shapes of predictions that differ from those of their labels: a logit for each class."""


def has_logits(name: str) -> bool:
    """Whether the predictions of a quantity, at any frame, are logits of classes."""
    return quantity_of(name) in PREDICTED_SHAPES


INVALID: dict[str, float] = {
    "depth": 0, "normals": 0, "segmentation": IGNORE, "edges": IGNORE, "object_motion": 0,
    "object_motion_back": 0, "motion_mask": IGNORE, "boxes": math.nan,
}  # fmt: skip
"""The value of a label that is missing, by quantity. Object motion has no value of its own: its
``motion_mask`` marks the pixels without a label. Boxes that are all NaN look like a sample without
objects. Other quantities are measured, not labelled."""

SHARED = frozenset({"intrinsics"})
"""Columns that all frames of a row share."""


def quantity_of(column: str) -> str:
    """The quantity of a column: ``depth_2`` -> ``depth``."""
    base = re.sub(r"_[2-9]$", "", column)
    return base if base in QUANTITIES else column


def frame_suffix(number: int) -> str:
    """The suffix of the columns of a frame, counted from 1: none, ``_2``, ``_3``."""
    return "" if number == 1 else f"_{number}"


def frame_of(column: str) -> str:
    """The suffix of a column's frame: ``depth_2`` -> ``_2``, ``depth`` -> empty."""
    return column[len(quantity_of(column)) :]


def at_frame(column: str, frame: str) -> str:
    """The column of another frame, by its suffix: ``image``, ``_2`` -> ``image_2``. Shared columns
    keep their name."""
    return column if column in SHARED else column + frame


def shape_problem(name: str, shape: Sequence[int], sizes: Mapping[str, int]) -> str | None:
    """One line if a predicted quantity ``[B, *shape]`` has another shape than its definition.

    ``sizes``: of the letters that are known (``B``, ``H``, ``W``); others may be anything, and a
    quantity that is not defined here has any shape.
    """
    quantity = QUANTITIES.get(quantity_of(name))
    if quantity is None:
        return None
    letters = ("B", *PREDICTED_SHAPES.get(quantity.name, quantity.shape))
    expected = [sizes.get(d, d) if isinstance(d, str) else d for d in letters]
    if len(shape) == len(expected) and all(
        isinstance(e, str) or e == g for e, g in zip(expected, shape, strict=True)
    ):
        return None
    wanted = "x".join(map(str, expected))
    return f"{name!r} has shape {'x'.join(map(str, shape))}, expected {wanted}"
