"""``taskray doctor``: checks whether a job can run on this machine, without starting anything.

It builds settings, plugins, networks and relations as the run would, reads one row of each
dataset, and compares what the run needs with what the machine has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from taskray.data.storage.convert import build_reader
from taskray.job.config import Job
from taskray.loop.assembly import build_relations, build_tasks, wanted_quantities
from taskray.record.formatting import NOTHING, count, size
from taskray.report.console import print_plain
from taskray.run.checks import check, check_location
from taskray.run.requirements import Finding, Need, decide, inspect, needs_of, used_columns
from taskray.runtime.member import load_initial
from taskray.runtime.placement import Share, plan
from taskray.tasks.task import Task


def doctor(job: Job, console: Console) -> None:
    """Print the parts of a job and what it needs. Raises InputError for the first problem."""
    models = check(job)
    check_location(job)
    tasks = build_tasks(job)
    for name, model in models.items():
        load_initial(job, name, model)
    print_plain(console, f"{job.name}: {job.description}".rstrip(": "))
    console.print(_task_table(job, tasks, models))
    print_plain(console, "\n".join(relations_of(job, tasks)))
    findings = [inspect(job, name, columns) for name, columns in used_columns(job, tasks).items()]
    console.print(_data_table(findings))
    print_plain(console, "\n".join(f"{f.name}: {f.where}" for f in findings))
    shares = None
    if job.runtime.address is None:  # a cluster's resources are known only after connecting
        shares = plan(job, {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()})
    needs = needs_of(job, findings, models)
    console.print(_resource_table(job, shares, needs))
    warnings = [*decide(needs), *missing_labels(job, tasks)]
    for warning in warnings:
        print_plain(console, f"! {warning}")
    print_plain(console, "this job can run" + (", with the warnings above" if warnings else ""))


def relations_of(job: Job, tasks: Mapping[str, Task]) -> list[str]:
    """One line for each edge: ``depth_normals: depth <- normals (normals)``, which reads
    ``relation: consumer <- producers (quantity)``."""
    lines = []
    for name, task in tasks.items():
        for weighted in build_relations(job, name, task) if name not in job.frozen else ():
            for quantity in wanted_quantities(task, [weighted]):
                peers = [p for p, t in tasks.items() if p != name and t.predicts(quantity)]
                lines.append(f"{weighted.name}: {name} <- {', '.join(peers)} ({quantity})")
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
    table = _table("dataset", "rows", "stored", "decoded", "read", "")
    for f in findings:
        held = "in memory" if f.materialized else "streamed"
        state = "ready" if f.ready else "to be built"
        row = (f.name, count(f.rows), size(f.stored_bytes), size(f.decoded_bytes), held, state)
        table.add_row(*row)
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
