"""Progress of a run: a live table on a terminal, elsewhere a line every ten seconds.

The driver draws it when reports arrive, at most twice a second and without another thread, so
that it takes no CPU time from training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, JustifyMethod
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from taskray.loop.metric_key import (
    STEPS_PER_SECOND,
    ConsistencyLoss,
    HitRate,
    MetricKey,
    Plain,
    Staleness,
    SupervisedLoss,
    parse,
)
from taskray.record.formatting import NOTHING, duration
from taskray.report.console import print_plain

SPEED = Plain(STEPS_PER_SECOND)
REFRESH_SECONDS = 0.5
PLAIN_SECONDS = 10.0
WIDE, NARROW = 124, 76
"""Terminals narrower than WIDE get short headings and no progress bars; those narrower than NARROW
only steps, loss and time."""
TITLES = {
    "task": ("task", "task"),
    "bar": ("", ""),
    "steps": ("steps", "steps"),
    "rate": ("steps/s", "/s"),
    "loss": ("supervised", "loss"),
    "consistency": ("consistency", "cons."),
    "staleness": ("staleness", "stale"),
    "hits": ("hits", "hits"),
    "restarts": ("restarts", "restarts"),
    "left": ("left", "left"),
}
"""The columns in order, with their headings on wide and on other terminals."""
LEFT = ("task", "bar", "staleness")
"""Columns that are left-aligned."""


@dataclass
class Progress:
    """The last step of one task, and the last value of everything that it reported."""

    total: int
    step: int = 0
    restarts: int = 0
    values: dict[str, float] = field(default_factory=dict)

    @property
    def consistency(self) -> float | None:
        return self.get(ConsistencyLoss())

    @property
    def seconds_left(self) -> float | None:
        rate = self.get(SPEED)
        return (self.total - self.step) / rate if rate else None

    def edges(self) -> list[str]:
        """The peers whose predictions this task uses."""
        keys = map(parse, self.values)
        peers = (key.peer for key in keys if isinstance(key, (Staleness, HitRate)))
        return list(dict.fromkeys(peers))

    def get(self, key: MetricKey) -> float | None:
        """The last value of a metric; None before the first report of it."""
        return self.values.get(str(key))


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
        """The table of the last reports, with the columns that the terminal has room for."""
        wide = self.console.width >= WIDE
        table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        table.collapse_padding = not wide
        elapsed = duration(self._clock() - self._start)
        table.title = f"{self.title}  ·  {elapsed}" if self.title else elapsed
        shown = self._columns()
        for column in shown:
            style = "bold" if column == "task" else None
            justify: JustifyMethod = "left" if column in LEFT else "right"
            table.add_column(TITLES[column][not wide], justify=justify, style=style, no_wrap=True)
        for name, progress in self.tasks.items():
            cells = _cells(name, progress)
            table.add_row(*(cells[column] for column in shown))
        return table

    def _columns(self) -> list[str]:
        if self.console.width >= WIDE:
            return list(TITLES)
        if self.console.width < NARROW:
            return ["task", "steps", "loss", "left"]
        restarted = any(progress.restarts for progress in self.tasks.values())
        left_out = {"bar"} if restarted else {"bar", "restarts"}
        return [column for column in TITLES if column not in left_out]

    def _line(self) -> None:
        parts = []
        for name, p in self.tasks.items():
            part = f"{name} {p.step}/{p.total}"
            rate, loss = p.get(SPEED), p.get(SupervisedLoss())
            part += f" {rate:.1f}/s" if rate is not None else ""
            part += f" loss {loss:.4f}" if loss is not None else ""
            part += f" consistency {p.consistency:.4f}" if p.consistency is not None else ""
            parts.append(part)
        stamp = duration(self._clock() - self._start)
        print_plain(self.console, f"[{stamp}] {' · '.join(parts)}")


def _cells(name: str, progress: Progress) -> dict[str, str | Text | ProgressBar]:
    """The cells of a task's row, by column."""
    total, step = progress.total, progress.step
    hits = [_percent(progress.get(HitRate(peer))) for peer in progress.edges()]
    left = "done" if step >= total else duration(progress.seconds_left)
    return {
        "task": Text(name),
        "bar": ProgressBar(
            max(total, 1), step, width=16, complete_style="cyan", finished_style="green"
        ),
        "steps": f"{step}/{total}",
        "rate": _number(progress.get(SPEED), 1),
        "loss": _number(progress.get(SupervisedLoss()), 4),
        "consistency": _number(progress.consistency, 4),
        "staleness": Text("\n".join(_staleness(progress, p) for p in progress.edges()) or NOTHING),
        "hits": "\n".join(hits) or NOTHING,
        "restarts": Text(str(progress.restarts), "red" if progress.restarts else "dim"),
        "left": left if total else "frozen",
    }


def _number(value: float | None, decimals: int) -> str:
    return NOTHING if value is None else f"{value:.{decimals}f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 100:.0f} %"


def _staleness(progress: Progress, peer: str) -> str:
    """``normals 31/75``: mean and largest staleness, in steps of the producer."""
    mean = progress.get(Staleness(peer, "steps_mean"))
    largest = progress.get(Staleness(peer, "steps_max"))
    return f"{peer} {_number(mean, 0)}/{_number(largest, 0)}"
