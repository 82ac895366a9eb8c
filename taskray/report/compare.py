"""Runs beside each other: what consistency bought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskray.record.formatting import describe, rank
from taskray.report.history import evaluations_of
from taskray.report.tables import Cell, Column, Row, Table, heading_of


def comparison_table(
    runs: Mapping[str, Mapping[str, Any]], title: str = "", baseline: str | None = None
) -> Table:
    """Every metric of every task and evaluation, one column a run.

    ``runs``: label -> contents of its ``result.json``. The first run is the ``baseline`` unless
    another is named; each other run is followed by its relative change from it.
    """
    cells = {label: metric_cells(result) for label, result in runs.items()}
    keys = sorted(dict.fromkeys(k for row in cells.values() for k in row), key=_order(cells))
    rows = tuple(Row(label, label, row) for label, row in cells.items())
    columns = tuple(Column(key, heading_of(key)) for key in keys)
    baseline = baseline or next(iter(runs), None)
    return Table(title, columns, rows, metrics_as_rows=True, baseline=baseline)


def metric_cells(result: Mapping[str, Any]) -> dict[str, Cell]:
    """``<task>/<evaluation>/<metric>`` -> figure, for all evaluations in a result."""
    cells = {}
    for task, values in (result.get("tasks") or {}).items():
        for evaluation, metrics in evaluations_of(values).items():
            for metric, value in metrics.items():
                cells[f"{task}/{evaluation}/{metric}"] = Cell.of(value)
    return cells


def _order(cells: Mapping[str, Mapping[str, Cell]]) -> Any:
    """Tasks and evaluations in the order given, metrics in the order of ``metrics.METRICS``."""
    groups = list(dict.fromkeys(_group(key) for row in cells.values() for key in row))
    return lambda key: (groups.index(_group(key)), rank(describe(key).name))


def _group(key: str) -> tuple[str, ...]:
    return tuple(key.split("/", 2)[:2])
