"""From a reader to Parquet, once: the cache of converted datasets.

A conversion is a folder of ``part-*.parquet`` (see ``codec`` for the columns) and, written last,
``_taskray.json`` with the settings, the number of rows, the columns, and the rows left out
because they could not be read. The folder is built under another name and renamed, so a
dataset is either complete or absent; a lock keeps two processes from building the same one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from taskray.data.readers.reader import Reader, Row, fingerprint_own, first_repeated
from taskray.data.storage import ray_data
from taskray.data.storage.codec import ERROR, KEY, encode
from taskray.data.storage.parquet import MANIFEST, read_manifest
from taskray.errors import InputError, one_line
from taskray.job import plugins
from taskray.job.config import DataConfig, Plugin

STORAGE_VERSION = 1
"""Part of the hash: raise it when the layout changes, and everything is converted anew."""
ROWS_PER_GROUP = 64
BYTES_PER_GROUP = 32 << 20
GROUPS_PER_FILE = 8

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


def cache_dir() -> Path:
    """Where converted datasets are kept: ``$XDG_CACHE_HOME/taskray`` or ``~/.cache/taskray``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "taskray"


def build_reader(config: DataConfig, name: str) -> Reader:
    """The reader of the dataset ``name``; InputError names the key that is wrong."""
    where = f"data.{name}.reader"
    reader = cast(
        Reader, plugins.build("reader", config.reader.name, config.reader.arguments, where)
    )
    columns = getattr(reader, "columns", None)
    if not isinstance(columns, (tuple, list)) or not all(isinstance(c, str) for c in columns):
        raise InputError(
            f"{where}: {config.reader.name!r} has no columns, "
            f"expected a tuple of names (got {columns!r})"
        )
    return reader


def prepare(
    config: DataConfig, *, name: str, use_ray: bool, progress: Progress | None = None
) -> Path:
    """The dataset as Parquet: its cached conversion, made now if there is none.

    Returns a folder (or file) that ``source.open_source`` reads. Raises InputError where the
    settings are wrong, where there are no rows, where more than ``max_corrupt_rows`` of them
    cannot be read, or where the cache cannot be written to.
    """
    reader = build_reader(config, name)
    folder = folder_of(config, reader)
    if folder == reader.stored:
        return folder
    if not is_complete(folder):
        _make(folder.parent)
        told = f"dataset {name}: another process is building it, waiting for that"
        with lock(folder.with_name(f".{folder.name}.lock"), told):
            if not is_complete(folder):  # another process may have built it meanwhile
                for left in folder.parent.glob(f".{folder.name}.*.tmp"):
                    shutil.rmtree(left)  # whoever wrote to it has lost the lock: it was killed
                convert(config, folder, name=name, use_ray=use_ray, progress=progress)
    _check_errors(name, read_manifest(folder)["errors"], config.max_corrupt_rows)
    return folder


def folder_of(config: DataConfig, reader: Reader) -> Path:
    """Where the dataset lies, or will once it is converted."""
    if reader.stored is not None:
        return reader.stored
    return cache_dir() / f"{_slug(config.reader.name)}-{content_hash(config, reader)[:20]}"


def convert(
    config: DataConfig,
    folder: Path,
    *,
    name: str,
    use_ray: bool,
    progress: Progress | None = None,
) -> None:
    """Write the dataset as Parquet to ``folder``, replacing the one that is there when all is
    done. Raises InputError as ``prepare`` and ``check_replaceable`` do; then the folder is left
    as it was.
    """
    folder = folder.resolve()  # the folder behind a symlink is replaced, not the symlink
    check_replaceable(folder)
    reader = build_reader(config, name)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _make(temporary)
    try:
        rows = index_of(reader, config, name)
        writer = _Writer(temporary, reader.columns)
        done, errors = 0, []
        for table in _encoded(config, name, reader, rows, use_ray):
            failed = [pair for pair in zip(*_pairs(table), strict=True) if pair[1]]
            errors += [list(pair) for pair in failed]
            _check_errors(name, errors, config.max_corrupt_rows)
            writer.add(table.filter(pa.compute.equal(table[ERROR], "")).drop([ERROR]))
            done += table.num_rows
            if progress:
                progress(done, len(rows))
        num_rows = writer.finish()
        if num_rows == 0:
            reason = f"; {errors[0][0]}: {errors[0][1]}" if errors else ""
            raise InputError(f"dataset {name!r}: no row could be read{reason}")
        manifest = {
            "settings": settings_of(config.reader),
            "num_rows": num_rows,
            "columns": list(reader.columns),
            "unlabelled": reader.unlabelled,
            "errors": errors,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Refuse (InputError) to write a dataset to what is neither new nor an empty folder, and
    holds anything but one that ``convert`` has written."""
    if not folder.exists():
        return
    if folder.resolve() == Path.cwd():
        raise InputError(f"{folder}: is where you are, and will not be replaced")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder to write to")
    found = sorted(folder.iterdir())
    others = [f.name for f in found if f.name != MANIFEST and not f.match("part-*.parquet")]
    if others:
        raise InputError(
            f"{folder}: will not be replaced: {others[0]!r} is no part of a dataset of taskray"
        )
    if found and not is_complete(folder):
        raise InputError(f"{folder}: is not a dataset of taskray, and will not be replaced")


def is_complete(folder: Path) -> bool:
    """Whether a conversion in ``folder`` was finished."""
    return (folder / MANIFEST).is_file()


def settings_of(reader: Plugin) -> dict[str, Any]:
    """The reader's name and all its arguments, defaults included."""
    target = plugins.resolve("reader", reader.name, "reader")
    parameters = plugins.arguments_of(target)
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    return {"name": reader.name, **defaults, **reader.arguments}


def content_hash(config: DataConfig, reader: Reader) -> str:
    """A hash of everything that the conversion depends on."""
    settings = settings_of(config.reader)
    facts = [STORAGE_VERSION, settings, config.limit, reader.fingerprint()]
    if config.reader.name not in plugins.BUILTIN["reader"]:
        facts.append(fingerprint_own(reader, settings))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def index_of(reader: Reader, config: DataConfig, name: str) -> list[Row]:
    """The rows of a dataset; InputError where there are none, or where they have no unique key."""
    rows = list(reader.index())[: config.limit]
    where = f"dataset {name!r}: the reader {config.reader.name!r}"
    if not rows:
        raise InputError(f"{where} found no samples")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
            raise InputError(f"{where}: row {number} of its index has no text under {KEY!r}")
    twice = first_repeated(row[KEY] for row in rows)
    if twice is not None:
        raise InputError(f"dataset {name!r}: two samples have the key {twice!r}")
    return rows


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


def _pairs(table: pa.Table) -> tuple[list[str], list[str]]:
    return table[KEY].to_pylist(), table[ERROR].to_pylist()


def _check_errors(name: str, errors: Sequence[Sequence[str]], allowed: int) -> None:
    if len(errors) > allowed:
        where, reason = errors[0]
        raise InputError(
            f"dataset {name!r}: more than {allowed} rows cannot be read (max_corrupt_rows); "
            f"the first: {where}: {reason}"
        )


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


@contextmanager
def lock(file: Path, waiting: str = "") -> Iterator[None]:
    """Held by one process at a time; let go by the system when that process ends. Who has to
    wait for it prints ``waiting``, if there is any. InputError where it cannot be written."""
    try:
        handle = file.open("w")
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot hold a dataset: {error.strerror}") from None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
