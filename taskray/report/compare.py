"""The metrics of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskray.loop.metric_key import TaskMetric
from taskray.record.folder import read_result
from taskray.record.formatting import describe, rank
from taskray.report.history import CONSTANT, MEASURED, Run, evaluations_of
from taskray.report.tables import Cell, Column, Row, Table, heading_of


def comparison_table(
    runs: Mapping[str, Mapping[str, Any]], title: str = "", baseline: str | None = None
) -> Table:
    """Every metric of every task and evaluation, one column for each run, beside the constant
    predictor of the first run that has one.

    ``runs``: label -> content of ``result.json``. ``baseline``: the label of a run, by default the
    first; the column of every other run is followed by the relative change from the baseline.
    """
    cells = {label: metric_cells(result) for label, result in runs.items()}
    constants = (metric_cells(result, CONSTANT) for result in runs.values())
    constant = next(filter(None, constants), {})
    if constant:
        cells = {CONSTANT: constant, **cells}
    keys = sorted(dict.fromkeys(k for row in cells.values() for k in row), key=_order(cells))
    rows = tuple(Row(label, label, row) for label, row in cells.items())
    columns = tuple(Column(key, heading_of(key)) for key in keys)
    baseline = baseline or next(iter(runs), None)
    return Table(title, columns, rows, metrics_as_rows=True, baseline=baseline, constant=CONSTANT)


def compare_folders(folder: Path, baseline: Path) -> Table:
    """The comparison table of two run folders, each under the name of its folder."""
    folders = (baseline, folder)
    names = tuple(f.resolve().name for f in folders)
    if names[0] == names[1]:  # two runs of a study: .../alone/seed_0, .../collective/seed_0
        names = labels(Run(folder), Run(baseline))
    results = [read_result(f) or {} for f in folders]
    return comparison_table(dict(zip(names, results, strict=True)))


def labels(run: Run, baseline: Run | None) -> tuple[str, str]:
    """The names of the baseline and of the run in a comparison."""
    if baseline and run.uses_consistency and not baseline.uses_consistency:
        return "without consistency", "with consistency"
    if baseline and baseline.name != run.name:
        return baseline.name, run.name
    return "baseline", "this run"


def metric_cells(result: Mapping[str, Any], of: str = MEASURED) -> dict[str, Cell]:
    """``<task>/<evaluation>/<metric>`` -> value, for all evaluations in a result, of the tasks'
    networks or (``CONSTANT``) of their constant predictors."""
    cells = {}
    for task, values in (result.get("tasks") or {}).items():
        for evaluation, metrics in evaluations_of(values, of).items():
            for metric, value in metrics.items():
                cells[str(TaskMetric(task, evaluation, metric))] = Cell.of(value)
    return cells


def _order(cells: Mapping[str, Mapping[str, Cell]]) -> Any:
    """Tasks and evaluations in the order given, metrics in the order of ``formatting.METRICS``."""
    groups = list(dict.fromkeys(_group(key) for row in cells.values() for key in row))
    return lambda key: (groups.index(_group(key)), rank(describe(key).name))


def _group(key: str) -> tuple[str, str] | None:
    metric = TaskMetric.parse(key)
    return (metric.task, metric.title) if metric else None
