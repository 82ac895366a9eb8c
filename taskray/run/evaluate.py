"""``taskray evaluate``: measures the checkpoints of a run, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from taskray.data.storage.convert import build_reader
from taskray.data.storage.source import Handle
from taskray.data.storage.store import prepare
from taskray.data.streams.stream import plain_batches
from taskray.errors import InputError
from taskray.files import lock_folder
from taskray.job.config import Job, override, parse_changed, read_yaml
from taskray.loop.assembly import build_model, build_task, build_tasks
from taskray.loop.evaluation import (
    Evaluation,
    evaluate,
    measured_columns,
    measured_nothing,
    panels,
)
from taskray.loop.network import Network
from taskray.record.folder import CONFIG, RunFolder, read_panels, read_result
from taskray.report.console import print_plain
from taskray.report.html import write_report
from taskray.report.progress import dataset_progress
from taskray.run.checks import check_labels
from taskray.run.datasets import Opener
from taskray.run.energy import add_energies
from taskray.runtime.checkpoints import CheckpointStore, load_into
from taskray.runtime.member import NUM_SAMPLES, choose_device


def evaluate_run(
    folder: Path, overrides: Sequence[str] = (), console: Console | None = None
) -> dict[str, Any]:
    """Evaluate the latest checkpoint of every task of a run; returns the new ``result.json``.

    The evaluations are those of the run's ``config.yaml`` with the ``overrides``. They are added
    to the existing result. Raises InputError where the folder is no run folder or another process
    uses it, and where a task has no checkpoint or one of another model.
    """
    config = folder / CONFIG
    if not config.is_file():
        raise InputError(str(folder), f"not a run folder: no {CONFIG} in it")
    values = read_yaml(config)
    job = parse_changed(values, override(values, overrides), str(config))
    if not job.evaluation.data:
        raise InputError(f"{config}: evaluation.data", "empty, expected at least one evaluation")
    for name in job.evaluation.data.values():
        check_labels(name, build_reader(job.data[name], name), build_tasks(job).values())
    store = CheckpointStore(job.checkpoint.path or folder / "checkpoints")
    for name in job.tasks:
        if not store.steps(name):
            raise InputError(f"{store.root}/{name}", f"no checkpoint of task {name!r}")
    with lock_folder(folder, "a run folder"), RunFolder(folder, tensorboard=False) as files:
        # read first, so that a damaged file is found before the evaluation and not after it
        before = read_result(folder) or {"name": job.name, "status": "interrupted"}
        pictures = read_panels(folder)
        console = console or Console()
        data = open_evaluations(job, console)
        evaluations: dict[str, dict[str, Evaluation]] = {}
        steps: dict[str, int] = {}
        for name in job.tasks:
            steps[name], evaluations[name] = evaluate_task(job, name, store, data)
        add_energies(job, store, data, evaluations)
        result = merge(before, job, evaluations, steps)
        for name, found in evaluations.items():
            for warning in measured_nothing(name, found):
                print_plain(console, f"! {warning}")
                event = {"event": warning, "task": name, "step": steps[name]}
                events = result.get("events") or []
                result["events"] = [e for e in events if e != event] + [event]
        files.write_panels(pictures | panels(evaluations))
        files.write_result(result)
        write_report(folder)
    return result


def open_evaluations(job: Job, console: Console) -> dict[str, Handle]:
    """The job's evaluation datasets, by title; those not in the cache are converted first."""
    paths = {}
    for name in dict.fromkeys(job.evaluation.data.values()):
        with dataset_progress(console, name) as progress:
            paths[name] = prepare(job.data[name], name=name, use_ray=False, progress=progress)
    with closing(Opener(job, paths, use_ray=False)) as opener:
        return opener.for_evaluation().result()


def evaluate_task(
    job: Job, name: str, store: CheckpointStore, data: Mapping[str, Handle]
) -> tuple[int, dict[str, Evaluation]]:
    """The step of a task's latest checkpoint, and its evaluations by title."""
    task = build_task(job, name)
    device = choose_device(job.tasks[name].gpus)
    model = build_model(job, name, task)
    checkpoint = store.latest(name)
    assert checkpoint is not None  # evaluate_run has checked
    load_into(model, checkpoint)
    network = Network(task, model, job.tasks[name], device)
    found = {}
    for title, handle in data.items():
        found[title] = Evaluation({})
        if columns := measured_columns(task, handle.info.layout):
            batches = plain_batches(handle.open(), job.evaluation.batch_size, columns)
            samples = NUM_SAMPLES if title == next(iter(data)) else 0
            found[title] = evaluate(network, batches, samples)
    return checkpoint.step, found


def merge(
    result: Mapping[str, Any],
    job: Job,
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    steps: Mapping[str, int],
) -> dict[str, Any]:
    """The result with these evaluations added and everything else unchanged."""
    main = next(iter(job.evaluation.data))
    tasks = dict(result.get("tasks") or {})
    for name, found in evaluations.items():
        before = tasks.get(name) or {"steps": steps[name]}
        values = {title: evaluation.metrics for title, evaluation in found.items()}
        metrics = values.get(main, before.get("metrics", {}))
        merged = {**(before.get("evaluations") or {}), **values}
        tasks[name] = {**before, "metrics": metrics, "evaluations": merged}
    return {**result, "tasks": tasks, "evaluated_steps": dict(steps)}
