"""A study's curves: each metric against steps and against seconds, all variants in one plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from taskray.errors import InputError
from taskray.report.charts import Line, line_chart
from taskray.report.history import Run, Series
from taskray.report.metrics import describe
from taskray.report.run_folder import atomic_write, write_text
from taskray.report.tables import OURS, Table, heading_of

CURVES = "curves.json"
AXES = ("steps", "seconds")

Curves = dict[str, dict[str, Series]]
"""Metric key -> label of the variant -> its mean over seeds."""


def read_curves(table: Table, runs_of: Mapping[str, Sequence[Path]]) -> Curves:
    """What the runs of a study, by variant, logged of the table's metrics on their way
    (``evaluation.every``); metrics of which no run logged at least two values are left out."""
    found: Curves = {}
    for row in table.rows:
        runs = [run for folder in runs_of.get(row.name, ()) if (run := _read(folder))]
        for column in table.columns:
            task, _, metric = column.key.partition("/")
            if column.source != OURS:
                continue
            seeds = [series for run in runs if (series := run.series(task, f"eval/{metric}"))]
            mean = _mean(seeds)
            if len(mean.steps) > 1:
                found.setdefault(column.key, {})[row.label] = mean
    return found


def curve_charts(curves: Curves) -> str:
    """Two charts a metric for the report: against steps, and against seconds of the run."""
    charts = []
    for key, variants in curves.items():
        percent = describe(key).percent
        for axis in AXES:
            lines = [
                Line(label, series.steps if axis == "steps" else series.times, series.values, style)
                for (label, series), style in zip(variants.items(), _styles(), strict=False)
            ]
            title = f"{heading_of(key)}".replace("\n", ", ")
            charts.append(line_chart(f"{title}, {axis}", lines, x=axis, percent=percent))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def write_curves(curves: Curves, folder: Path) -> Path | None:
    """Write ``curves.json`` for the report and ``curves.png``, the same as a picture, a row for
    each metric; None where there is no curve."""
    plain = {key: {label: vars(s) for label, s in rows.items()} for key, rows in curves.items()}
    write_text(folder / CURVES, json.dumps(plain, ensure_ascii=False))
    if not curves:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(curves)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(curves), len(AXES), squeeze=False)
    for row, (key, variants) in zip(grid, curves.items(), strict=True):
        scale = 100.0 if describe(key).percent else 1.0
        for axes, axis in zip(row, AXES, strict=True):
            for label, series in variants.items():
                xs = series.steps if axis == "steps" else series.times
                axes.plot(xs, [scale * value for value in series.values], label=label)
            axes.set(xlabel=axis, ylabel=heading_of(key).replace("\n", ", "))
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=8)
    options: dict[str, Any] = {"dpi": 130, "format": "png", "metadata": {"Software": None}}
    return atomic_write(folder / "curves.png", lambda p: figure.savefig(p, **options))


def saved_curves(folder: Path) -> Curves:
    """What :func:`write_curves` wrote; nothing where it did not."""
    try:
        plain = json.loads((folder / CURVES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: {label: Series(**s) for label, s in rows.items()} for key, rows in plain.items()}


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


def _styles() -> Iterator[str]:
    return cycle([f"c{number}" for number in range(6)])
