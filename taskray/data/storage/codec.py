"""Encoding: samples to bytes and back, one row of a stored dataset each.

Images are PNG (JPEG is read too), every other column is a ``.npy`` file with the shape and type
of its quantity in ``schema``. A row that cannot be decoded does not fail the whole table: it
becomes zeros, and its column ``error`` contains the reason.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from taskray.data.readers.images import to_rgb
from taskray.data.readers.reader import Sample
from taskray.errors import one_line
from taskray.schema import QUANTITIES, quantity_of

KEY = "key"
"""Column with the unique, readable name of each sample."""
ERROR = "error"
"""Decoded column with the reason why a row could not be read; empty if it could."""

Columns = dict[str, np.ndarray]
"""Decoded rows: ``[N, ...]`` for each column, ``key`` and ``error`` as strings ``[N]``."""


@dataclass(frozen=True)
class ArraySpec:
    """Shape and type of one sample's column."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: np.ndarray) -> ArraySpec:
        return cls(array.shape, array.dtype.name)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {'x'.join(map(str, self.shape))}"


Layout = dict[str, ArraySpec]
"""Shape and type of each column, the same in every sample (images ``[H, W, 3]``)."""


def encode(sample: Sample, columns: Iterable[str]) -> dict[str, bytes]:
    """The columns of a decoded sample as bytes.

    Raises ValueError if a column is missing, or does not have the shape and type in ``schema``.
    """
    missing = [c for c in columns if c not in sample]
    if missing:
        raise ValueError(f"the reader returned no {', '.join(missing)}")
    chosen = {c: np.ascontiguousarray(sample[c]) for c in columns}
    check_sample(chosen)
    return {c: _encode_value(c, array) for c, array in chosen.items()}


def decode_rows(
    table: pa.Table, columns: Iterable[str], layout: Layout | None = None, where: str = ""
) -> Columns:
    """Stored rows as stacked arrays, with ``key`` and ``error``.

    A row that cannot be decoded, or does not have the ``layout`` (default: that of the first row
    that can be read), has zeros in all columns, and ``error`` contains ``where: key: reason``.
    Raises ValueError if no row can be read and no layout is given.
    """
    columns = list(columns)
    keys = [str(k) for k in table[KEY].to_pylist()]
    values = {c: table[c] for c in columns}
    samples: list[Sample | None] = []
    errors = []
    for number, key in enumerate(keys):
        reason, sample = "", None
        try:
            row = {c: values[c][number].as_py() for c in columns}
            sample = decode_row(row, layout)
            layout = layout or {c: ArraySpec.of(a) for c, a in sample.items()}
        except Exception as error:  # Pillow and NumPy raise many types for damaged bytes
            reason = ": ".join(part for part in (where, key, one_line(error)) if part)
        samples.append(sample)
        errors.append(reason)
    if layout is None:
        raise ValueError(errors[0] if errors else f"{where or 'the table'}: no rows")
    decoded: Columns = {}
    for column in columns:
        spec = layout[column]
        stack = np.zeros((len(keys), *spec.shape), spec.dtype)
        for number, sample in enumerate(samples):
            if sample is not None:
                stack[number] = sample[column]
        decoded[column] = stack
    return {**decoded, KEY: np.array(keys), ERROR: np.array(errors)}


def decode_row(row: Mapping[str, bytes], layout: Layout | None = None) -> Sample:
    """One stored row as arrays; raises if it cannot be read or has another layout."""
    sample = {c: _decode_value(c, data) for c, data in row.items()}
    if layout is None:
        check_sample(sample)
        return sample
    for column, array in sample.items():
        found, expected = ArraySpec.of(array), layout[column]
        if found != expected:
            raise ValueError(f"{column}: got {found}, expected {expected} as in the other rows")
    return sample


def check_sample(sample: Sample) -> None:
    """Refuse (ValueError) a sample with a column of another shape or type than in ``schema``, or
    with frames of different sizes. Columns that are not in ``schema`` may contain any numbers."""
    frames: dict[str, tuple[int, ...]] = {}
    for column, array in sample.items():
        quantity = QUANTITIES.get(quantity_of(column))
        if quantity is None:
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{column}: got {array.dtype}, expected numbers")
            continue
        expected = ("H", "W", 3) if quantity.name == "image" else quantity.shape
        fits = array.ndim == len(expected) and all(
            isinstance(want, str) or want == got
            for want, got in zip(expected, array.shape, strict=True)
        )
        if not fits or array.dtype != quantity.dtype:
            wanted = f"{quantity.dtype} {'x'.join(map(str, expected))}"
            raise ValueError(f"{column}: got {ArraySpec.of(array)}, expected {wanted}")
        if "H" in expected:
            row_axis = expected.index("H")
            frames[column] = array.shape[row_axis : row_axis + 2]
    first = next(iter(frames), None)
    for column, size in frames.items():
        if first is not None and size != frames[first]:
            raise ValueError(
                f"{column}: got {size[0]}x{size[1]} pixels, "
                f"expected {frames[first][0]}x{frames[first][1]} as {first}"
            )


def _encode_value(column: str, array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    if quantity_of(column) == "image":
        # Level 1 is five times as fast as the default, and the files are a tenth larger.
        Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    else:
        np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _decode_value(column: str, data: bytes | None) -> np.ndarray:
    if data is None:
        raise ValueError(f"{column}: empty")
    if quantity_of(column) == "image":
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(to_rgb(image))
        except UnidentifiedImageError:  # its text is the address of the buffer
            raise ValueError(f"{column}: not an image in any known format") from None
    return cast(np.ndarray, np.load(io.BytesIO(data), allow_pickle=False))
