"""A study: variants x seeds of one job, and the table of their results.

study file ──▶ runs ──▶ those not done ──Ray Tune──▶ run folders ──▶ table, report
                        (datasets converted once, here)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from taskray.errors import InputError
from taskray.files import lock_folder, make_folder, write_text
from taskray.job.config import Job, dump_yaml, read_kind
from taskray.record.folder import read_result
from taskray.report.console import print_plain, print_table
from taskray.report.curves import read_curves, write_curves
from taskray.report.history import CONSTANT
from taskray.report.html import write_report
from taskray.report.render import to_rich
from taskray.report.tables import Cell, Table, study_table, write_table
from taskray.run.checks import check
from taskray.run.datasets import prepare_datasets
from taskray.tuning.gain import delta_m
from taskray.tuning.progressive import changes_of, check_references, in_waves, references
from taskray.tuning.record import record
from taskray.tuning.runs import (
    Layer,
    Run,
    RunState,
    check_metric,
    is_about,
    resolve,
    run_state,
    value_of,
)
from taskray.tuning.settings import OF_EACH_RUN, GainConfig, StudyConfig, load_study

FAILED = 1
CONSTANT_NOTE = (
    "constant predictor: one prediction for every input, from the labels of the first row below it"
)


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: the seed of a variant."""

    variant: str
    seed: int
    run: Run
    wave: int = 0
    """Runs of an earlier wave come first."""
    origins: tuple[Path, ...] = ()
    """Folders of the runs whose checkpoints it begins from."""


def study(
    path: Path,
    out: Path | None,
    seeds: int | None,
    overrides: Sequence[str],
    console: Console,
    record_to: Path | None = None,
) -> int:
    """Do the runs of a study that are not done, and write its table; returns the exit code.

    ``seeds`` is the number of seeds, instead of the study's; ``overrides`` change the job of all
    variants. ``record_to`` is a folder that the results are also written to, see :func:`record`.
    If a run fails, the other runs continue, the table names the missing one, and the exit code is
    1. Raises InputError before the first run for a wrong study, and KeyboardInterrupt after
    Ctrl-C, once the checkpoints and the table so far are written.
    """
    config = load_study(path)
    if seeds is not None and seeds < 1:
        raise InputError("--seeds", f"got {seeds}, expected at least 1")
    folder = out or Path("runs") / config.name
    runs = plan_study(config, path, folder.resolve(), config.seed_list(seeds), overrides)
    if record_to is not None:  # checked now: an error after all the runs would come too late
        make_folder(record_to, "a folder of records")
    with lock_folder(folder, "a study folder"):
        write_text(folder / "study.yaml", dump_yaml(config))
        try:
            errors = run_in_waves(runs, folder.resolve(), config.max_concurrent, console)
        except KeyboardInterrupt:
            write_study(config, runs, {}, folder)
            print_plain(console, "stopped; the same command continues from here")
            raise
        table = write_study(config, runs, errors, folder)
    print_table(console, to_rich(table))
    print_plain(console, f"study folder: {folder}   report: {folder / 'report.html'}")
    missing = [r for r in runs if _finished(r.run) is None]
    if record_to is not None:
        facts = {
            "command": _command(path, seeds, overrides),
            "seeds": sorted({r.seed for r in runs}),
            "runs": f"{len(runs) - len(missing)} of {len(runs)} finished",
            "steps": {r.variant: _steps(r.run.job) for r in runs},
        }
        results = [result for r in runs if (result := _finished(r.run)) is not None]
        written = record(record_to, config.name, config.description, table, facts, results, path)
        print_plain(console, f"recorded in {written}")
    return FAILED if missing else 0


def plan_study(
    config: StudyConfig, path: Path, folder: Path, seeds: Sequence[int], overrides: Sequence[str]
) -> list[StudyRun]:
    """Every run of the study, seed by seed, so that an interrupted study can compare variants.

    Raises InputError with the variant and the key for a change that fits no job.
    """
    for text in overrides:
        if (key := text.partition("=")[0]) in OF_EACH_RUN:
            raise InputError(f"--set {text!r}", OF_EACH_RUN[key])
    values = read_kind(path.parent / config.job, "job")
    wave_of = {n: k for k, wave in enumerate(in_waves(config.variants, str(path))) for n in wave}
    runs = []
    for seed in seeds:
        folders = {name: folder / "runs" / name / f"seed_{seed}" for name in config.variants}
        for name, variant in config.variants.items():
            own = {"name": f"{config.name}-{name}-seed_{seed}", "seed": seed}
            changes = changes_of(variant, folders)
            layers: list[Layer] = [config.set, overrides, changes, own]
            run = resolve(values, layers, f"{path}: variants.{name}", folders[name])
            run = Run(f"{name}, seed {seed}", folders[name], run.job)
            origins = tuple(folders[n] for n in sorted(references(variant.set)))
            runs.append(StudyRun(name, seed, run, wave_of[name], origins))
        if seed == seeds[0]:
            check_references({r.variant: r.run.job for r in runs}, folders, str(path))
    jobs = [r.run.job for r in runs[: len(config.variants)]]
    for name, job in zip(config.variants, jobs, strict=True):
        try:
            check(job)
        except InputError as error:
            raise InputError(f"{path}: variants.{name}", str(error)) from None
    for metric in config.metrics:
        check_metric(metric, jobs, f"{path}: metrics")
    for metric, higher_is_better in config.delta_m.directions().items() if config.delta_m else ():
        check_metric(metric, jobs, f"{path}: delta_m.metrics")
        if higher_is_better is None:
            raise InputError(
                f"{path}: delta_m.metrics",
                f"{metric!r} has no known direction: set it in delta_m.higher_is_better",
            )
    return runs


def run_in_waves(
    runs: Sequence[StudyRun], folder: Path, max_concurrent: int | None, console: Console
) -> dict[Path, str]:
    """Do the runs that are not done, in the order of their waves. Returns folder -> why the run
    failed or could not begin."""
    errors: dict[Path, str] = {}
    at = {r.run.folder: r.run for r in runs}
    for number in range(max(r.wave for r in runs) + 1):
        ready = []
        for r in (r for r in runs if r.wave == number):
            missing = [at[o].title for o in r.origins if run_state(at[o]) is not RunState.DONE]
            if missing:
                errors[r.run.folder] = f"needs {missing[0]}, which did not finish"
            else:
                ready.append(r.run)
        errors |= run_all(ready, folder, max_concurrent, console)
    return errors


def run_all(
    runs: Sequence[Run], folder: Path, max_concurrent: int | None, console: Console
) -> dict[Path, str]:
    """Do the runs that are not done, through Ray Tune. Returns folder -> why the run failed."""
    left = [run for run in runs if run_state(run) is not RunState.DONE]
    if len(left) < len(runs):
        print_plain(console, f"{len(runs) - len(left)} of {len(runs)} runs are already done")
    if not left:
        return {}
    from taskray.runtime.session import session  # a study that is done imports no Ray

    with session(left[0].job.runtime.address):
        import ray
        from ray import tune

        from taskray.tuning.fit import concurrency, fit, footprint

        available = ray.cluster_resources()
        for run in left:
            footprint(run.job, available)  # raises InputError for a job that is too large
        prepare_all([run.job for run in left], console)
        at_once = min(concurrency(run.job, available, max_concurrent) for run in left)
        trials = fit(
            lambda point: left[point["run"]],
            {"run": tune.grid_search(list(range(len(left))))},
            folder=folder,
            total=len(left),
            at_once=at_once,
            console=console,
            max_concurrent_trials=at_once,
        )
    return {left[t.point["run"]].folder: t.error for t in trials if t.error is not None}


def prepare_all(jobs: Sequence[Job], console: Console) -> None:
    """Convert the datasets of all jobs, each once, before the first trial starts."""
    seen: set[str] = set()
    for job in jobs:
        key = job.model_dump_json(include={"data", "evaluation", "mediator", "tasks"})
        if key not in seen:
            seen.add(key)
            prepare_datasets(job, use_ray=True, console=console)


def write_study(
    config: StudyConfig, runs: Sequence[StudyRun], errors: dict[Path, str], folder: Path
) -> Table:
    """Write the table, the curves and the report of the finished runs."""
    table = table_of(config, runs, errors)
    write_table(table, folder)
    runs_of: dict[str, list[Path]] = {}
    for r in runs:
        if _finished(r.run) is not None:
            runs_of.setdefault(r.variant, []).append(r.run.folder)
    write_curves(table, read_curves(table, runs_of), folder)
    write_report(folder)
    return table


def table_of(config: StudyConfig, runs: Sequence[StudyRun], errors: dict[Path, str]) -> Table:
    """The study's table of the finished runs; notes below it name the missing runs."""
    described = [(v.label or n, v.description) for n, v in config.variants.items()]
    notes = [f"{label}: {text}" for label, text in described if text]
    if config.paper and config.paper.note:
        notes.append(config.paper.note)
    found: dict[str, list[dict[str, Any] | None]] = {name: [] for name in config.variants}
    jobs = {r.variant: r.run.job for r in runs}
    for r in runs:
        result = _finished(r.run)
        found[r.variant].append(result)
        if result is None:
            reason = errors.get(r.run.folder, "not finished")
            notes.append(f"Missing: {r.run.title} ({reason})")
    results = {
        name: {
            m: [value_of(r, m) if r else None for r in found[name]]
            for m in config.metrics
            if is_about(m, jobs[name])
        }
        for name in config.variants
    }
    labels = {n: v.label for n, v in config.variants.items() if v.label}
    constant = {m: _constants(m, found) for m in config.metrics}
    if any(constant.values()) and CONSTANT not in config.variants:
        results = {CONSTANT: constant, **results}
        labels[CONSTANT] = "constant predictor"
        notes.insert(0, CONSTANT_NOTE)
    if config.delta_m:
        for name, gains in gains_of(config.delta_m, found).items():
            results[name]["delta_m"] = gains
    return study_table(
        config.title or config.name,
        results,
        metrics=config.columns,
        labels=labels,
        paper=config.paper.rows if config.paper else None,
        paper_title=config.paper.title if config.paper else "paper",
        notes=[note.rstrip(".") for note in notes],
    )


def _constants(
    metric: str, found: Mapping[str, Sequence[Mapping[str, Any] | None]]
) -> list[float | None]:
    """The constant predictor's value for each seed, of the first variant that has one."""
    for results in found.values():
        values = [value_of(r, metric, CONSTANT) if r else None for r in results]
        if any(value is not None for value in values):
            return values
    return []


def gains_of(
    config: GainConfig, found: Mapping[str, Sequence[dict[str, Any] | None]]
) -> dict[str, list[float | None]]:
    """The gain of every seed of every variant except the baseline."""

    def values(result: dict[str, Any]) -> dict[str, float | None]:
        return {metric: value_of(result, metric) for metric in config.metrics}

    seeds = [values(result) for result in found[config.baseline] if result]
    baseline = {m: Cell.of([seed[m] for seed in seeds]).mean for m in config.metrics}
    directions = {metric: bool(higher) for metric, higher in config.directions().items()}
    return {
        name: [delta_m(values(r), baseline, directions) if r else None for r in results]
        for name, results in found.items()
        if name != config.baseline
    }


def _finished(run: Run) -> dict[str, Any] | None:
    """The result of a run; None unless it finished with the job that the study asks for."""
    return read_result(run.folder) if run_state(run) is RunState.DONE else None


def _steps(job: Job) -> int | dict[str, int]:
    steps = {name: job.steps_of(name) for name in job.tasks}
    return next(iter(steps.values())) if len({*steps.values()}) == 1 else steps


def _command(path: Path, seeds: int | None, overrides: Sequence[str]) -> str:
    parts = ["taskray study", str(path), f"--seeds {seeds}" if seeds is not None else ""]
    return " ".join(filter(None, [*parts, *(f"--set {text}" for text in overrides)]))
