"""Progress of trials: one line for each that ends, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.text import Text

from taskray.data.storage.ray_data import application_error
from taskray.record.formatting import describe, duration
from taskray.report.console import print_plain

REFRESH_SECONDS = 0.5


@dataclass
class Trial:
    """What the driver knows of one trial. ``number``: its place in the order in which trials began.
    ``report``: its last report."""

    number: int
    title: str
    point: dict[str, Any]
    since: float
    report: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """One line, if it failed."""

    @property
    def done_part(self) -> float:
        """The part of it that is done, in [0, 1], by its last report."""
        return float(self.report.get("done_part") or 0.0)


class Progress(Callback):  # type: ignore[misc]
    """Tune's callback, and a context: on a terminal it draws a status line below the others.

    ``metric`` is the key of a search's metric, shown beside each trial. ``clock`` gives seconds.
    """

    def __init__(
        self,
        title_of: Callable[[dict[str, Any]], str],
        total: int,
        console: Console,
        metric: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title_of, self.total, self.console, self.metric = title_of, total, console, metric
        self.clock = clock
        self.began = self.drawn = clock()
        self.running: dict[str, Trial] = {}
        self.trials: list[Trial] = []
        """Those that have ended, in the order in which they did."""
        self.live: Live | None = None

    def __enter__(self) -> Progress:
        self.began = self.drawn = self.clock()
        if self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    # ---- Tune's calls ---------------------------------------------------------------------

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        if trial.trial_id in self.running:
            return
        number = len(self.trials) + len(self.running) + 1
        started = Trial(number, self.title_of(trial.config), dict(trial.config), self.clock())
        self.running[trial.trial_id] = started
        if not self.live:
            print_plain(self.console, f"[{started.number}/{self.total}] {started.title}: started")

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **_: Any
    ) -> None:
        if trial.trial_id in self.running:
            self.running[trial.trial_id].report = dict(result)

    def on_trial_complete(
        self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any
    ) -> None:
        self._end(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        self._end(trial.trial_id, _reason(trial))

    def on_step_end(self, iteration: int, trials: Sequence[Any], **_: Any) -> None:
        if self.live and self.clock() - self.drawn >= REFRESH_SECONDS:
            self.drawn = self.clock()
            self.live.update(self.status(), refresh=True)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its set-up, and a console cannot be pickled."""
        return {}

    # ---- output --------------------------------------------------------------------

    def status(self) -> Text:
        """The status line while trials run."""
        parts = [f"{r.title} {r.done_part * 100:.0f} %" for r in self.running.values()]
        parts += [f"{len(self.trials)} of {self.total} done", self.time_left()]
        return Text(" · ".join(filter(None, parts)), style="dim")

    def time_left(self) -> str:
        """``about 12 min left``, by the speed so far; empty until a trial has ended."""
        done = len(self.trials) + sum(r.done_part for r in self.running.values())
        if not self.trials or done >= self.total:
            return ""
        seconds = (self.clock() - self.began) * (self.total - done) / done
        return f"about {duration(seconds)} left"

    def _end(self, trial_id: str, error: str | None) -> None:
        trial = self.running.pop(trial_id, None)
        if trial is None:
            return
        trial.error = error
        self.trials.append(trial)
        parts = [duration(self.clock() - trial.since)]
        value = trial.report.get(self.metric) if self.metric else None
        if self.metric and value is not None:
            parts.append(f"{self.metric} {describe(self.metric).format(value)}")
        if error is None and trial.done_part < 1:
            parts.append(f"stopped early at step {trial.report.get('step', 0)}")
        parts += [error or "", self.time_left()]
        text = " · ".join(filter(None, parts))
        print_plain(self.console, f"[{len(self.trials)}/{self.total}] {trial.title}: {text}")


def _reason(trial: Any) -> str:
    """Why one of Tune's trials failed, in one line."""
    file = trial.pickled_error_file
    try:
        error = cloudpickle.loads(Path(file).read_bytes()) if file else None
    except Exception:  # unpickling an exception class of a user's may raise anything
        error = None
    if error is None:
        return "failed"
    cause = application_error(error)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1]
