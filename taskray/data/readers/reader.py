"""A reader: one dataset, as its authors publish it, turned into rows in the terms of ``schema``.

A reader of your own subclasses :class:`Reader`; a job names it by import path.
"""

from __future__ import annotations

import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
"""What ``index`` knows of a sample: JSON-able values, with its name under ``key``."""
Sample = dict[str, np.ndarray]
"""A decoded sample: ``image`` uint8 ``[H, W, 3]``; every other column shaped, typed and in the
units of ``schema.QUANTITIES`` (channels first)."""


class Reader(ABC):
    """One dataset. Its ``__init__`` arguments are what a job may set under ``reader``.

    A reader is pickled to the workers that convert it: keep it small, open files in ``load``.
    """

    columns: tuple[str, ...]
    """Columns that every sample has."""
    unlabelled: bool = False
    """Whether some samples have lost their labels, whose columns then say that there are none."""
    stored: Path | None = None
    """Where the dataset already lies in taskray's own Parquet layout: no conversion needed."""

    @abstractmethod
    def index(self) -> list[Row]:
        """One row for each sample, cheap to make, in an order that never changes; each has a
        unique ``key``. Raises InputError where the files are not those of this dataset."""

    @abstractmethod
    def load(self, row: Row) -> Sample:
        """The sample behind a row; raises (anything) where it cannot be read."""

    def load_many(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Sample | Exception]]:
        """Every row with its sample, or with the error that kept it from loading.

        Override it where several samples share work (one scene, one archive).
        """
        for row in rows:
            try:
                yield row, self.load(row)
            except Exception as error:  # unreadable rows are counted, not fatal
                yield row, error

    def group(self, rows: Sequence[Row]) -> Iterable[Sequence[Row]]:
        """Cut the index into pieces of work that ``load_many`` gets whole, in order."""
        return [rows[start : start + 16] for start in range(0, len(rows), 16)]

    def fingerprint(self) -> Any:
        """JSON-able: what a cached conversion depends on besides the arguments (the files read,
        the version of a generator). A reader of your own need not mention what
        :func:`fingerprint_own` sees."""
        return None


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """A hash of the files' names below ``root``, sizes and times of change; a file that is
    missing counts as such, so that a conversion is redone when it turns up."""
    digest = hashlib.sha256(str(root.resolve()).encode())
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # gone, not for us to read, or a link that leads nowhere
            state = "missing"
        digest.update(f"{file.relative_to(root)} {state}\n".encode())
    return digest.hexdigest()


def fingerprint_own(reader: Reader, settings: Mapping[str, Any]) -> list[str]:
    """What a conversion by a reader that is not built in depends on, besides its own
    ``fingerprint``: the source of the modules that it is named by and that its classes are in,
    and every file and folder that ``settings`` name; not the current folder or one that it lies
    in, where runs are written."""
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
    """The first key that stands there for the second time; None where each is unique."""
    seen = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested settings."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
