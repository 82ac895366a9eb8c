"""One run of a study or a search: its job, its folder, what remains to do, and its metrics."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import permutations
from pathlib import Path
from typing import Any

from taskray.errors import InputError
from taskray.exchange.cache import PredictionCache
from taskray.job.config import Job, assign, override, parse_changed
from taskray.job.plugins import nearest
from taskray.loop.assembly import build_task
from taskray.loop.meters import Edge
from taskray.loop.metric_key import ANY_TASK, TaskMetric, edge_name
from taskray.record.folder import CONFIG, read_result
from taskray.record.result import TaskState, summarize
from taskray.report.history import CONSTANT, MEASURED, evaluations_of
from taskray.run.energy import energy_names
from taskray.run.resuming import essence, saved_config
from taskray.runtime.checkpoints import written_at

RESULT_PATHS = ("seconds", "staleness", "cache")
"""Parts of a result file, besides its tasks, that a metric may name."""

Layer = Mapping[str, Any] | Sequence[str]
"""Changes of a job: dotted path -> value, or a list of ``a.b=value``."""


@dataclass(frozen=True)
class Run:
    """One run: ``title`` for people, its folder (absolute), and the resolved job."""

    title: str
    folder: Path
    job: Job


class RunState(Enum):
    """What remains to do of a run, by the content of its folder."""

    DONE = "done"
    RESUME = "resume"
    START_OVER = "start over"


def change(values: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of a job's plain values with dotted paths changed; ``source`` is named in errors."""
    changed = dict(values)
    for path, value in changes.items():
        try:
            changed = assign(changed, path.split("."), value, path)
        except InputError as error:
            raise InputError(source, str(error).removeprefix("--set ")) from None
    return changed


def changed_job(values: Mapping[str, Any], layers: Sequence[Layer], source: str) -> Job:
    """The job of plain values with layers of changes; later layers win.

    Raises InputError with ``source`` and the key for a path that no job has.
    """
    before = values
    for layer in layers:
        if isinstance(layer, Mapping):
            values = change(values, layer, source)
        else:
            values = override(dict(values), layer)
    return parse_changed(before, dict(values), source)


def resolve(
    values: Mapping[str, Any],
    layers: Sequence[Layer],
    source: str,
    folder: Path,
) -> Run:
    """The run of such a job in ``folder``; see :func:`changed_job`."""
    job = changed_job(values, layers, source)
    update: dict[str, Any] = {}
    if job.checkpoint.path:  # shared by all runs: each needs another folder in it
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        own = "/".join([job.checkpoint.path.rstrip("/"), *folder.parts[-4:]]) + f"-{place}"
        update["checkpoint"] = job.checkpoint.model_copy(update={"path": own})
    return Run(folder.name, folder, job.model_copy(update=update))


def run_state(run: Run) -> RunState:
    """DONE: finished with the same job. RESUME: not begun, or begun with a job that trains the same
    way. START_OVER: the folder contains a run of another job.

    Settings that do not change a result (names, checkpoints, where it runs) may differ. A finished
    run with other evaluations is resumed, which evaluates its last checkpoint again. A run is
    started over if a checkpoint that it began from has been written again since.
    """
    before = saved_config(run.folder)
    if before is None:
        return RunState.RESUME
    now = run.job.model_dump(mode="json")
    if essence(before) != essence(now) or _is_outdated(run):
        return RunState.START_OVER
    result = _result(run.folder)
    same = _measured(before) == _measured(now)
    return RunState.DONE if same and result.get("status") == "finished" else RunState.RESUME


def _result(folder: Path) -> dict[str, Any]:
    try:
        return read_result(folder) or {}
    except InputError:  # truncated by a crash
        return {}


def _is_outdated(run: Run) -> bool:
    began = (run.folder / CONFIG).stat().st_mtime
    origins = {name: task.checkpoint for name, task in run.job.tasks.items() if task.checkpoint}
    written = (written_at(location, name) for name, location in origins.items())
    return any(when is not None and when > began for when in written)


def _measured(values: Mapping[str, Any]) -> Any:
    """The evaluations of a job and their datasets."""
    evaluation = values.get("evaluation") or {}
    data = values.get("data") or {}
    return evaluation, {n: data.get(n) for n in (evaluation.get("data") or {}).values()}


# ---- metrics ------------------------------------------------------------------------------------


def value_of(result: Mapping[str, Any], key: str, of: str = MEASURED) -> float | None:
    """A metric of a result: ``<task>/<evaluation>/<metric>``, ``*`` being the task that measures
    it, or a path of the result file. ``of``: the evaluations of networks, or of constant
    predictors."""
    tasks = result.get("tasks") or {}
    metric = TaskMetric.parse(key)
    if metric is not None and metric.task == ANY_TASK:
        found = (value_of(result, str(replace(metric, task=name)), of) for name in tasks)
        return next((value for value in found if value is not None), None)
    if metric is not None and metric.task in tasks:
        evaluations = evaluations_of(tasks[metric.task], of)
        if metric.title in evaluations or of == CONSTANT:
            return evaluations.get(metric.title, {}).get(metric.metric)
    if of == CONSTANT:
        return None
    path = key.split("/")
    value: Any = tasks if path[0] in tasks else result
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def is_about(key: str, job: Job) -> bool:
    """Whether a metric belongs to the whole run, or to one of the job's tasks."""
    return key.partition("/")[0] in (*job.tasks, *RESULT_PATHS, ANY_TASK)


def check_metric(key: str, jobs: Sequence[Job], source: str) -> None:
    """Raise InputError for a metric that no run of these jobs will have. Metrics whose names depend
    on the data are accepted."""
    problems = [_problem(key, job) for job in jobs]
    for job in jobs if key.startswith(f"{ANY_TASK}/") else ():
        if len(several := _measuring(key, job)) > 1:
            raise InputError(
                source, f"{key!r}: {' and '.join(several)} measure it, expected one of these tasks"
            )
    if all(problems):
        raise InputError(source, f"{key!r}: {problems[0]}")


def _measuring(key: str, job: Job) -> list[str]:
    """The tasks of a job that measure ``*/<evaluation>/<metric>``."""
    rest = key.partition("/")[2]
    return [name for name in job.tasks if _problem(f"{name}/{rest}", job) is None]


def _problem(key: str, job: Job) -> str | None:
    task, _, rest = key.partition("/")
    title, slash, metric = rest.partition("/")
    if task == ANY_TASK:
        problems = {name: _problem(f"{name}/{rest}", job) for name in job.tasks}
        return None if _measuring(key, job) else next(iter(problems.values()))
    if task not in job.tasks and task not in RESULT_PATHS:
        return f"no task {task!r}; {nearest(task, [*job.tasks, *RESULT_PATHS])}"
    if task not in job.tasks or not slash:
        known = [k for k in other_figures(job) if k.partition("/")[0] == task]
        if key in known:
            return None
        if task in job.tasks and rest in metric_names(job, task):
            return f"has no evaluation, expected {task}/<evaluation>/{rest}"
        return f"no such figure; {nearest(rest, [k.removeprefix(f'{task}/') for k in known])}"
    if title not in job.evaluation.data:
        titles = list(job.evaluation.data)
        return f"no evaluation {title!r}; {nearest(title, titles) if titles else 'there is none'}"
    names = metric_names(job, task)
    by_data = metric.startswith("iou/") and not any(n.startswith("iou/") for n in names)
    if names and metric not in names and not by_data:
        return f"task {task!r} measures no {metric!r}; {nearest(metric, names)}"
    return None


def other_figures(job: Job) -> list[str]:
    """The numbers in the result file of a job's run, besides its evaluations."""
    states = {name: TaskState() for name in job.tasks}
    result = summarize(job, states, PredictionCache(1).statistics(), 0.0)
    pairs = permutations(job.tasks, 2)
    edges = {f"staleness/{edge_name(a, b)}": Edge().summary() for a, b in pairs}
    parts = {**result["tasks"], **edges, "cache": result["cache"]}
    figures = [
        f"{part}/{name}"
        for part, values in parts.items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    ]
    return ["seconds", *figures]


def metric_names(job: Job, task: str) -> list[str]:
    """The metrics of a task's evaluations; empty if they depend on the data."""
    energy = job.evaluation.energy is not None
    key = f"{energy} {job.tasks[task].task.model_dump_json()}"
    if key not in _NAMES:  # a study asks for each of its columns and variants
        _NAMES[key] = _metric_names(job, task)
    return _NAMES[key]


_NAMES: dict[str, list[str]] = {}


def _metric_names(job: Job, task: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics: compute() before update()
        try:
            built = build_task(job, task)
            return [*built.metric().compute(), *energy_names(job, built)]
        except InputError:
            raise
        except Exception:
            return []
