"""A study's curves: each metric against steps and against seconds, all variants in one plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskray.errors import InputError
from taskray.files import atomic_write, write_text
from taskray.loop.metric_key import ANY_TASK, TaskMetric
from taskray.record.formatting import describe
from taskray.report.charts import Line, line_chart
from taskray.report.history import Run, Series
from taskray.report.tables import OURS, Table, heading_of

CURVES = "curves.json"
AXES = ("steps", "seconds")

Curves = dict[str, dict[str, Series]]
"""Metric key -> name of the variant -> its mean over seeds."""


def read_curves(table: Table, runs_of: Mapping[str, Sequence[Path]]) -> Curves:
    """The table's metrics as the runs of a study logged them during training
    (``evaluation.every``). ``runs_of``: variant -> run folders, one for each seed. Metrics with
    fewer than two common steps are left out."""
    found: Curves = {}
    for row in table.rows:
        runs = [run for folder in runs_of.get(row.name, ()) if (run := _read(folder))]
        for column in table.columns:
            metric = TaskMetric.parse(column.key)
            if column.source != OURS or metric is None:
                continue
            seeds = [
                series
                for run in runs
                for task in (run.tasks if metric.task == ANY_TASK else [metric.task])
                if (series := run.series(task, metric.reported))
            ]
            mean = _mean(seeds)
            if len(mean.steps) > 1:
                found.setdefault(column.key, {})[row.name] = mean
    return found


def curve_charts(table: Table, curves: Curves) -> str:
    """Two charts for each metric: against steps, and against seconds of the run. A variant has the
    same colour in all of them."""
    charts = []
    for key, variants in curves.items():
        percent = describe(key).percent
        for axis in AXES:
            lines = [
                Line(row.label, _xs(variants[row.name], axis), variants[row.name].values,
                     f"c{number % 6}")
                for number, row in enumerate(table.rows)
                if row.name in variants
            ]  # fmt: skip
            title = f"{heading_of(key)}".replace("\n", ", ")
            charts.append(line_chart(f"{title}, {axis}", lines, x=axis, percent=percent))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def write_curves(table: Table, curves: Curves, folder: Path) -> Path | None:
    """Write ``curves.json`` for the report and the same curves as ``curves.png``, a row for each
    metric; returns the picture's path, None where there is no curve."""
    plain = {key: {name: vars(s) for name, s in rows.items()} for key, rows in curves.items()}
    write_text(folder / CURVES, json.dumps(plain, ensure_ascii=False))
    if not curves:
        return None
    figure = draw_curves(table, curves)
    options: dict[str, Any] = {"dpi": 130, "format": "png", "metadata": {"Software": None}}
    return atomic_write(folder / "curves.png", lambda p: figure.savefig(p, **options))


def draw_curves(table: Table, curves: Curves) -> Any:
    """The curves as a matplotlib figure with one legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(curves)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(curves), len(AXES), squeeze=False)
    drawn: dict[str, Any] = {}
    for pair, (key, variants) in zip(grid, curves.items(), strict=True):
        scale = 100.0 if describe(key).percent else 1.0
        for axes, axis in zip(pair, AXES, strict=True):
            for number, row in enumerate(table.rows):
                if row.name in variants:
                    ys = [scale * value for value in variants[row.name].values]
                    line = axes.plot(_xs(variants[row.name], axis), ys, color=f"C{number % 10}")
                    drawn[row.name] = line[0]
            axes.set_xlabel(axis)
            axes.set_ylabel(heading_of(key).replace("\n", ", "), parse_math=False)
            axes.grid(alpha=0.3)
    rows = [row for row in table.rows if row.name in drawn]
    legend = grid[0][0].legend(
        [drawn[row.name] for row in rows], [row.label for row in rows], fontsize=8
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may contain a dollar sign
    return figure


def saved_curves(folder: Path) -> Curves:
    """The curves that :func:`write_curves` wrote; empty without a file. Raises InputError for a
    file that taskray did not write."""
    file = folder / CURVES
    if not file.exists():
        return {}
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return {key: {name: _series(s) for name, s in rows.items()} for key, rows in plain.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(file), f"not curves that taskray wrote: {error!r}") from None


def _series(plain: Mapping[str, Any]) -> Series:
    steps, times, values = (plain[name] for name in ("steps", "times", "values"))
    points = [(int(s), float(t), float(v)) for s, t, v in zip(steps, times, values, strict=True)]
    return Series(*map(list, zip(*points, strict=True)))


def _xs(series: Series, axis: str) -> Sequence[float]:
    return series.steps if axis == "steps" else series.times


def _read(folder: Path) -> Run | None:
    try:
        return Run(folder)
    except InputError:
        return None


def _mean(seeds: Sequence[Series]) -> Series:
    """The mean over seeds at the steps that all of them logged."""
    common = set(seeds[0].steps).intersection(*(s.steps for s in seeds)) if seeds else set()
    mean = Series()
    for step in sorted(common):
        points = [s.steps.index(step) for s in seeds]
        mean.steps.append(step)
        mean.times.append(sum(s.times[i] for s, i in zip(seeds, points, strict=True)) / len(seeds))
        mean.values.append(
            sum(s.values[i] for s, i in zip(seeds, points, strict=True)) / len(seeds)
        )
    return mean
