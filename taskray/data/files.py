"""What readers of image folders share: reading and resizing frames, intrinsics, depth in PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from taskray.geometry.camera import resize_intrinsics

Size = tuple[int, int]
"""Height and width in pixels."""


def read_image(file: Path, size: Size) -> np.ndarray:
    """An RGB image, ``[H, W, 3]`` uint8, resized by area."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    return np.array(image.resize((size[1], size[0]), Image.Resampling.BOX))


def read_map(file: Path) -> np.ndarray:
    """A single-channel PNG at its own size, ``[h, w]``; raises ValueError where it has more."""
    with Image.open(file) as opened:
        values = np.array(opened)
    if values.ndim != 2:
        raise ValueError(f"{file.name} has shape {values.shape}, expected one channel")
    return values


def metres(millimetres: np.ndarray) -> np.ndarray:
    """Depth PNG to float32 metres; 0 and the largest uint16 stand for *not measured*: 0."""
    measured = millimetres != 65535
    metric: np.ndarray = (millimetres * measured).astype(np.float32) / np.float32(1000)
    return metric


def nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """``[..., h, w]`` resized by taking the pixel at each new pixel's centre."""
    height, width = values.shape[-2:]
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
    return values[..., rows[:, None], columns]


def camera_matrix(fx: float, fy: float, x0: float, y0: float, of: Size, size: Size) -> np.ndarray:
    """The camera matrix ``[3, 3]`` float32, given for frames of one size, for another."""
    matrix = torch.tensor([[fx, 0.0, x0], [0.0, fy, y0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    resized = resize_intrinsics(matrix[None], of, size)[0]
    return np.asarray(resized.numpy(), dtype=np.float32)
