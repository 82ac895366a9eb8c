"""What a run needs of a machine: its datasets, and estimates of memory and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from taskray.data.readers.reader import Reader
from taskray.data.storage.codec import KEY, ArraySpec, encode
from taskray.data.storage.convert import build_reader, index_of, is_complete
from taskray.data.storage.label_split import split_of
from taskray.data.storage.parquet import columns_of, parquet_files
from taskray.data.storage.source import open_source
from taskray.data.storage.store import cache_dir, folder_of, prepare
from taskray.errors import InputError, one_line
from taskray.job.config import DataConfig, Job
from taskray.loop.wiring import wire
from taskray.record.formatting import size
from taskray.tasks.task import Task

OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "sgd": 1}
"""Numbers that the optimizer stores for each weight."""
PROCESS_BYTES = 500_000_000
"""Memory of a process with torch and Ray, before it holds anything of the run."""
OBJECT_STORE_SHARE = 0.3
"""Share of the memory that Ray reserves for its object store, unless /dev/shm is smaller."""


@dataclass(frozen=True)
class Finding:
    """One dataset of a job, before the run.

    ``ready``: already converted. ``decoded_bytes``: of the columns that the run reads, in memory.
    ``materialized``: the run keeps it in memory instead of streaming it.
    """

    name: str
    where: Path
    ready: bool
    rows: int
    stored_bytes: int
    decoded_bytes: int
    materialized: bool


@dataclass(frozen=True)
class Need:
    """A resource: bytes needed, bytes available (None: unknown). ``fatal``: a run with too little
    of it fails."""

    what: str
    needed: int
    available: int | None
    fatal: bool
    advice: str


def inspect(job: Job, name: str, columns: Sequence[str]) -> Finding:
    """Inspect a dataset without converting it. Raises InputError where it has no rows or cannot be
    read."""
    config = job.data[name]
    reader = build_reader(config, name)
    folder = folder_of(config, reader, name)
    ready = reader.stored is not None or is_complete(folder)
    if ready:
        # converts nothing here: only checks the number of unreadable rows
        prepare(config, name=name, use_ray=False)
        there = [c for c in columns_of(folder) if c in columns]
        streamed = config.model_copy(update={"materialize": "never"})
        info = open_source(streamed, folder, there, use_ray=False, name=name).info
        rows, decoded = info.num_rows, info.decoded_bytes
        stored = sum(file.stat().st_size for file in parquet_files(folder))
    else:
        rows, decoded, stored = _estimate(config, reader, name, columns)
    small = decoded <= config.materialize_bytes
    materialized = config.materialize == "always" or (config.materialize == "auto" and small)
    return Finding(name, folder, ready, rows, stored, decoded, materialized)


def _estimate(
    config: DataConfig, reader: Reader, name: str, columns: Sequence[str]
) -> tuple[int, int, int]:
    """Rows, decoded bytes of the columns used, stored bytes of all columns; from the first row."""
    rows = index_of(reader, config, name)
    split_of(config, [row[KEY] for row in rows], reader.columns, name)  # an error comes first here
    reason = ""
    for row in rows[: config.max_corrupt_rows + 1]:
        try:
            sample = reader.load(row)
            stored = sum(map(len, encode(sample, reader.columns).values()))
        except Exception as error:
            reason = reason or f"{row['key']}: {one_line(error)}"
            continue
        used = [column for column in columns if column in sample]
        decoded = sum(ArraySpec.of(sample[column]).nbytes for column in used)
        return len(rows), decoded * len(rows), stored * len(rows)
    raise InputError(f"data.{name}", f"no row can be read: {reason or 'it has none'}")


def used_columns(job: Job, tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    """The datasets that a run reads, in the job's order, with the columns that it reads."""
    used = {name: set(columns) for name, columns in wire(job, tasks).columns_of_datasets().items()}
    for name in job.evaluation.data.values():
        columns = {c for task in tasks.values() for c in (*task.inputs, *task.labels)}
        used.setdefault(name, set()).update(columns - used.get(name, set()))
    return {name: tuple(sorted(used[name])) for name in job.data if name in used}


def processes_of(
    job: Job, models: Mapping[str, nn.Module], kept: Mapping[str, int]
) -> dict[str, int]:
    """Each process of a run on this machine and its memory in bytes: its own, and of a task its
    weights, gradients, optimizer and what a step keeps for its backward pass (``kept``)."""
    weights = {n: sum(p.numel() for p in m.parameters()) * 4 for n, m in models.items()}
    found = {"driver": PROCESS_BYTES, "cache": PROCESS_BYTES}
    for name, size_ in weights.items():
        states = 2 + OPTIMIZER_STATES[job.tasks[name].optimizer.name]  # 2: weights and gradient
        found[name] = PROCESS_BYTES + size_ * states + kept.get(name, 0)
        if job.uses_forward_servers and not job.tasks[name].frozen:
            found[f"{name} (forward server)"] = PROCESS_BYTES + size_
    return found


def needs_of(
    job: Job,
    findings: Sequence[Finding],
    models: Mapping[str, nn.Module],
    kept: Mapping[str, int],
) -> list[Need]:
    """The memory and disk that the run needs, as estimates; ``kept`` as in
    :func:`processes_of`."""
    held = sum(f.decoded_bytes for f in findings if f.materialized)
    cache = job.cache.max_bytes if job.active_relations else 0
    weights = {n: sum(p.numel() for p in m.parameters()) * 4 for n, m in models.items()}
    states = {n: 1 + OPTIMIZER_STATES[job.tasks[n].optimizer.name] for n in models}
    training = sum(processes_of(job, models, kept).values())
    saved = sum(w * states[n] for n, w in weights.items()) * (job.checkpoint.keep + 1)
    to_build = sum(f.stored_bytes for f in findings if not f.ready)
    memory, shared = memory_bytes(), _free(Path("/dev/shm"))
    store = None if memory is None else int(memory * OBJECT_STORE_SHARE)
    if store is not None and shared is not None:
        store = min(store, shared)
    spills = "Ray will spill to disk, which is slow; lower cache.max_bytes or stream the data"
    needs = [
        Need("memory", held + training, memory, True, "set data.*.materialize: never"),
        Need("object store (/dev/shm)", held + cache, store, False, spills),
        Need(f"disk at {cache_dir()}", to_build, _free(cache_dir()), True, "free some space"),
    ]
    if job.checkpoint.path is None:
        needs.append(Need("disk for checkpoints", saved, _free(Path()), True, "free some space"))
    return needs


def decide(needs: Sequence[Need]) -> list[str]:
    """A warning for each shortage. Raises InputError for a fatal one."""
    warnings = []
    for need in needs:
        if need.available is not None and need.needed > need.available:
            text = f"{size(need.needed)} needed, {size(need.available)} available; {need.advice}"
            if need.fatal:
                raise InputError(need.what, text)
            warnings.append(f"{need.what}: {text}")
    return warnings


def memory_bytes() -> int | None:
    """Memory of this machine in bytes; None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _free(path: Path) -> int | None:
    """Free bytes on the disk of a path, which need not exist yet; None where unknown."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
