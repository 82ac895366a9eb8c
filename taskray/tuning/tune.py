"""A search: Ray Tune tries values of some fields of a job.

space file ──▶ default trial ──▶ points ──Ray Tune──▶ trials ──▶ best.yaml, table, report
               (the job's own             (random, grid or Optuna;
                values)                    ASHA stops the worse ones early)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from taskray.errors import InputError, TaskrayError
from taskray.files import lock_folder, make_folder, plain, write_text
from taskray.job.config import Job, dump_yaml, read_kind
from taskray.loop.metric_key import TaskMetric
from taskray.record.formatting import describe, format_change, relative_change
from taskray.report.console import print_plain
from taskray.report.html import write_report
from taskray.run.checks import check
from taskray.tuning.runs import Layer, Run, changed_job, check_metric, resolve
from taskray.tuning.settings import SpaceConfig, load_space
from taskray.tuning.study import prepare_all
from taskray.tuning.trial_table import TrialRow, record_search, rows_of, show, write_trials

DEFAULT = "default"
FAILED = 1
GOLDEN = 0.381966
"""A fraction of the way between two bounds. It gives no whole number, so that a range for an
integer field is found before the first trial."""


@dataclass(frozen=True)
class Space:
    """A search ready to run: its settings, the job's plain values, and its folder."""

    config: SpaceConfig
    source: str
    values: dict[str, Any]
    overrides: tuple[str, ...]
    folder: Path

    def run_of(self, point: Mapping[str, Any]) -> Run:
        """The trial of a point; of an empty point: of the job's own values."""
        name = digest(point) if point else DEFAULT
        own = {"name": f"{self.config.name}-{name}"}
        layers: list[Layer] = [self.config.set, self.overrides, point, own]
        folder = self.folder / "trials" / name
        run = resolve(self.values, layers, f"{self.source}: parameters", folder)
        return Run(self.title_of(point), run.folder, run.job)

    def job_of(self, point: Mapping[str, Any]) -> Job:
        """The user's job with the point's values, without the search's ``set``."""
        return changed_job(self.values, [self.overrides, point], self.source)

    def title_of(self, point: Mapping[str, Any]) -> str:
        names = short_names(list(self.config.parameters))
        return (
            ", ".join(f"{names[p]} {_text(v)}" for p, v in point.items()) or "the job's own values"
        )

    def value_in_job(self, path: str) -> Any:
        """The job's own value of a searched field; None if the job leaves it at its default."""
        value: Any = self.job_of({}).model_dump(mode="json")
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def metric(self) -> TaskMetric:
        """The metric to optimize."""
        metric = TaskMetric.parse(self.config.metric)
        assert metric is not None  # check_space has checked
        return metric

    @property
    def maximise(self) -> bool:
        if self.config.mode is not None:
            return self.config.mode == "max"
        return bool(describe(self.config.metric).higher_is_better)

    @property
    def num_trials(self) -> int:
        sizes = [len(p.grid) for p in self.config.parameters.values() if p.grid]
        if self.config.search == "grid":
            return math.prod(len(p.examples) for p in self.config.parameters.values())
        return math.prod(sizes) * self.config.num_samples


def tune(
    space: Path,
    job: Path | None,
    out: Path | None,
    samples: int | None,
    overrides: Sequence[str],
    console: Console,
    record_to: Path | None = None,
) -> int:
    """Search a space and write ``best.yaml`` and the table of trials; returns the exit code.

    The first trial has the job's own values and is never stopped early. ``job`` and ``samples``
    replace those of the space, ``overrides`` change the job; ``record_to`` is a folder that the
    results are also written to. A search that is started again only does the trials that are not
    done. Raises InputError before the first trial, TaskrayError if the first trial fails.
    """
    config = load_space(space)
    if samples is not None:
        if samples < 1:
            raise InputError("--samples", f"got {samples}, expected at least 1")
        if config.search == "grid":
            raise InputError(
                "--samples", "a grid search has one trial for each point, expected none"
            )
        config = config.model_copy(update={"num_samples": samples})
    values = read_kind(job or space.parent / config.job, "job")
    folder = out or Path("runs") / config.name
    searched = Space(config, str(space), values, tuple(overrides), folder.resolve())
    check_space(searched)
    if record_to is not None:  # checked now: an error after all the trials would come too late
        make_folder(record_to, "a folder of records")
    with lock_folder(folder, "a folder of a search"):
        write_text(folder / "space.yaml", dump_yaml(config))
        rows = search(searched, console)
        best = pick_best(rows, searched.maximise)
        write_text(folder / "best.yaml", dump_yaml(searched.job_of(best.point)))
        table = write_trials(rows, config, short_names(list(config.parameters)), folder)
        write_report(folder)
    show(rows, best, config, short_names(list(config.parameters)), console)
    print_plain(console, verdict(best, rows[0], config.metric))
    print_plain(console, f"best job: {folder / 'best.yaml'}   report: {folder / 'report.html'}")
    if record_to is not None:
        command = " ".join(
            ["taskray tune", str(space), *([f"--job {job}"] if job else []),
             *([f"--samples {samples}"] if samples else []), *(f"--set {o}" for o in overrides)]
        )  # fmt: skip
        written = record_search(record_to, config, table, rows, command, best, space)
        print_plain(console, f"recorded in {written}")
    return FAILED if any(row.error for row in rows) else 0


def check_space(space: Space) -> None:
    """Raise InputError, before the first trial, for a search that cannot work."""
    config, source = space.config, space.source
    default = space.run_of({}).job
    _check_job(default, f"{source}: set")
    for path, parameter in config.parameters.items():
        examples = parameter.examples
        if bounds := parameter.uniform or parameter.log_uniform:
            examples.append(bounds[0] + GOLDEN * (bounds[1] - bounds[0]))
        for value in examples:
            _check_job(space.run_of({path: value}).job, f"{source}: parameters")
            space.job_of({path: value})  # must also be valid without 'set', for best.yaml
    for name in (config.metric, *config.metrics):
        check_metric(name, [default], f"{source}: metric")
    metric = TaskMetric.parse(config.metric)
    if metric is None or metric.title not in default.evaluation.data:
        raise InputError(
            f"{source}: metric", f"got {config.metric!r}, expected <task>/<evaluation>/<metric>"
        )
    reader = default.data[default.evaluation.data[metric.title]].reader
    if reader.arguments.get("split") == "test":
        raise InputError(
            f"{source}: metric",
            f"{metric.title!r} is a test split: values chosen on it look too good; add "
            "an evaluation on a validation split under 'set'",
        )
    if config.mode is None and describe(config.metric).higher_is_better is None:
        raise InputError(
            f"{source}: mode",
            f"expected 'min' or 'max', because {config.metric!r} has no known direction",
        )
    if config.scheduler.name == "asha" and not default.evaluation.every:
        raise InputError(f"{source}: scheduler", "asha needs evaluation.every (under 'set')")


def _check_job(job: Job, source: str) -> None:
    try:
        check(job)
    except InputError as error:
        raise InputError(source, str(error)) from None


def search(space: Space, console: Console) -> list[TrialRow]:
    """Run the trials; the first row is that of the job's own values."""
    from taskray.runtime.session import session

    config, default = space.config, space.run_of({})
    with session(default.job.runtime.address):
        import ray

        from taskray.tuning.fit import concurrency, fit
        from taskray.tuning.searching import domains, tune_settings

        prepare_all([default.job], console)
        at_once = concurrency(default.job, ray.cluster_resources(), config.max_concurrent)
        common: dict[str, Any] = {
            "folder": space.folder,
            "at_once": at_once,
            "console": console,
            "measure": space.metric,
        }
        first = fit(lambda point: default, {}, total=1, early=False, **common)
        if first[0].error is not None:
            raise TaskrayError(f"the job fails with its own values: {first[0].error}")
        trials = fit(
            space.run_of,
            domains(config),
            total=space.num_trials,
            **common,
            **tune_settings(config, default.job, space.metric, space.maximise, at_once),
        )
    own = {path: space.value_in_job(path) for path in config.parameters}
    return rows_of(space.run_of, config, own, first[0], trials)


def pick_best(rows: Sequence[TrialRow], maximise: bool) -> TrialRow:
    """The best of the finished trials, the first of equal ones. A trial that was stopped early has
    fewer steps, so it cannot be compared."""
    finished = [row for row in rows if row.finished and row.value is not None]
    return (max if maximise else min)(finished, key=lambda row: row.value or 0.0)


def verdict(best: TrialRow, default: TrialRow, metric: str) -> str:
    """One line: the best trial against the job's own values."""
    info = describe(metric)
    if not best.point:
        return f"{metric}: no trial beat the job's own values ({info.format(best.value)})"
    change = format_change(relative_change(best.value, default.value))
    return (
        f"{metric}: {info.format(best.value)} with {best.title}, against "
        f"{info.format(default.value)} with the job's own values ({change})"
    )


def digest(point: Mapping[str, Any]) -> str:
    """The name of a point's folder: equal values give the same folder."""
    text = json.dumps(plain(dict(point)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """For each dotted path the shortest ending that no other path has."""
    names = {}
    for path in paths:
        parts = path.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [p for p in paths if p != path]
        names[path] = next(
            e for e in endings if e == path or not any(f".{o}".endswith(f".{e}") for o in others)
        )
    return names


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
