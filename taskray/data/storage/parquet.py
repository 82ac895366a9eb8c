"""Parquet as taskray stores it: one binary column per quantity (see ``codec``) and a ``key``.

Datasets are read piece by piece, a row group each: workers share the reading, and a corrupt
file names itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from taskray.data.readers.reader import Reader, Row, Sample, first_repeated
from taskray.data.storage.codec import KEY, decode_row
from taskray.errors import InputError, naming_system_errors, one_line
from taskray.files import read_json

MANIFEST = "_taskray.json"
"""The file beside the Parquet files of a conversion: its settings and errors."""


class ParquetFolder(Reader):
    """A dataset already stored as Parquet, by ``taskray data convert`` or in the same layout.

    It is read in place, its files in the order of their names. Each has a string column ``key``,
    unique in the dataset, and binary columns named as in ``schema``: ``image`` as PNG or JPEG,
    all others as the bytes of a ``.npy`` file.

    Args:
        path: a folder of ``*.parquet`` files, or one such file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self.stored = self.path
        self.columns = columns_of(self.path)
        self.unlabelled = bool(read_manifest(self.path).get("unlabelled"))

    def index(self) -> list[Row]:
        return [
            {"key": str(key), "file": str(file), "row": row}
            for file in parquet_files(self.path)
            for row, key in enumerate(_read(file, [KEY])[KEY].to_pylist())
        ]

    def load(self, row: Row) -> Sample:
        ((_, sample),) = self.load_many([row])
        if isinstance(sample, Exception):
            raise sample
        return sample

    def load_many(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Sample | Exception]]:
        by_file = defaultdict(list)
        for row in rows:
            by_file[row["file"]].append(row)
        for file, its_rows in by_file.items():
            table = _read(Path(file), list(self.columns))
            for row in its_rows:
                try:
                    yield row, decode_row(table.slice(row["row"], 1).to_pylist()[0])
                except Exception as error:
                    yield row, error


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of ``_taskray.json``; empty without the file (Parquet from another tool)."""
    file = path / MANIFEST
    with naming_system_errors(str(path)):
        if not file.is_file():
            return {}
    content = read_json(file)
    if not isinstance(content.get("errors", []), list):
        raise InputError(str(file), "not a manifest as 'taskray data convert' writes it")
    return content


@dataclass(frozen=True)
class Piece:
    """The first ``rows`` rows of one row group of a file."""

    file: str
    row_group: int
    rows: int

    def read(self, columns: Sequence[str], rows_each: int = 64) -> Iterator[pa.Table]:
        """Tables of ``rows_each`` rows with the key and the columns; InputError names a damaged
        file."""
        opened, left = _open(Path(self.file)), self.rows
        try:
            for batch in opened.iter_batches(
                rows_each, row_groups=[self.row_group], columns=[KEY, *columns]
            ):
                yield pa.Table.from_batches([batch.slice(0, left)])
                left -= batch.num_rows
                if left <= 0:  # do not read the rest of the row group
                    return
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InputError(self.file, f"damaged Parquet: {one_line(error)}") from None


def find_pieces(path: Path, columns: Iterable[str], limit: int | None = None) -> list[Piece]:
    """The pieces of a stored dataset in order, up to the first ``limit`` rows.

    Raises InputError, naming the file, if a file is missing, damaged or lacks one of the columns,
    and if the dataset has no rows.
    """
    pieces = []
    left = limit
    for file in parquet_files(path):
        opened = _open(file)
        present = opened.schema_arrow.names
        for column in (KEY, *columns):
            if column not in present:
                raise InputError(str(file), f"no column {column!r}; it has {', '.join(present)}")
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if left is not None:
                rows = min(rows, left)
                left -= rows
            if rows:
                pieces.append(Piece(str(file), group, rows))
    if not pieces:
        raise InputError(str(path), "no rows")
    return pieces


def check_keys(path: Path, limit: int | None = None) -> None:
    """Refuse (InputError) a dataset with a duplicate key in its first ``limit`` rows. Conversions
    of taskray were checked when they were written."""
    if read_manifest(path):
        return
    repeated = first_repeated(islice(keys_of(path), limit))
    if repeated is not None:
        raise InputError(str(path), f"duplicate key {repeated!r} in two rows")


def keys_of(path: Path) -> Iterator[str]:
    """The keys of a stored dataset, in order."""
    for file in parquet_files(path):
        yield from map(str, _read(file, [KEY])[KEY].to_pylist())


def columns_of(path: Path) -> tuple[str, ...]:
    """The columns of a stored dataset besides its key, from its first file."""
    names = _open(parquet_files(path)[0]).schema_arrow.names
    return tuple(column for column in names if column != KEY)


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files of a dataset, by name; InputError if there is none."""
    with naming_system_errors(str(path)):
        if path.is_file():
            return [path]
        if not path.exists():
            raise InputError(str(path), "no such file or folder")
        files = sorted(file for file in path.iterdir() if file.match("*.parquet"))
    if not files:
        raise InputError(str(path), "no *.parquet files in this folder")
    return files


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(str(file), f"not a readable Parquet file: {one_line(error)}") from None


def _read(file: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return _open(file).read(list(columns))
    except (pa.ArrowException, OSError) as error:
        raise InputError(str(file), f"damaged Parquet: {one_line(error)}") from None
