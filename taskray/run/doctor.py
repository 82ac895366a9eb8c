"""``taskray doctor``: checks whether a job can run on this machine, without starting anything.

It builds settings, plugins, networks and relations as the run would, looks at the labels, lets each
task make a step on two rows in this process, and compares what the run needs with what the machine
has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from taskray.data.storage.convert import build_reader, convert
from taskray.data.streams.batch import Batch
from taskray.job.config import Job
from taskray.loop.assembly import build_inner_relations, build_relations, build_tasks
from taskray.loop.wiring import wire
from taskray.record.formatting import NOTHING, count, size
from taskray.report.console import print_plain, print_table
from taskray.run.checks import check, check_location
from taskray.run.labels import batches_of, check_batch_sizes, check_values
from taskray.run.requirements import (
    Finding,
    Need,
    decide,
    inspect,
    needs_of,
    processes_of,
    used_columns,
)
from taskray.run.trial import Measured, Trial, try_steps
from taskray.runtime.environment import temporary_folder
from taskray.runtime.member import load_initial
from taskray.runtime.placement import Share, plan
from taskray.tasks.task import Task

SAMPLE_ROWS = 8
"""Rows of a dataset that is not converted yet that are looked at."""


def doctor(job: Job, console: Console) -> None:
    """Print the parts of a job and what it needs. Raises InputError for the first problem."""
    models = check(job)
    check_location(job)
    tasks = build_tasks(job)
    for name, model in models.items():
        load_initial(job, name, model)
    print_plain(console, f"{job.name}: {job.description}".rstrip(": "))
    print_table(console, _task_table(job, tasks, models))
    print_plain(console, "\n".join(described_relations(job, tasks)))
    findings = [inspect(job, name, columns) for name, columns in used_columns(job, tasks).items()]
    print_table(console, _data_table(findings))
    print_plain(console, "\n".join(f"{f.name}: {f.where}" for f in findings))
    shares = None
    if job.runtime.address is None:  # a cluster's resources are known only after connecting
        shares = plan(job, {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()})
    check_batch_sizes(job, {f.name: f.rows for f in findings})
    with TemporaryDirectory() as folder:
        places = {f.name: f.where if f.ready else sample(job, f.name, folder) for f in findings}
        few = {f.name for f in findings if not f.ready and f.rows > SAMPLE_ROWS}
        warnings = check_values(job, tasks, places, few)
        trial = try_steps(job, tasks, first_rows(job, tasks, places), threads_of(shares))
    for problem in trial.problems[:-1]:
        print_plain(console, f"! {problem}")
    if trial.problems:
        raise trial.problems[-1]
    kept = {name: measured.kept_bytes for name, measured in trial.measured.items()}
    needs = needs_of(job, findings, models, kept)
    print_table(console, _resource_table(job, shares, needs))
    print_table(console, _step_table(trial, processes_of(job, models, kept)))
    print_plain(console, timing(trial))
    warnings += [*decide(needs), *missing_labels(job, tasks)]
    if job.runtime.address is None and (elsewhere := temporary_folder()) is not None:
        warnings.append(f"TMPDIR does not suit Ray: its temporary files will be in {elsewhere}")
    for warning in warnings:
        print_plain(console, f"! {warning}")
    print_plain(console, "this job can run" + (", with the warnings above" if warnings else ""))


def sample(job: Job, name: str, folder: str) -> Path:
    """The first rows of a dataset that is not converted yet, converted into ``folder``."""
    config = job.data[name]
    limit = min(SAMPLE_ROWS, config.limit or SAMPLE_ROWS)
    place = Path(folder) / name
    convert(config.model_copy(update={"limit": limit}), place, name=name, use_ray=False)
    return place


def first_rows(job: Job, tasks: Mapping[str, Task], places: Mapping[str, Path]) -> dict[str, Batch]:
    """The first readable rows of each dataset that the run trains on, with the columns it reads."""
    columns = wire(job, tasks).columns_of_datasets()
    return {
        name: next(batches_of(job.data[name], places[name], name, read))
        for name, read in columns.items()
    }


def threads_of(shares: Mapping[str, Share] | None) -> dict[str, int]:
    """The threads of each task; empty where the machine is a cluster's."""
    return {name: share.threads for name, share in (shares or {}).items()}


def timing(trial: Trial) -> str:
    """How the steps were measured, in one line."""
    how = "each task alone, on a full batch of the first two rows repeated"
    computed = [name for name, measured in trial.measured.items() if measured.computed]
    if computed:
        how += f" ({', '.join(computed)}: on two rows, times the rows of a batch over two)"
    return f"a step was measured on this machine, {how}"


def described_relations(job: Job, tasks: Mapping[str, Task]) -> list[str]:
    """One line for each edge: ``depth_normals: depth <- normals (normals)``, which reads
    ``relation: consumer <- producers (quantity)``; and one for each relation inside a task."""
    lines = []
    for name, task in tasks.items():
        for weighted in build_relations(job, name, task) if name not in job.frozen else ():
            for quantity in (q for q in weighted.relation.quantities if not task.predicts(q)):
                peers = [p for p, t in tasks.items() if p != name and t.predicts(quantity)]
                lines.append(f"{weighted.name}: {name} <- {', '.join(peers)} ({quantity})")
        for inner in build_inner_relations(job, name, task):
            lines.append(f"{inner.name}: inside {name} ({', '.join(inner.relation.quantities)})")
    return lines or ["no relation has a weight: each task trains alone"]


def missing_labels(job: Job, tasks: Mapping[str, Task]) -> list[str]:
    """A warning for each evaluation whose dataset has no labels of some task."""
    warnings = []
    for title, name in job.evaluation.data.items():
        reader = build_reader(job.data[name], name)
        for task_name, task in tasks.items():
            missing = sorted({*task.inputs, *task.labels} - set(reader.columns))
            if missing:
                warnings.append(
                    f"evaluation {title!r} has no {', '.join(missing)}: it skips task {task_name!r}"
                )
    return warnings


# ---- tables ----------------------------------------------------------------------


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title)
    return table


def _task_table(job: Job, tasks: Mapping[str, Task], models: Mapping[str, nn.Module]) -> Table:
    table = _table("task", "predicts", "network", "parameters", "labels", "steps", "batch")
    for name, task in tasks.items():
        config = job.tasks[name]
        parameters = sum(p.numel() for p in models[name].parameters())
        table.add_row(
            name, ", ".join(task.quantities), config.model.name, count(parameters),
            ", ".join(job.labels_of(name)) or NOTHING,
            "frozen" if config.frozen else count(job.steps_of(name)), str(config.batch_size),
        )  # fmt: skip
    return table


def _data_table(findings: Sequence[Finding]) -> Table:
    table = _table("dataset", "rows", "stored", "decoded", "read", "")
    for f in findings:
        held = "in memory" if f.materialized else "streamed"
        state = "ready" if f.ready else "to be built"
        row = (f.name, count(f.rows), size(f.stored_bytes), size(f.decoded_bytes), held, state)
        table.add_row(*row)
    return table


def _step_table(trial: Trial, processes: Mapping[str, int]) -> Table:
    table = _table("process", "memory", "step on labels", "consistency step")
    for name, memory in processes.items():
        measured = trial.measured.get(name, Measured())
        times = [measured.seconds.get(kind) for kind in ("labels", "consistency")]
        shown = [NOTHING if t is None else f"{1000 * t:,.0f} ms" for t in times]
        table.add_row(name, size(memory), *shown)
    return table


def _resource_table(job: Job, shares: Mapping[str, Share] | None, needs: Sequence[Need]) -> Table:
    table = _table("resource", "needed", "available")
    if shares is None:
        table.add_row("CPUs and GPUs", "", f"unknown: the cluster at {job.runtime.address}")
    else:
        cpus, gpus = (sum(getattr(s, kind) for s in shares.values()) for kind in ("cpus", "gpus"))
        table.add_row("CPUs reserved", f"{cpus:g}", str(os.cpu_count()))
        table.add_row("GPUs reserved", f"{gpus:g}", str(torch.cuda.device_count()))
        threads = ", ".join(f"{name} {share.threads}" for name, share in shares.items())
        table.add_row("threads", threads, "")
    for need in needs:
        available = NOTHING if need.available is None else size(need.available)
        table.add_row(need.what, size(need.needed), available)
    return table
