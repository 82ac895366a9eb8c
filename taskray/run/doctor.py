"""``taskray doctor``: whether a job can work here, found out without placing anything.

Settings, plugins, networks and relations are built as the run would build them; each dataset is
looked up, and one row of it is read; what they need is held against what this machine has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from taskray.data.readers.reader import Reader
from taskray.data.storage.codec import ArraySpec, encode
from taskray.data.storage.parquet import columns_of, parquet_files
from taskray.data.storage.source import open_source
from taskray.data.storage.store import (
    build_reader,
    cache_dir,
    folder_of,
    index_of,
    is_complete,
    prepare,
)
from taskray.errors import InputError, one_line
from taskray.job.config import DataConfig, Job
from taskray.loop.assembly import (
    build_relations,
    build_tasks,
    columns_of_datasets,
    wanted_quantities,
)
from taskray.record.formatting import NOTHING, count, size
from taskray.report.say import say
from taskray.run.checks import check, check_location
from taskray.runtime.member import load_initial
from taskray.runtime.placement import Share, plan
from taskray.tasks.task import Task

OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "sgd": 1}
"""Numbers that the optimizer keeps for each weight."""
OBJECT_STORE_SHARE = 0.3
"""Share of the memory that Ray takes for its object store, unless /dev/shm is smaller."""


@dataclass(frozen=True)
class Finding:
    """What is known of one dataset before a run."""

    name: str
    where: Path
    ready: bool
    rows: int
    stored_bytes: int
    decoded_bytes: int
    materialized: bool


@dataclass(frozen=True)
class Need:
    """A resource: bytes needed, bytes there (None: unknown), and whether too little is fatal."""

    what: str
    needed: int
    there: int | None
    fatal: bool
    advice: str


def doctor(job: Job, console: Console) -> int:
    """Print what a job is made of and what it needs; returns the exit code 0.

    Raises InputError, with one line, for the first thing that cannot work.
    """
    models = check(job)
    check_location(job)
    tasks = build_tasks(job)
    for name, model in models.items():
        load_initial(job, name, model)
    say(console, f"{job.name}: {job.description}".rstrip(": "))
    console.print(_task_table(job, tasks, models))
    say(console, "\n".join(relations_of(job, tasks)))
    findings = [inspect(job, name, columns) for name, columns in _used(job, tasks).items()]
    console.print(_data_table(findings))
    say(console, "\n".join(f"{f.name}: {f.where}" for f in findings))
    shares = None
    if job.runtime.address is None:  # what a cluster has is known once the run connects to it
        shares = plan(job, {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()})
    needs = needs_of(job, findings, models)
    console.print(_resource_table(job, shares, needs))
    warnings = [*judge(needs), *missing_labels(job, tasks)]
    for warning in warnings:
        say(console, f"! {warning}")
    say(console, "this job can run" + (", with the remarks above" if warnings else ""))
    return 0


def relations_of(job: Job, tasks: Mapping[str, Task]) -> list[str]:
    """Who feeds whom, a line each: ``depth_normals: depth <- normals (normals)``."""
    lines = []
    for name, task in tasks.items():
        for weighted in build_relations(job, name, task) if name not in job.frozen else ():
            for quantity in wanted_quantities(task, [weighted]):
                peers = [p for p, t in tasks.items() if p != name and t.predicts(quantity)]
                lines.append(f"{weighted.name}: {name} <- {', '.join(peers)} ({quantity})")
    return lines or ["no relation acts: each task trains alone"]


def inspect(job: Job, name: str, columns: Sequence[str]) -> Finding:
    """Look a dataset up, without converting it. Raises InputError where it lacks a column, is
    broken or empty."""
    config = job.data[name]
    reader = build_reader(config, name)
    folder = folder_of(config, reader)
    ready = reader.stored is not None or is_complete(folder)
    if ready:
        prepare(config, name=name, use_ray=False)  # only checks its unreadable rows
        there = [c for c in columns_of(folder) if c in columns]
        _check_columns(job, name, columns_of(folder))
        streamed = config.model_copy(update={"materialize": "never"})
        info = open_source(streamed, folder, there, use_ray=False, name=name).info
        rows, decoded = info.num_rows, info.decoded_bytes
        stored = sum(file.stat().st_size for file in parquet_files(folder))
    else:
        _check_columns(job, name, reader.columns)
        rows, decoded, stored = _estimate(config, reader, name, columns)
    small = decoded <= config.materialize_bytes
    materialized = config.materialize == "always" or (config.materialize == "auto" and small)
    return Finding(name, folder, ready, rows, stored, decoded, materialized)


def _estimate(
    config: DataConfig, reader: Reader, name: str, columns: Sequence[str]
) -> tuple[int, int, int]:
    """Rows, bytes decoded (of the columns used) and bytes stored (of all), from the first row."""
    rows = index_of(reader, config, name)
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
    raise InputError(f"dataset {name!r}: no row could be read; {reason}")


def _check_columns(job: Job, name: str, there: Sequence[str]) -> None:
    """Training needs every column; an evaluation leaves out the tasks whose labels are missing."""
    needed = columns_of_datasets(job, build_tasks(job)).get(name, ())
    missing = [column for column in needed if column not in there]
    if missing:
        raise InputError(
            f"data.{name}: has no column {missing[0]!r}, which a task needs; "
            f"it has {', '.join(there)}"
        )


def _used(job: Job, tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    """The datasets that a run reads, in the job's order, and the columns it reads."""
    used = {name: set(columns) for name, columns in columns_of_datasets(job, tasks).items()}
    for name in job.evaluation.data.values():
        columns = {c for task in tasks.values() for c in (*task.inputs, *task.labels)}
        used.setdefault(name, set()).update(columns - used.get(name, set()))
    return {name: tuple(sorted(used[name])) for name in job.data if name in used}


def missing_labels(job: Job, tasks: Mapping[str, Task]) -> list[str]:
    """Evaluations that will measure nothing of some task."""
    warnings = []
    for title, name in job.evaluation.data.items():
        reader = build_reader(job.data[name], name)
        for task_name, task in tasks.items():
            missing = sorted({*task.inputs, *task.labels} - set(reader.columns))
            if missing:
                warnings.append(
                    f"evaluation {title!r} has no {', '.join(missing)}: "
                    f"task {task_name!r} is not measured on it"
                )
    return warnings


def needs_of(job: Job, findings: Sequence[Finding], models: Mapping[str, nn.Module]) -> list[Need]:
    """What the run needs of this machine. Estimates: what a process needs besides is left out."""
    held = sum(f.decoded_bytes for f in findings if f.materialized)
    cache = job.cache.max_bytes if job.active_relations else 0
    weights = {n: sum(p.numel() for p in m.parameters()) * 4 for n, m in models.items()}
    states = {n: 1 + OPTIMIZER_STATES[job.tasks[n].optimizer.name] for n in models}
    learning = sum(w * (1 + states[n]) for n, w in weights.items())  # and the gradient
    saved = sum(w * states[n] for n, w in weights.items()) * (job.checkpoint.keep + 1)
    to_build = sum(f.stored_bytes for f in findings if not f.ready)
    memory, shared = memory_bytes(), _free(Path("/dev/shm"))
    store = None if memory is None else int(memory * OBJECT_STORE_SHARE)
    if store is not None and shared is not None:
        store = min(store, shared)
    spills = "Ray will spill to disk, which is slow; lower cache.max_bytes or stream the data"
    needs = [
        Need("memory", held + learning, memory, True, "set data.*.materialize: never"),
        Need("object store (/dev/shm)", held + cache, store, False, spills),
        Need(f"disk at {cache_dir()}", to_build, _free(cache_dir()), True, "make room there"),
    ]
    if job.checkpoint.path is None:
        needs.append(Need("disk for checkpoints", saved, _free(Path()), True, "make room there"))
    return needs


def judge(needs: Sequence[Need]) -> list[str]:
    """A warning for each shortage; InputError for one that is fatal."""
    warnings = []
    for need in needs:
        if need.there is not None and need.needed > need.there:
            text = (
                f"{need.what}: {size(need.needed)} needed, {size(need.there)} there; {need.advice}"
            )
            if need.fatal:
                raise InputError(text)
            warnings.append(text)
    return warnings


def memory_bytes() -> int | None:
    """Memory of this machine in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _free(path: Path) -> int | None:
    """Free bytes where the path is, or will be."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


# ---- what is printed ----------------------------------------------------------------------


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _task_table(job: Job, tasks: Mapping[str, Task], models: Mapping[str, nn.Module]) -> Table:
    table = _table("task", "predicts", "network", "parameters", "labels", "steps", "batch")
    for name, task in tasks.items():
        config = job.tasks[name]
        parameters = sum(p.numel() for p in models[name].parameters())
        table.add_row(
            name, ", ".join(task.quantities), config.model.name, count(parameters),
            job.labels_of(name) or NOTHING,
            "frozen" if config.frozen else count(job.steps_of(name)), str(config.batch_size),
        )  # fmt: skip
    return table


def _data_table(findings: Sequence[Finding]) -> Table:
    table = _table("dataset", "rows", "stored", "decoded", "held", "")
    for f in findings:
        held = "in memory" if f.materialized else "streamed"
        state = "ready" if f.ready else "to be built"
        row = (f.name, count(f.rows), size(f.stored_bytes), size(f.decoded_bytes), held, state)
        table.add_row(*row)
    return table


def _resource_table(job: Job, shares: Mapping[str, Share] | None, needs: Sequence[Need]) -> Table:
    table = _table("resource", "needed", "there")
    if shares is None:
        table.add_row("CPUs and GPUs", "", f"not asked: the cluster at {job.runtime.address}")
    else:
        cpus, gpus = (sum(getattr(s, kind) for s in shares.values()) for kind in ("cpus", "gpus"))
        table.add_row("CPUs reserved", f"{cpus:g}", str(os.cpu_count()))
        table.add_row("GPUs reserved", f"{gpus:g}", str(torch.cuda.device_count()))
        threads = ", ".join(f"{name} {share.threads}" for name, share in shares.items())
        table.add_row("threads", threads, "")
    for need in needs:
        there = NOTHING if need.there is None else size(need.there)
        table.add_row(need.what, size(need.needed), there)
    return table
