"""Printing a line of text or a table for a person."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table

NARROWEST = 4
"""Characters to which a column of a table is folded at most."""
BETWEEN = 3
"""Characters between two columns, at most."""


def print_plain(console: Console, text: str) -> None:
    """Print a text as it is: brackets in a path are no markup, and long lines are not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


def print_table(console: Console, table: Table) -> None:
    """Print a table of which nothing is cut off: on a narrow terminal its cells are folded, and
    where the columns do not fit even then, its lines are longer than the terminal. A column that
    was added with ``no_wrap`` is folded only where it must be."""
    wide = console.options.update(width=10_000)
    whole, least = [], []
    for column in table.columns:
        cells = [Measurement.get(console, wide, c).maximum for c in (column.header, *column.cells)]
        least.append(min(NARROWEST, max(cells)))
        whole.append(max(cells) if column.no_wrap else least[-1])
        column.overflow, column.no_wrap = "fold", False
    between = BETWEEN * len(table.columns)
    widths = whole if sum(whole) + between <= console.width else least
    for column, width in zip(table.columns, widths, strict=True):
        column.min_width = width
    needed = sum(widths) + between
    if needed <= console.width:
        console.print(table)
        return
    lines = console.render_lines(table, console.options.update(width=needed), pad=False)
    segments = [segment for line in lines for segment in (*line, Segment.line())]
    console.print(Segments(segments), soft_wrap=True, end="")
