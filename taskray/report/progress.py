"""Progress of building a dataset: a bar on a terminal, elsewhere one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from taskray.report.console import print_plain


@contextmanager
def dataset_progress(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with (rows done, total rows). Prints nothing until it is called."""
    bar = Progress(
        TextColumn("building dataset [bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = None

    def show(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(name, total=total)
            if not console.is_terminal:
                print_plain(console, f"building dataset {name}: {total} rows")
        bar.update(task, completed=done)

    try:
        yield show
    finally:
        bar.stop()
