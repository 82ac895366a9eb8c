"""Tables of results: variants against metrics, mean ± std over seeds, in five formats.

A :class:`Table` contains numbers. A :class:`Grid` is the same table as text: Markdown, terminal,
picture and report draw it. CSV and JSON contain the numbers, ratios as fractions. The same table
always gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskray.errors import InputError
from taskray.files import plain, write_text
from taskray.loop.metric_key import ANY_TASK
from taskray.record.formatting import describe, format_change, relative_change

OURS = "ours"


@dataclass(frozen=True)
class Cell:
    """One cell: the value of each seed. ``missing`` counts the seeds without a finite value."""

    values: tuple[float, ...] = ()
    missing: int = 0

    @classmethod
    def of(cls, values: float | Iterable[float | None] | None) -> Cell:
        """From one value, or one for each seed; None and values that are not finite are missing."""
        given = list(values) if isinstance(values, Iterable) else [values]
        finite = tuple(float(v) for v in given if v is not None and math.isfinite(v))
        return cls(finite, len(given) - len(finite))

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for fewer than two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Column:
    """A metric from one source: our runs, or a paper."""

    key: str
    title: str
    source: str = OURS

    @property
    def id(self) -> str:
        return self.key if self.source == OURS else f"{self.source}: {self.key}"


@dataclass(frozen=True)
class Row:
    """A variant; ``cells`` by column id."""

    name: str
    label: str
    cells: Mapping[str, Cell]

    def cell(self, column: Column) -> Cell:
        return self.cells.get(column.id, Cell())


@dataclass(frozen=True)
class Table:
    """Variants as rows, metrics as columns. ``metrics_as_rows`` transposes it: then every variant
    but the ``baseline`` and the ``constant`` is followed by its relative change from the
    baseline."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    metrics_as_rows: bool = False
    baseline: str | None = None
    constant: str | None = None
    """Name of the row of the constant predictor."""


@dataclass(frozen=True)
class Entry:
    """One cell as text. ``best``: the best of its metric. ``good``: a change for the better; None
    where the cell is no change, or a change of a metric without a direction."""

    text: str
    best: bool = False
    good: bool | None = None
    heading: bool = False


@dataclass(frozen=True)
class Grid:
    """A table as text; titles in the header may have several lines."""

    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...]


def study_table(
    title: str,
    results: Mapping[str, Mapping[str, float | Sequence[float | None] | None]],
    *,
    metrics: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    titles: Mapping[str, str] | None = None,
    paper: Mapping[str, Mapping[str, float | None]] | None = None,
    paper_title: str = "paper",
    notes: Sequence[str] = (),
) -> Table:
    """A study's table.

    ``results``: variant -> metric key -> one value for each seed (units of ``result.json``).
    ``metrics``: the keys shown, in order (default: all); a key may be a path
    (``depth/real_test/abs_rel``). ``labels`` and ``titles`` rename variants and metrics.
    ``paper``: variant -> metric key -> the paper's value in the same unit; each such metric has a
    second column, named ``paper_title``, beside ours.
    """
    paper = paper or {}
    keys = list(metrics or dict.fromkeys(k for row in results.values() for k in row))
    columns: list[Column] = []
    for key in keys:
        heading = (titles or {}).get(key) or heading_of(key)
        columns.append(Column(key, heading))
        if any(row.get(key) is not None for row in paper.values()):
            columns.append(Column(key, heading, paper_title))
    rows = []
    for name in dict.fromkeys([*results, *paper]):
        cells = {}
        for column in columns:
            source = results if column.source == OURS else paper
            value = source.get(name, {}).get(column.key)
            if value is not None:
                cells[column.id] = Cell.of(value)
        rows.append(Row(name, (labels or {}).get(name, name), cells))
    return Table(title, tuple(columns), tuple(rows), tuple(notes))


def heading_of(key: str) -> str:
    """``depth/real_test/abs_rel`` -> ``depth · real_test · AbsRel ↓``; without the task where it is
    any."""
    info = describe(key)
    path = key.removesuffix(info.name).strip("/")
    parts = (part for part in path.split("/") if part and part != ANY_TASK)
    return " · ".join([*parts, info.heading])


def grid(table: Table) -> Grid:
    """The table as text, with the best value of each metric marked."""
    body = _metric_rows(table) if table.metrics_as_rows else _variant_rows(table)
    return Grid(body[0], tuple(body[1]), (*table.notes, *_own_notes(table)))


def _variant_rows(table: Table) -> tuple[tuple[str, ...], list[tuple[Entry, ...]]]:
    papers = {c.key for c in table.columns if c.source != OURS}
    header = [""]
    for column in table.columns:
        path, _, metric = column.title.rpartition(" · ")
        source = f"[{column.source}]" if column.key in papers else ""
        header.append("\n".join(filter(None, (path, metric, source))))
    best = {c.id: _best(table, c) for c in table.columns}
    rows = []
    for row in table.rows:
        entries = [Entry(row.label, heading=True)]
        for column in table.columns:
            text = _text(row.cell(column), column.key)
            entries.append(Entry(text, best=text in best[column.id]))
        rows.append(tuple(entries))
    return tuple(header), rows


def _metric_rows(table: Table) -> tuple[tuple[str, ...], list[tuple[Entry, ...]]]:
    base = next((r for r in table.rows if r.name == table.baseline), None)
    header = ["", "metric"]
    for row in table.rows:
        changes = base is not None and row.name not in (table.baseline, table.constant)
        header += [row.label, "change"] if changes else [row.label]
    rows = []
    for column in table.columns:
        path, _, metric = column.title.rpartition(" · ")
        entries = [Entry(path, heading=True), Entry(metric, heading=True)]
        best, info = _best(table, column), describe(column.key)
        for row in table.rows:
            text = _text(row.cell(column), column.key)
            entries.append(Entry(text, best=text in best))
            if base is not None and row.name not in (table.baseline, table.constant):
                change = relative_change(row.cell(column).mean, base.cell(column).mean)
                entries.append(Entry(format_change(change), good=info.good(change)))
        rows.append(tuple(entries))
    return tuple(header), rows


def _text(cell: Cell, key: str) -> str:
    return describe(key).format(cell.mean, cell.std) + ("†" if cell.missing else "")


def _best(table: Table, column: Column) -> set[str]:
    """The texts of the best values of a column, also of those equal to it once rounded; empty where
    all are equal."""
    shown = [(r.cell(column).mean, _text(r.cell(column), column.key)) for r in table.rows]
    known = [(mean, text) for mean, text in shown if mean is not None]
    info = describe(column.key)
    if info.higher_is_better is None or len({info.format(mean) for mean, _ in known}) < 2:
        return set()
    means = [mean for mean, _ in known]
    target = info.format(max(means) if info.higher_is_better else min(means))
    return {text for mean, text in known if info.format(mean) == target}


def _own_notes(table: Table) -> list[str]:
    cells = [cell for row in table.rows for cell in row.cells.values()]
    seeds = sorted({len(cell.values) for cell in cells if len(cell.values) > 1})
    notes = []
    if seeds:
        counts = " or ".join(map(str, seeds))
        notes.append(f"Mean ± sample standard deviation over {counts} seeds")
    if any(cell.missing for cell in cells):
        notes.append("† Some seeds gave no finite value and are left out")
    papers = dict.fromkeys(c.source for c in table.columns if c.source != OURS)
    notes += [f"[{p}]: figures as printed there, from other data and models" for p in papers]
    return notes


def to_csv(table: Table) -> str:
    """Numbers, ratios as fractions: mean, std and number of seeds for each of our columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["variant"]
    for c in table.columns:
        header += [c.id, f"{c.id} std", f"{c.id} seeds"] if c.source == OURS else [c.id]
    writer.writerow(header)
    for row in table.rows:
        line: list[Any] = [row.name]
        for column in table.columns:
            cell = row.cell(column)
            figures = [cell.mean, cell.std, len(cell.values)]
            line += figures if column.source == OURS else figures[:1]
        writer.writerow(["" if v is None else v for v in line])
    return out.getvalue()


def to_json(table: Table) -> str:
    """The whole table, as :func:`read_table` reads it."""
    columns = [
        {"key": c.key, "title": c.title, "source": c.source,
         "higher_is_better": describe(c.key).higher_is_better}
        for c in table.columns
    ]  # fmt: skip
    rows = [
        {"name": r.name, "label": r.label, "cells": {
            c.id: {"mean": r.cell(c).mean, "std": r.cell(c).std,
                   "values": list(r.cell(c).values), "missing": r.cell(c).missing}
            for c in table.columns if c.id in r.cells}}
        for r in table.rows
    ]  # fmt: skip
    content = {"title": table.title, "metrics_as_rows": table.metrics_as_rows,
               "baseline": table.baseline, "columns": columns, "rows": rows,
               "notes": list(table.notes)}  # fmt: skip
    return json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_table(path: str | Path) -> Table:
    """A table from its ``table.json``. Raises InputError for a file that taskray did not write."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        columns = [Column(c["key"], c["title"], c["source"]) for c in content["columns"]]
        rows = [
            Row(r["name"], r["label"],
                {k: Cell(tuple(map(float, c["values"])), c["missing"])
                 for k, c in r["cells"].items()})
            for r in content["rows"]
        ]  # fmt: skip
        return Table(content["title"], tuple(columns), tuple(rows), tuple(content["notes"]),
                     content["metrics_as_rows"], content["baseline"])  # fmt: skip
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(path), f"not a table that taskray wrote: {error!r}") from None


def write_table(table: Table, folder: str | Path, stem: str = "table") -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``table.json`` and ``table.png`` into ``folder``."""
    from taskray.report.render import to_markdown, write_png

    folder = Path(folder)
    texts = {"md": to_markdown(table), "csv": to_csv(table), "json": to_json(table)}
    paths = [write_text(folder / f"{stem}.{ext}", text) for ext, text in texts.items()]
    return [*paths, write_png(table, folder / f"{stem}.png")]
