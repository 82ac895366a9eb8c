"""Progress of a run: a live table on a terminal, elsewhere a line every ten seconds.

The driver draws it when reports arrive, at most twice a second and without another thread, so
that it takes no CPU time from training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from taskray.record.formatting import NOTHING, duration
from taskray.report.console import print_plain

REFRESH_SECONDS = 0.5
PLAIN_SECONDS = 10.0
WIDE = 116
"""Narrower terminals get short headings, and no progress bars."""


@dataclass
class Progress:
    """The last step of one task, and the last value of everything that it reported."""

    total: int
    step: int = 0
    restarts: int = 0
    values: dict[str, float] = field(default_factory=dict)

    @property
    def consistency(self) -> float | None:
        return self.values.get("loss/consistency")

    @property
    def seconds_left(self) -> float | None:
        rate = self.values.get("steps_per_second", 0.0)
        return (self.total - self.step) / rate if rate > 0 else None

    def edges(self) -> list[str]:
        """The peers whose predictions this task uses."""
        keys = [k.split("/") for k in self.values if k.startswith(("staleness/", "hit_rate/"))]
        return list(dict.fromkeys(parts[1] for parts in keys if len(parts) > 1))


class Live:
    """``with Live({"depth": 1000}, "depth_normals") as live: live.update(...); live.event(...)``.

    ``clock`` gives seconds; tests replace it.
    """

    def __init__(
        self,
        total_steps: Mapping[str, int],
        title: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.console = console or Console()
        self.tasks = {name: Progress(total) for name, total in total_steps.items()}
        self._clock = clock
        self._start = clock()
        self._drawn = self._start
        self._live: RichLive | None = None

    def __enter__(self) -> Live:
        self._start = self._drawn = self._clock()
        if self.console.is_terminal:
            self._live = RichLive(self.render(), console=self.console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.update(self.render(), refresh=True)
            self._live.stop()
            self._live = None
        else:
            self._line()

    def update(
        self, task: str, step: int, values: Mapping[str, float | None], restarts: int = 0
    ) -> None:
        """Take a task's report, and draw if the last drawing is old enough. Values that are not in
        the report keep their last value."""
        progress = self.tasks.setdefault(task, Progress(step))
        progress.step, progress.restarts = step, restarts
        progress.values.update({k: v for k, v in values.items() if v is not None})
        now = self._clock()
        if self._live and now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._live.update(self.render(), refresh=True)
        elif not self._live and now - self._drawn >= PLAIN_SECONDS:
            self._drawn = now
            self._line()

    def event(self, text: str) -> None:
        """Print an event above the table at once."""
        stamp = duration(self._clock() - self._start)
        if self._live:
            self.console.print(Text.assemble((f"{stamp:>12}  ", "dim"), (text, "yellow")))
        else:
            print_plain(self.console, f"[{stamp}] {text}")

    def render(self) -> Table:
        """The table of the last reports."""
        wide = self.console.width >= WIDE
        table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        table.collapse_padding = not wide
        elapsed = duration(self._clock() - self._start)
        table.title = f"{self.title}  ·  {elapsed}" if self.title else elapsed
        table.add_column("task", style="bold", no_wrap=True)
        if wide:
            table.add_column("", width=16)
        losses = ("supervised", "consistency") if wide else ("loss", "cons.")
        for title in ("steps", "steps/s" if wide else "/s", *losses):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("staleness" if wide else "stale", no_wrap=True)
        table.add_column("hits", justify="right", no_wrap=True)
        if wide or any(p.restarts for p in self.tasks.values()):
            table.add_column("restarts", justify="right")
        table.add_column("left", justify="right", no_wrap=True)
        for name, p in self.tasks.items():
            table.add_row(*self._cells(name, p, wide, len(table.columns)))
        return table

    def _cells(
        self, name: str, p: Progress, wide: bool, num_columns: int
    ) -> list[str | Text | ProgressBar]:
        bar = ProgressBar(
            max(p.total, 1), p.step, width=16, complete_style="cyan", finished_style="green"
        )
        left = "done" if p.step >= p.total else duration(p.seconds_left)
        left = left if p.total else "frozen"
        cells: list[str | Text | ProgressBar] = [
            Text(name),
            *([bar] if wide else []),
            f"{p.step}/{p.total}",
            _number(p.values.get("steps_per_second"), 1),
            _number(p.values.get("loss/supervised"), 4),
            _number(p.consistency, 4),
            Text("\n".join(_staleness(p, peer) for peer in p.edges()) or NOTHING),
            "\n".join(_percent(p.values.get(f"hit_rate/{peer}")) for peer in p.edges()) or NOTHING,
            left,
        ]
        if len(cells) < num_columns:
            restarts = Text(str(p.restarts), "red" if p.restarts else "dim")
            cells.insert(len(cells) - 1, restarts)
        return cells

    def _line(self) -> None:
        parts = []
        for name, p in self.tasks.items():
            part = f"{name} {p.step}/{p.total}"
            rate, loss = p.values.get("steps_per_second"), p.values.get("loss/supervised")
            part += f" {rate:.1f}/s" if rate is not None else ""
            part += f" loss {loss:.4f}" if loss is not None else ""
            part += f" consistency {p.consistency:.4f}" if p.consistency is not None else ""
            parts.append(part)
        stamp = duration(self._clock() - self._start)
        print_plain(self.console, f"[{stamp}] {' · '.join(parts)}")


def _number(value: float | None, decimals: int) -> str:
    return NOTHING if value is None else f"{value:.{decimals}f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 100:.0f} %"


def _staleness(progress: Progress, peer: str) -> str:
    """``normals 31/75``: mean and largest staleness, in steps of the producer."""
    mean = progress.values.get(f"staleness/{peer}/steps_mean")
    largest = progress.values.get(f"staleness/{peer}/steps_max")
    return f"{peer} {_number(mean, 0)}/{_number(largest, 0)}"
