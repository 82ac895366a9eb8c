"""Shared by the readers of images: reading and resizing frames, intrinsics, depth in PNGs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field

from taskray.errors import one_line
from taskray.geometry.camera import resize_intrinsics
from taskray.schema import IGNORE

Size = tuple[int, int]
"""Height and width in pixels."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels, from the image's upper left corner."""
FocalLength = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Offset = Annotated[float, Field(allow_inf_nan=False)]
"""Entries of a camera matrix, in pixels."""


def read_image(file: Path, size: Size) -> np.ndarray:
    """An RGB image, ``[H, W, 3]`` uint8, resized by area."""
    return resize_image(open_image(file), size)


def open_image(file: Path) -> Image.Image:
    """An upright RGB image at its stored size; see :func:`to_rgb`. ValueError, naming the file,
    if it cannot be decoded or is refused."""
    with _naming(file), Image.open(file) as opened:
        return to_rgb(opened)


def to_rgb(opened: Image.Image) -> Image.Image:
    """An image that Pillow has opened and not yet decoded, as upright RGB.

    It is turned as its EXIF orientation states, as viewers and annotation tools show it. Grey,
    palette and CMYK images are converted. ValueError for more than 8 bits a channel, because the
    range in use (10, 12 or 16 bits) is not stored, and for transparent pixels, whose colour is
    not defined.
    """
    bits = _stored_bits(opened)
    if bits > 8:
        raise _Refused(f"got {bits} bits a channel, expected 8")
    image = ImageOps.exif_transpose(opened)
    if "A" in image.getbands() or "transparency" in image.info:
        opacity = image.convert("RGBA").getchannel("A").getextrema()
        if opacity != (255, 255):
            raise _Refused("got transparent pixels, expected an opaque image")
    return image.convert("RGB")


def size_of(image: Image.Image) -> Size:
    """Height and width of an image."""
    return image.height, image.width


def resize_image(image: Image.Image, size: Size, box: Box | None = None) -> np.ndarray:
    """``[H, W, 3]`` uint8, resized by area; with ``box``, that part of the image."""
    resized = resize_area(np.asarray(image, np.float32), size, box)
    return np.asarray(np.rint(resized), np.uint8)


def resize_area(values: np.ndarray, size: Size, box: Box | None = None) -> np.ndarray:
    """``[h, w, C]`` float32 as ``[H, W, C]``: each new pixel is the mean over the area that it
    covers, where a stored pixel counts by the part of it inside. With ``box``, of that part.

    Pillow's BOX gives every pixel whose centre is inside the same weight; at ratios that are no
    whole numbers its pixels are up to 0.17 pixels beside their places, those of exact areas 0.06.
    """
    left, top, right, bottom = box or (0, 0, values.shape[1], values.shape[0])
    rows = _overlaps(values.shape[0], size[0], top, bottom)
    columns = _overlaps(values.shape[1], size[1], left, right)
    resized: np.ndarray = columns @ np.tensordot(rows, values, axes=1)
    return resized


def _overlaps(old: int, new: int, start: float, stop: float) -> np.ndarray:
    """The part of each of ``new`` equal pieces of ``start`` to ``stop`` that is in each of ``old``
    pixels, ``[new, old]`` float32; the sum of each row is 1."""
    edges = np.linspace(start, stop, new + 1)[:, None]
    pixels = np.arange(old)
    inside = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (inside.clip(min=0) * new / (stop - start)).astype(np.float32)


def read_ids(file: Path, highest: int = IGNORE - 1) -> np.ndarray:
    """A map of ids at its stored size, uint8 ``[h, w]``: grey, or the indices of a palette.

    ValueError for an id that is neither 0 to ``highest`` nor 255, for more than one channel, and
    for grey of 2 or 4 bits, whose ids Pillow would multiply.
    """
    with _naming(file), Image.open(file) as opened:
        bits = _stored_bits(opened)
        if opened.mode == "L" and bits < 8:
            raise _Refused(f"got ids of {bits} bits, expected 8 bits or a palette")
        ids = _one_channel(opened, ("1", "L", "P"), "ids")
        unknown = ids[((ids < 0) | (ids > highest)) & (ids != IGNORE)]
        if unknown.size:
            raise _Refused(
                f"got label id {unknown[0]}, expected 0 to {highest}, or {IGNORE} (ignored)"
            )
    return ids.astype(np.uint8)


def read_uint16(file: Path) -> np.ndarray:
    """A map of measured values, such as depth, at its stored size, uint16 ``[h, w]``; ValueError
    if it has more channels or only 8 bits."""
    with _naming(file), Image.open(file) as opened:
        values = _one_channel(opened, (), "16 bits")
        if values.min() < 0 or values.max() > 65535:
            raise _Refused(f"got values of {values.min()} to {values.max()}, expected 0 to 65535")
    return values.astype(np.uint16)


def turned(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The end of an error about two sizes: the likely reason, if one is the other turned."""
    return "; images are turned by their EXIF orientation" if got == expected[::-1] else ""


def check_shape(file: Path, shape: tuple[int, ...], image: Size) -> None:
    """ValueError, naming the file, if a map has another aspect ratio than its image, by more than
    a rounded pixel. Their sizes may differ: both are resized."""
    height, width = shape
    if abs(height * image[1] - width * image[0]) <= max(height, width, *image):
        return
    raise ValueError(
        f"{file.name}: got {height}x{width} pixels, expected the shape of the image, "
        f"{image[0]}x{image[1]}{turned(shape, image)}"
    )


def _one_channel(opened: Image.Image, modes: Collection[str], what: str) -> np.ndarray:
    """An upright map in one of Pillow's ``modes``, or of integers of 16 or 32 bits."""
    if opened.mode not in modes and not opened.mode.startswith("I"):
        channels = " ".join(opened.getbands())
        bits = _stored_bits(opened)
        raise _Refused(f"got channels {channels} of {bits} bits, expected one channel of {what}")
    return np.array(ImageOps.exif_transpose(opened)).astype(np.int64)


def _stored_bits(opened: Image.Image) -> int:
    """Bits a channel in the file. Pillow reduces 16-bit RGB to 8 bits when it decodes: only the
    raw mode, which is given until then, contains 16."""
    if opened.mode == "1":
        return 1
    if opened.mode in ("I", "F"):
        return 32
    modes = [opened.mode]
    for tile in getattr(opened, "tile", []):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        modes += [argument for argument in arguments if isinstance(argument, str)]
    found = (re.match(r"(?:I|L|LA|P|RGBA?|RGBX|CMYK);(\d+)", mode) for mode in modes)
    return next((int(match[1]) for match in found if match), 8)


class _Refused(ValueError):
    """An image that was decoded, but is not what is expected."""


def metres(millimetres: np.ndarray) -> np.ndarray:
    """Depth PNG to float32 metres; 0 and 65535 mean *not measured* and become 0."""
    measured = millimetres != 65535
    metric: np.ndarray = (millimetres * measured).astype(np.float32) / np.float32(1000)
    return metric


def nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """``[..., h, w]`` resized; each new pixel has the value at its centre.

    At an even ratio the centre is between two stored pixels: the later one is taken, half a stored
    pixel to the right and below. A choice without this shift would take now the earlier, now the
    later one: distances between neighbours, and so the slopes of depth, would be wrong by half.
    """
    height, width = values.shape[-2:]
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
    return values[..., rows[:, None], columns]


def camera_matrix(fx: float, fy: float, x0: float, y0: float, of: Size, size: Size) -> np.ndarray:
    """The camera matrix ``[3, 3]`` float32 for frames of ``size``, from that for size ``of``."""
    matrix = np.array([[fx, 0.0, x0], [0.0, fy, y0], [0.0, 0.0, 1.0]])
    return resize_camera(matrix, of, size).astype(np.float32)


def resize_camera(matrix: np.ndarray, of: Size, size: Size) -> np.ndarray:
    """A camera matrix ``[3, 3]`` float64 for frames of ``size``, from that for size ``of``."""
    resized = resize_intrinsics(torch.from_numpy(matrix)[None], of, size)[0]
    return np.asarray(resized.numpy())


def check_camera(matrix: np.ndarray, where: str) -> np.ndarray:
    """The same camera matrix ``[3, 3]``; ValueError, naming ``where``, if it has no inverse."""
    focal = matrix[[0, 1], [0, 1]]
    if not np.isfinite(matrix).all() or not (focal > 0).all():
        raise ValueError(f"{where}: expected finite intrinsics with focal lengths above 0")
    return matrix


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Pillow's many types of errors about a damaged file, as ValueError with the file's name."""
    try:
        yield
    except FileNotFoundError:
        raise
    except _Refused as error:
        raise ValueError(f"{file.name}: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = one_line(error).replace(str(file), file.name)
        raise ValueError(f"{file.name}: cannot be decoded: {reason}") from None
