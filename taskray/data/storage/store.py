"""The cache of converted datasets: the folder of each, its name, and the lock to build it.

The name contains a hash of everything that the conversion depends on, so other settings are
another folder. A lock keeps two processes from building the same dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from taskray.data.readers.reader import Reader, fingerprint_own
from taskray.data.storage.convert import (
    Progress,
    build_reader,
    check_errors,
    convert,
    is_complete,
    settings_of,
)
from taskray.data.storage.parquet import read_manifest
from taskray.errors import naming_system_errors
from taskray.files import lock_folder, remove_temporaries
from taskray.job import plugins
from taskray.job.config import DataConfig

STORAGE_VERSION = 1
"""Part of the hash: raise it when the layout changes, and every dataset is converted again."""


def cache_dir() -> Path:
    """The folder of converted datasets: ``$XDG_CACHE_HOME/taskray`` or ``~/.cache/taskray``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "taskray"


def prepare(
    config: DataConfig, *, name: str, use_ray: bool, progress: Progress | None = None
) -> Path:
    """The dataset as Parquet: its conversion in the cache, made now if it is not there.

    Returns a folder (or file) that ``source.open_source`` reads. Raises InputError if the
    settings are wrong, if there are no rows, if more than ``max_corrupt_rows`` of them cannot be
    read, or if the cache cannot be written.
    """
    reader = build_reader(config, name)
    folder = folder_of(config, reader, name)
    if folder == reader.stored:
        return folder
    if not is_complete(folder):
        purpose = f"the cache of dataset {name!r}"
        # The lock is beside the folder, not in it: a conversion replaces the whole folder.
        with lock_folder(folder.parent, purpose, wait=True, name=f".{folder.name}.lock"):
            if not is_complete(folder):  # another process may have built it during the wait
                remove_temporaries(folder)
                convert(config, folder, name=name, use_ray=use_ray, progress=progress)
    check_errors(name, read_manifest(folder)["errors"], config.max_corrupt_rows)
    return folder


def folder_of(config: DataConfig, reader: Reader, name: str) -> Path:
    """The folder of the dataset ``name`` in the cache, whether it is converted yet or not."""
    if reader.stored is not None:
        return reader.stored
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.reader.name)
    with naming_system_errors(f"data.{name}.reader"):
        return cache_dir() / f"{readable}-{content_hash(config, reader)[:20]}"


def content_hash(config: DataConfig, reader: Reader) -> str:
    """A hash of everything that the conversion depends on."""
    settings = settings_of(config.reader)
    facts = [STORAGE_VERSION, settings, config.limit, reader.fingerprint()]
    if config.reader.name not in plugins.BUILTIN["reader"]:
        facts.append(fingerprint_own(reader, settings))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
