"""The report of a study: its table, a chart for each metric, and its runs."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from taskray.files import read_text
from taskray.record.folder import read_result
from taskray.record.formatting import NOTHING, describe, duration
from taskray.report.charts import dot_chart
from taskray.report.curves import curve_charts, saved_curves
from taskray.report.page import config_details, html_table, page, raw_table, section
from taskray.report.tables import OURS, Table, grid, read_table

TABLE = "table.json"
CONFIGS = ("study.yaml", "config.yaml", "space.yaml")
DEPTH = 3
"""Runs are searched for in folders up to this depth below the study."""


def study_page(folder: Path) -> str:
    """The report of the study in ``folder``, which contains a ``table.json``."""
    table = read_table(folder / TABLE)
    title = table.title or folder.name
    config = next((folder / c for c in CONFIGS if (folder / c).exists()), None)
    text = read_text(config) if config else ""
    runs = sorted(
        p.parent for d in range(1, DEPTH + 1) for p in folder.glob("*/" * d + "result.json")
    )
    lead = f"{len(table.rows)} variants" + (f" · finished runs: {len(runs)}" if runs else "")
    return page(
        title,
        [
            f'<header><h1>{escape(title)}</h1><p class="lead">{lead}</p></header>',
            section("Results", html_table(table), "The best of each column is bold."),
            section("Training", curve_charts(table, saved_curves(folder)), "Means over seeds."),
            section("Spread over seeds", _charts(table), "Dots: seeds. Bars: ± one deviation."),
            section("Runs", _runs(folder, runs)),
            config_details(text, config.name if config else ""),
        ],
    )


def _charts(table: Table) -> str:
    """One chart for each of our metrics; the best variant is coloured."""
    laid = grid(Table("", table.columns, table.rows))
    charts = []
    for i, column in enumerate(table.columns, start=1):
        if column.source != OURS:
            continue
        rows = [
            (row.label, row.cell(column).values, entries[i].best)
            for row, entries in zip(table.rows, laid.rows, strict=True)
        ]
        charts.append(dot_chart(column.title, rows, percent=describe(column.key).percent))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _runs(folder: Path, runs: list[Path]) -> str:
    lines = []
    for run in runs:
        result = read_result(run) or {}
        path = run.relative_to(folder).as_posix()
        name = escape(path)
        if (run / "report.html").exists():
            name = f'<a href="{quote(path)}/report.html">{name}</a>'
        seconds = result.get("seconds")
        took = duration(float(seconds)) if isinstance(seconds, (int, float)) else NOTHING
        lines.append(
            f"<tr><th class=head>{name}</th><td>{escape(str(result.get('status', NOTHING)))}</td>"
            f"<td>{took}</td></tr>"
        )
    return raw_table(["run", "status", "wall time"], lines, [True, False, False]) if lines else ""
