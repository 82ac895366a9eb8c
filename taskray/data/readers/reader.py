"""A reader: one dataset, as its authors publish it, as rows in the terms of ``schema``.

A custom reader is a subclass of :class:`Reader`; a job names it by import path.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
"""One entry of ``index``: JSON-able values, with the sample's name under ``key``."""
Sample = dict[str, np.ndarray]
"""A decoded sample: ``image`` uint8 ``[H, W, 3]``; every other column with the shape, type and
unit of ``schema.QUANTITIES`` (channels first)."""


class Reader(ABC):
    """One dataset. A job sets its ``__init__`` arguments under ``reader``.

    A reader is pickled to the workers that convert it: keep it small, open files in ``load``.
    """

    columns: tuple[str, ...]
    """Columns of every sample."""
    unlabelled: bool = False
    """Whether some samples have no labels; their label columns then contain invalid values."""
    stored: Path | None = None
    """The dataset in taskray's Parquet layout, if it needs no conversion."""

    @abstractmethod
    def index(self) -> list[Row]:
        """One row for each sample, each with a unique ``key``, in an order that never changes;
        fast, without loading. Raises InputError if the files are not those of this dataset.

        Rows of one video have keys ``<video>/<name><number>`` with the number of their first
        frame (:func:`place_of`): metrics of trajectories join no others.
        """

    @abstractmethod
    def load(self, row: Row) -> Sample:
        """The sample of a row; raises any exception if it cannot be read."""

    def load_many(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Sample | Exception]]:
        """Every row with its sample, or with the error of loading it.

        Override it if several samples share work (one scene, one archive).
        """
        for row in rows:
            try:
                yield row, self.load(row)
            except Exception as error:  # unreadable rows are counted, not fatal
                yield row, error

    def group(self, rows: Sequence[Row]) -> Iterable[Sequence[Row]]:
        """Divide the index into pieces of work, in order; ``load_many`` is called with each."""
        return [rows[start : start + 16] for start in range(0, len(rows), 16)]

    def fingerprint(self) -> Any:
        """JSON-able: what a cached conversion depends on besides the arguments (the files read,
        the version of a generator). A custom reader may leave out what :func:`fingerprint_own`
        contains."""
        return None


def place_of(key: str) -> tuple[str, int]:
    """The sequence of a row and the number of its first frame, from its key: ``seq-01`` and 3 of
    ``seq-01/frame-000003``. A key of another form is a sequence of its own."""
    match = re.fullmatch(r"(.+)/[^/]*?(\d+)", key)
    return (match[1], int(match[2])) if match else (key, 0)


READERS_VERSION = 3
"""Part of :func:`fingerprint_files`: raise it when readers make other samples of the same files,
and their datasets are converted again."""


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """A hash of the files' names below ``root``, sizes and times of change. A missing file is
    part of the hash, so that the dataset is converted again when the file appears."""
    digest = hashlib.sha256(f"{READERS_VERSION} {root.resolve()}".encode())
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # gone, not readable, or a broken link
            state = "missing"
        digest.update(f"{file.relative_to(root)} {state}\n".encode())
    return digest.hexdigest()


def fingerprint_own(reader: Reader, settings: Mapping[str, Any]) -> list[str]:
    """What a conversion by a custom reader depends on besides its ``fingerprint``: the source of
    the module that the job names and of those that contain its classes, and every file and folder
    named in ``settings``; except the current folder and its parents, where runs are written."""
    classes = [c for c in type(reader).__mro__ if c not in Reader.__mro__]
    names = {settings["name"].partition(":")[0], *(c.__module__ for c in classes)}
    sources = {str(getattr(sys.modules.get(name), "__file__", None)) for name in names}
    found = [
        hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for file in sorted(sources)
        if os.path.isfile(file)
    ]
    for text in sorted(set(_texts(settings))):
        path = Path(os.path.expanduser(text))
        if os.path.exists(path) and not Path.cwd().is_relative_to(path.resolve()):
            path = path.resolve()
            inside = sorted(path.rglob("*")) if path.is_dir() else []
            found.append(fingerprint_files(path.parent, [path, *inside]))
    return found


def first_repeated(keys: Iterable[str]) -> str | None:
    """The first key that occurs twice; None if all are unique."""
    seen = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every string in nested settings."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
