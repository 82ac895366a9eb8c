"""From a reader to Parquet: every row is read, encoded and written, in order.

A conversion is a folder of ``part-*.parquet`` (see ``codec`` for the columns) and, written last,
``_taskray.json`` with the settings, the number of rows, the columns, and the rows that were left
out because they could not be read. The folder is written atomically: a dataset is complete or
absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from taskray.data.readers.reader import Reader, Row, first_repeated
from taskray.data.storage import ray_data
from taskray.data.storage.codec import ERROR, KEY, encode
from taskray.data.storage.parquet import MANIFEST
from taskray.errors import InputError, naming_system_errors, one_line, system_error
from taskray.files import atomic_write, make_folder, write_json
from taskray.job import plugins
from taskray.job.config import DataConfig, Plugin

ROWS_PER_GROUP = 64
BYTES_PER_GROUP = 32 << 20
GROUPS_PER_FILE = 8

Progress = Callable[[int, int], None]
"""Called with the number of rows done and the number of all rows."""


def build_reader(config: DataConfig, name: str) -> Reader:
    """The reader of the dataset ``name``; InputError names the key that is wrong."""
    where = f"data.{name}.reader"
    return cast(Reader, plugins.build("reader", config.reader.name, config.reader.arguments, where))


def settings_of(reader: Plugin) -> dict[str, Any]:
    """The reader's name and all its arguments, defaults included."""
    target = plugins.resolve("reader", reader.name, "reader")
    parameters = plugins.arguments_of(target)
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    return {"name": reader.name, **defaults, **reader.arguments}


def convert(
    config: DataConfig,
    folder: Path,
    *,
    name: str,
    use_ray: bool,
    progress: Progress | None = None,
) -> None:
    """Write the dataset as Parquet to ``folder``, replacing an older conversion at the end.

    Raises InputError if the settings are wrong, if there are no rows, if more than
    ``max_corrupt_rows`` of them cannot be read, or as ``check_replaceable`` does; then the folder
    is left as it was.
    """
    folder = folder.resolve()  # replace the folder that a symlink leads to, not the symlink
    check_replaceable(folder)
    reader = build_reader(config, name)
    purpose = f"the folder of dataset {name!r}"
    make_folder(folder.parent, purpose)

    def fill(temporary: Path) -> None:
        make_folder(temporary, purpose)
        with naming_system_errors(f"dataset {name!r}: {folder}"):
            manifest = _write_rows(config, reader, temporary, name, use_ray, progress)
            write_json(temporary / MANIFEST, manifest)

    atomic_write(folder, fill)


def _write_rows(
    config: DataConfig,
    reader: Reader,
    folder: Path,
    name: str,
    use_ray: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write all Parquet files of a dataset; returns the content of its manifest."""
    rows = index_of(reader, config, name)
    writer = _Writer(folder, reader.columns)
    done = 0
    errors: list[list[str]] = []
    for table in _encoded(config, name, reader, rows, use_ray):
        pairs = zip(table[KEY].to_pylist(), table[ERROR].to_pylist(), strict=True)
        errors += [[key, error] for key, error in pairs if error]
        check_errors(name, errors, config.max_corrupt_rows)
        writer.add(table.filter(pa.compute.equal(table[ERROR], "")).drop([ERROR]))
        done += table.num_rows
        if progress:
            progress(done, len(rows))
    num_rows = writer.finish()
    if num_rows == 0:
        reason = f"; {errors[0][0]}: {errors[0][1]}" if errors else ""
        raise InputError(f"dataset {name!r}", f"no row could be read{reason}")
    return {
        "settings": settings_of(config.reader),
        "num_rows": num_rows,
        "columns": list(reader.columns),
        "unlabelled": reader.unlabelled,
        "errors": errors,
    }


def check_replaceable(folder: Path) -> None:
    """Refuse (InputError) to replace anything but an empty folder or an older conversion."""
    if not folder.exists():
        return
    if folder.resolve() == Path.cwd():
        raise InputError(str(folder), "is the current folder, which is never replaced")
    if not folder.is_dir():
        raise InputError(str(folder), "is a file, expected a folder")
    found = sorted(folder.iterdir())
    others = [f.name for f in found if f.name != MANIFEST and not f.match("part-*.parquet")]
    if others:
        raise InputError(
            str(folder), f"is not replaced, because {others[0]!r} is not part of a taskray dataset"
        )
    if found and not is_complete(folder):
        raise InputError(str(folder), "is not replaced, because it is not a taskray dataset")


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` contains a finished conversion."""
    with naming_system_errors(str(folder)):
        return (folder / MANIFEST).is_file()


def index_of(reader: Reader, config: DataConfig, name: str) -> list[Row]:
    """The rows of a dataset; InputError if there are none, or if they have no unique key."""
    try:
        rows = list(reader.index())[: config.limit]
    except InputError as error:
        raise InputError(f"data.{name}.reader", str(error)) from None
    except OSError as error:
        raise system_error(error, f"data.{name}.reader") or error from None
    where = f"dataset {name!r}"
    if not rows:
        raise InputError(where, f"the reader {config.reader.name!r} found no samples")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
            raise InputError(
                where,
                f"row {number} of the index of reader {config.reader.name!r}: "
                f"expected text under {KEY!r}",
            )
    repeated = first_repeated(row[KEY] for row in rows)
    if repeated is not None:
        raise InputError(where, f"duplicate key {repeated!r} in two samples")
    return rows


def check_errors(name: str, errors: Sequence[Sequence[str]], allowed: int) -> None:
    """Refuse (InputError) more than ``allowed`` rows that cannot be read: pairs of key, error."""
    if len(errors) > allowed:
        key, reason = errors[0]
        raise InputError(
            f"dataset {name!r}",
            f"more than {allowed} rows cannot be read (max_corrupt_rows); "
            f"the first is {key}: {reason}",
        )


def _encoded(
    config: DataConfig, name: str, reader: Reader, rows: list[Row], use_ray: bool
) -> Iterator[pa.Table]:
    """All rows in order, as tables of bytes with ``key`` and ``error``."""
    groups = [list(group) for group in reader.group(rows)]
    if not use_ray:
        for group in groups:
            yield _encode_rows(reader, group)
        return
    settings = config.reader.model_dump(mode="json")
    try:
        yield from ray_data.stream_tables(groups, partial(_encode_in_worker, settings, name))
    except Exception as error:
        raise ray_data.application_error(error) from None


def _encode_in_worker(
    settings: dict[str, Any], name: str, rows: Sequence[Row]
) -> Iterator[pa.Table]:
    yield _encode_rows(_reader_in_worker(json.dumps(settings), name), rows)


@lru_cache(maxsize=4)
def _reader_in_worker(settings: str, name: str) -> Reader:
    return build_reader(DataConfig(reader=Plugin(**json.loads(settings))), name)


def _encode_rows(reader: Reader, rows: Sequence[Row]) -> pa.Table:
    encoded: list[dict[str, Any]] = []
    for row, sample in reader.load_many(rows):
        reason, values = "", dict[str, bytes]()
        try:
            if isinstance(sample, Exception):
                raise sample
            values = encode(sample, reader.columns)
        except Exception as error:
            reason = one_line(error)
        encoded.append({KEY: row["key"], ERROR: reason, **values})
    return pa.Table.from_pylist(encoded, _schema(reader.columns, [ERROR]))


def _schema(columns: Sequence[str], more: Sequence[str] = ()) -> pa.Schema:
    texts = [(name, pa.string()) for name in (KEY, *more)]
    return pa.schema([*texts, *((column, pa.binary()) for column in columns)])


class _Writer:
    """Collects rows into row groups, and row groups into files."""

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._folder, self._schema = folder, _schema(columns)
        self._waiting: list[pa.Table] = []
        self._file: pq.ParquetWriter | None = None
        self._files = self._groups = self._rows = 0

    def add(self, table: pa.Table) -> None:
        for start in range(0, table.num_rows, ROWS_PER_GROUP):
            self._waiting.append(table.slice(start, ROWS_PER_GROUP))
            rows = sum(waiting.num_rows for waiting in self._waiting)
            size = sum(waiting.nbytes for waiting in self._waiting)
            if rows >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
                self._flush()

    def finish(self) -> int:
        """Close the last file; returns the number of rows written."""
        self._flush()
        if self._file:
            self._file.close()
        return self._rows

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else self._schema.empty_table()
        self._waiting = []
        if table.num_rows == 0:
            return
        if self._file is None:
            file = self._folder / f"part-{self._files:05d}.parquet"
            self._file = pq.ParquetWriter(file, self._schema, compression="zstd")
            self._files += 1
        self._file.write_table(table.cast(self._schema), row_group_size=table.num_rows)
        self._rows += table.num_rows
        self._groups += 1
        if self._groups % GROUPS_PER_FILE == 0:
            self._file.close()
            self._file = None
