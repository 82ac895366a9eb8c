"""Shared by the readers of images: reading and resizing frames, intrinsics, depth in PNGs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from taskray.errors import one_line
from taskray.geometry.camera import resize_intrinsics

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
    """An RGB image at its stored size; ValueError, naming the file, if it cannot be decoded."""
    with _naming(file), Image.open(file) as opened:
        return opened.convert("RGB")


def resize_image(image: Image.Image, size: Size, box: Box | None = None) -> np.ndarray:
    """``[H, W, 3]`` uint8, resized by area; with ``box``, that part of the image."""
    return np.array(image.resize((size[1], size[0]), Image.Resampling.BOX, box))


def read_map(file: Path) -> np.ndarray:
    """A single-channel PNG at its stored size, ``[h, w]``; ValueError if it has more channels."""
    with _naming(file), Image.open(file) as opened:
        values = np.array(opened)
    if values.ndim != 2:
        raise ValueError(f"{file.name}: got shape {values.shape}, expected one channel")
    return values


def metres(millimetres: np.ndarray) -> np.ndarray:
    """Depth PNG to float32 metres; 0 and 65535 mean *not measured* and become 0."""
    measured = millimetres != 65535
    metric: np.ndarray = (millimetres * measured).astype(np.float32) / np.float32(1000)
    return metric


def nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """``[..., h, w]`` resized; each new pixel has the value at its centre."""
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
    except (OSError, SyntaxError, ValueError) as error:
        reason = one_line(error).replace(str(file), file.name)
        raise ValueError(f"{file.name}: cannot be decoded: {reason}") from None
