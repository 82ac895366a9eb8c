"""A table as Markdown, in the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rich.table
from rich import box
from rich.text import Text

from taskray.files import atomic_write
from taskray.report.tables import Entry, Table, grid

GOOD, BAD = "#0f7b55", "#b42318"


def to_markdown(table: Table) -> str:
    """A GitHub table with its title above and its notes below, the best values bold."""
    laid = grid(table)
    lines = [f"**{_escape(table.title)}**", ""] if table.title else []
    headings = sum(entry.heading for entry in laid.rows[0]) if laid.rows else 1
    rows = [[f"**{e.text}**" if e.best else e.text for e in row] for row in laid.rows]
    lines += markdown_table([laid.header, *rows], headings)
    for note in laid.notes:
        lines += ["", f"{_escape(note)}."]
    return "\n".join(lines) + "\n"


def markdown_table(lines: Sequence[Sequence[str]], headings: int = 1) -> list[str]:
    """Rows of texts as the lines of a GitHub table. The first row is the header; the first
    ``headings`` columns are left-aligned, the others right-aligned."""
    marks = ["---" if i < headings else "---:" for i in range(len(lines[0]))]
    header, *rows = [[_escape(text) for text in line] for line in lines]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def to_rich(table: Table) -> rich.table.Table:
    """The table for a terminal: the best values bold, changes green or red."""
    laid = grid(table)
    shown = rich.table.Table(
        title=Text(table.title) if table.title else None,
        caption=Text("\n".join(laid.notes)) if laid.notes else None,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    for i, title in enumerate(laid.header):
        heading = bool(laid.rows) and laid.rows[0][i].heading
        shown.add_column(Text(title), justify="left" if heading else "right")
    before: tuple[Entry, ...] = ()
    for row in laid.rows:
        group = table.metrics_as_rows and before and row[0].text != before[0].text
        if group:
            shown.add_section()
        repeated = table.metrics_as_rows and before and not group
        shown.add_row(
            *(Text("" if repeated and i == 0 else e.text, _style(e)) for i, e in enumerate(row))
        )
        before = row
    return shown


def _style(entry: Entry) -> str:
    if entry.good is not None:
        return "green" if entry.good else "red"
    return "bold" if entry.best else ""


def write_png(table: Table, path: str | Path) -> Path:
    """Draw the table on white with matplotlib; the picture is as wide as its content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    laid = grid(table)
    lines = [laid.header, *[[e.text for e in row] for row in laid.rows]]
    widths = [
        max(len(part) for text in column for part in text.split("\n")) * 0.085 + 0.3
        for column in zip(*lines, strict=True)
    ]
    row_height, margin = 0.34, 0.3
    head_height = 0.16 * max(h.count("\n") for h in laid.header)
    notes = list(laid.notes)
    text_width = 0.075 * max(map(len, [table.title, *notes]), default=0)
    width = max(sum(widths), text_width) + 2 * margin
    height = head_height + row_height * (len(lines) + 1) + 0.24 * len(notes) + 2 * margin
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    write = partial(axes.text, parse_math=False)  # a label may contain a dollar sign

    y = margin + row_height / 2
    write(margin, y, table.title, fontsize=11, weight="bold", va="center", color="#14181f")
    right = margin + sum(widths)
    entries = [tuple(Entry(h, heading=i == 0) for i, h in enumerate(laid.header)), *laid.rows]
    for number, row in enumerate(entries):
        y += row_height + (head_height if number == 0 else 0)
        x = margin
        for i, (entry, span) in enumerate(zip(row, widths, strict=True)):
            left = entry.heading or (bool(laid.rows) and laid.rows[0][i].heading)
            write(
                x if left else x + span - 0.12, y + (0.1 if number == 0 else 0), entry.text,
                va="bottom" if number == 0 else "center", linespacing=1.25, fontsize=9,
                ha="left" if left else "right", color=_colour(entry, number == 0),
                weight="bold" if entry.best else "normal",
            )  # fmt: skip
            x += span
        thick = 1.0 if number in (0, len(entries) - 1) else 0.4
        line = "#14181f" if thick == 1.0 else "#dfe3e8"
        axes.plot([margin, right], [y + row_height / 2] * 2, color=line, linewidth=thick)
    for i, note in enumerate(notes):
        write(margin, y + row_height + 0.24 * i, note, fontsize=7.5, va="center", color="#667085")
    options: dict[str, Any] = {"dpi": 160, "format": "png", "metadata": {"Software": None}}
    return atomic_write(Path(path), lambda p: figure.savefig(p, **options))


def _colour(entry: Entry, header: bool) -> str:
    if header:
        return "#667085"
    if entry.good is not None:
        return GOOD if entry.good else BAD
    return "#14181f"
