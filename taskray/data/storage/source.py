"""A stored dataset, opened: decoded in memory, or streamed in passes.

::

    Parquet ─ pieces ─ decode ─┬─▶ blocks in the object store (or in this process) ─▶ MemorySource
                               └─▶ one pass after another, the next started early ──▶ StreamSource

``open_source`` decides which, in the driver, and returns a handle. The handle is sent to the
process that needs the data, and ``handle.open()`` returns the source there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from taskray.data.readers.reader import Sample
from taskray.data.storage import ray_data
from taskray.data.storage.codec import KEY, ArraySpec, Columns, Layout, decode_rows
from taskray.data.storage.label_split import LabelSplit, split_of
from taskray.data.storage.parquet import (
    Piece,
    check_keys,
    columns_of,
    find_pieces,
    keys_of,
    read_manifest,
)
from taskray.data.streams.prefetch import Prefetcher
from taskray.errors import InputError
from taskray.job.config import DataConfig

BLOCK_BYTES = 32 << 20
"""Decoded size up to which rows are decoded together."""


@dataclass(frozen=True)
class DatasetInfo:
    """Properties of a dataset that are known before it is read."""

    name: str
    """Its name in the job."""
    path: str
    """Folder or file."""
    num_rows: int
    """Rows stored, unreadable ones included."""
    layout: Layout
    """Shape and type of each requested column (images ``[H, W, 3]``)."""
    skipped: int = 0
    """Rows left out by the conversion because they could not be read."""
    max_corrupt_rows: int = 0
    """Unreadable rows, those left out included, up to which it is no error."""
    split: LabelSplit | None = field(default=None, repr=False)
    """Which rows keep which labels; None: all keep all."""

    @property
    def decoded_bytes(self) -> int:
        """Size of all decoded rows."""
        return self.num_rows * sum(spec.nbytes for spec in self.layout.values())


class MemorySource:
    """A decoded dataset with random access; the arrays may be read-only."""

    def __init__(self, info: DatasetInfo, blocks: Sequence[Columns]) -> None:
        self.info = info
        self._blocks = [block for block in blocks if len(block[KEY])]
        self._starts = [0, *accumulate(len(block[KEY]) for block in self._blocks)]

    def row(self, index: int) -> Sample:
        """One sample, as views: its columns, ``key`` and ``error``."""
        number = bisect_right(self._starts, index) - 1
        offset = index - self._starts[number]
        return {column: values[offset] for column, values in self._blocks[number].items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Columns:
        """These samples, stacked; also ``key`` and ``error``."""
        rows = [self.row(int(index)) for index in indices]
        return {column: np.stack([row[column] for row in rows]) for column in rows[0]}

    def close(self) -> None:
        """Do nothing: there is no thread to end."""


class StreamSource:
    """A dataset that is decoded again in each pass, in order, by a background thread.

    Starting a pass takes seconds under Ray Data, so the next one is started after half of the
    rows of this one. A source is used by one stream.
    """

    def __init__(self, info: DatasetInfo, read: Callable[[], Iterator[Columns]]) -> None:
        self.info = info
        self._read = read
        self._next: Prefetcher[Columns] | None = None
        self._running: set[Prefetcher[Columns]] = set()

    def one_pass(self, more: bool = True) -> Iterator[Columns]:
        """The blocks of one pass, in order. ``more``: another pass follows, and is started early.
        Raises ``prefetch.Closed`` after ``close``."""
        current = self._next or self._start()
        self._next = None
        done = 0
        try:
            for block in current:
                done += len(block[KEY])
                if more and self._next is None and 2 * done >= self.info.num_rows:
                    self._next = self._start()
                yield block
        finally:
            current.close()
            self._running.discard(current)

    def close(self) -> None:
        """End the background threads. A later pass starts new ones."""
        self._next = None
        while self._running:
            self._running.pop().close()

    def _start(self) -> Prefetcher[Columns]:
        prefetcher = Prefetcher(self._read, depth=2, name=f"read {self.info.name}")
        self._running.add(prefetcher)
        return prefetcher


Source = MemorySource | StreamSource


@dataclass(frozen=True)
class MemoryHandle:
    """A dataset decoded in this process."""

    info: DatasetInfo
    blocks: list[Columns] = field(repr=False)

    def open(self) -> MemorySource:
        return MemorySource(self.info, self.blocks)


@dataclass(frozen=True)
class RayHandle:
    """A dataset decoded into Ray's object store; it lives as long as the process that made it."""

    info: DatasetInfo
    blocks: list[ray_data.Block] = field(repr=False)

    def open(self) -> MemorySource:
        return MemorySource(self.info, ray_data.fetch(self.blocks))


@dataclass(frozen=True)
class StreamHandle:
    """A dataset that each process decodes for itself in every pass."""

    info: DatasetInfo
    pieces: list[Piece] = field(repr=False)
    use_ray: bool

    def open(self) -> StreamSource:
        return StreamSource(self.info, partial(_read, self.info, self.pieces, self.use_ray))


Handle = MemoryHandle | RayHandle | StreamHandle


def open_source(
    config: DataConfig,
    folder: Path,
    columns: Sequence[str],
    use_ray: bool,
    *,
    name: str | None = None,
) -> Handle:
    """Open a prepared dataset (``store.prepare``) in memory or as a stream.

    ``config.materialize`` decides; ``auto`` decodes the dataset into memory if its decoded size,
    computed from one row, is at most ``materialize_bytes``. Only ``columns`` are read, and only
    the first ``config.limit`` rows. ``name`` is the dataset's name in the job, for errors.

    Raises InputError if a column is missing, a file is damaged, or no row can be read. A single
    unreadable row is found when it is used.
    """
    info, pieces = _describe(config, folder, columns, name)
    small = info.decoded_bytes <= config.materialize_bytes
    if config.materialize == "never" or (config.materialize == "auto" and not small):
        return StreamHandle(info, pieces, use_ray)
    return _materialize(info, pieces) if use_ray else _load(info, pieces)


def load_in_process(
    folder: Path, config: DataConfig, columns: Sequence[str], *, name: str | None = None
) -> MemoryHandle:
    """Decode a stored dataset in this process, without Ray; errors as in :func:`open_source`."""
    return _load(*_describe(config, folder, columns, name))


def _materialize(info: DatasetInfo, pieces: list[Piece]) -> RayHandle:
    try:
        blocks = ray_data.materialize_arrays(
            [vars(piece) for piece in pieces], partial(_decode_json, info)
        )
    except Exception as error:
        raise ray_data.application_error(error) from None
    return RayHandle(info, blocks)


def _load(info: DatasetInfo, pieces: list[Piece]) -> MemoryHandle:
    return MemoryHandle(info, list(_read(info, pieces, use_ray=False)))


def _describe(
    config: DataConfig, folder: Path, columns: Sequence[str], name: str | None
) -> tuple[DatasetInfo, list[Piece]]:
    name = name or config.reader.name
    columns = list(dict.fromkeys(columns))
    present = columns_of(folder)
    for column in columns:
        if column not in present:
            raise InputError(
                f"dataset {name!r}", f"no column {column!r}; it has {', '.join(present)}"
            )
    pieces = find_pieces(folder, columns, config.limit)
    check_keys(folder, config.limit)
    errors = read_manifest(folder).get("errors", [])
    split = stored_split(config, folder, name)
    info = DatasetInfo(
        name=name,
        path=str(folder),
        num_rows=sum(piece.rows for piece in pieces),
        layout=_layout(pieces, columns, config.max_corrupt_rows),
        skipped=len(errors),
        max_corrupt_rows=config.max_corrupt_rows,
        split=split,
    )
    return info, pieces


def stored_split(config: DataConfig, folder: Path, name: str) -> LabelSplit | None:
    """The split of a stored dataset's labels; see :func:`split_of`."""
    keys = islice(keys_of(folder), config.limit) if config.labels else ()
    return split_of(config, list(keys), columns_of(folder), name)


def _layout(pieces: Sequence[Piece], columns: Sequence[str], max_corrupt_rows: int) -> Layout:
    """Shape and type of the columns, from the first row that can be read."""
    tried, first = 0, ""
    for piece in pieces:
        for table in piece.read(columns, rows_each=1):
            try:
                decoded = decode_rows(table, columns)
            except ValueError as error:
                first = first or str(error)
                tried += 1
                if tried > max_corrupt_rows:
                    raise InputError(piece.file, f"no readable row before: {first}") from None
                continue
            return {c: ArraySpec.of(decoded[c][0]) for c in columns}
    raise InputError(pieces[0].file, f"no readable row; the first error: {first}")


def _read(info: DatasetInfo, pieces: Sequence[Piece], use_ray: bool) -> Iterator[Columns]:
    """One pass over the dataset."""
    if not use_ray:
        for piece in pieces:
            yield from _decode(info, piece)
        return
    decode = partial(_decode_json, info)
    try:
        yield from ray_data.stream_arrays([vars(piece) for piece in pieces], decode)
    except Exception as error:
        raise ray_data.application_error(error) from None


def _decode(info: DatasetInfo, piece: Piece) -> Iterator[Columns]:
    row_bytes = max(1, sum(spec.nbytes for spec in info.layout.values()))
    rows_each = min(64, max(1, BLOCK_BYTES // row_bytes))
    for table in piece.read(list(info.layout), rows_each):
        rows = decode_rows(table, info.layout, info.layout, where=piece.file)
        if info.split is not None:
            info.split.hide(rows)
        yield rows


def _decode_json(info: DatasetInfo, piece: dict[str, Any]) -> Iterator[Columns]:
    yield from _decode(info, Piece(**piece))
