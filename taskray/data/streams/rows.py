"""Rows of an opened dataset: in order, checked, and stacked into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from taskray.data.readers.reader import Sample, place_of
from taskray.data.storage.codec import ERROR, KEY
from taskray.data.storage.source import DatasetInfo, MemorySource, Source
from taskray.data.streams.batch import Batch
from taskray.errors import InputError
from taskray.schema import quantity_of


def rows_of(source: Source, more: bool = True) -> Iterator[Sample]:
    """All rows of one pass in order, with ``key`` and ``error``, unreadable ones included.
    ``more``: another pass will follow."""
    if isinstance(source, MemorySource):
        for index in range(source.info.num_rows):
            yield source.row(index)
        return
    for block in source.one_pass(more):
        for number in range(len(block[KEY])):
            # Copied, so that a row that is kept does not keep its whole block.
            yield {column: np.array(values[number]) for column, values in block.items()}


def is_useful(info: DatasetInfo, row: Sample, columns: Sequence[str]) -> bool:
    """Whether the row keeps one of the labels among the columns; see ``storage.label_split``."""
    return info.split is None or info.split.is_useful(str(row[KEY]), columns)


def labelled_batch(info: DatasetInfo, rows: Sequence[Sample], columns: Sequence[str]) -> Batch:
    """As :func:`to_batch`, without the labels that none of the rows keeps."""
    if info.split is not None:
        columns = info.split.left_in([str(row[KEY]) for row in rows], columns)
    return to_batch(rows, columns)


def to_batch(rows: Sequence[Sample], columns: Sequence[str]) -> Batch:
    """Samples stacked as tensors: images as float32 ``[B, 3, H, W]`` in [0, 1], integers as
    int64, all else as float32. The tensors own their memory."""
    return Batch({c: _to_tensor(c, np.stack([row[c] for row in rows])) for c in columns})


def places(keys: Sequence[str], sequences: dict[str, int]) -> Tensor:
    """The place of each row in its sequence, from its key: see ``batch.PLACE``. ``sequences``
    numbers those seen so far, and is extended."""
    found = [place_of(key) for key in keys]
    pairs = [(sequences.setdefault(name, len(sequences)), number) for name, number in found]
    return torch.tensor(pairs, dtype=torch.int64)


def _to_tensor(column: str, values: np.ndarray) -> Tensor:
    # NumPy converts in this thread alone; torch would wake the training's threads for it.
    if quantity_of(column) == "image":
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    elif values.dtype.kind in "iu":
        values = values.astype(np.int64, copy=False)
    else:
        values = values.astype(np.float32, copy=False)
    return torch.from_numpy(values)


class CorruptRows:
    """The rows found unreadable so far, and how many may be."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        """Distinct rows found, and those that the conversion left out."""
        return self.left_out + len(self._reasons)

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self._info.name

    @property
    def left_out(self) -> int:
        """How many the conversion left out."""
        return self._info.skipped

    @property
    def keys(self) -> set[tuple[str, str]]:
        """Dataset and key of each row found."""
        return {(self.dataset, key) for key in list(self._reasons)}  # another thread adds to it

    def check(self, row: Sample) -> bool:
        """Whether the row can be used; InputError where too many cannot."""
        if not str(row[ERROR]):
            return True
        self._reasons.setdefault(str(row[KEY]), str(row[ERROR]))
        if len(self) > self._info.max_corrupt_rows or len(self._reasons) >= self._info.num_rows:
            first = next(iter(self._reasons.values()))
            raise InputError(
                f"dataset {self._info.name!r}",
                f"{len(self)} rows cannot be read, allowed are "
                f"{self._info.max_corrupt_rows} (max_corrupt_rows); the first: {first}",
            )
        return False


def count_corrupt(found: Sequence[CorruptRows]) -> int:
    """Rows that could not be used, each counted once, also where two streams read one dataset."""
    rows = {row for corrupt in found for row in corrupt.keys}
    return len(rows) + sum({corrupt.dataset: corrupt.left_out for corrupt in found}.values())


def checked_columns(info: DatasetInfo, columns: Sequence[str]) -> list[str]:
    """The columns, each of which must have been opened; InputError names one that was not."""
    for column in columns:
        if column not in info.layout:
            raise InputError(
                f"dataset {info.name!r}",
                f"column {column!r} was not opened; opened were {', '.join(info.layout)}",
            )
    return list(columns)
