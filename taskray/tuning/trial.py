"""One Ray Tune trial: a whole collective.

::

    Tune ──▶ trial (a process) ──train──▶ task actors, cache      all in the trial's
      ▲                                       │                   placement group
      └────────── tune.report ◀── listener ◀──┘

When Tune ends a trial it removes the placement group, which stops every process of the trial.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from taskray.errors import TaskrayError
from taskray.files import lock_folder
from taskray.job.config import Job
from taskray.loop.metric_key import TaskMetric
from taskray.record.folder import RESULT, read_metrics, read_result
from taskray.run.train import train
from taskray.tuning.runs import Run, RunState, run_state, value_of

PROGRESS_SECONDS = 5.0
"""Seconds between reports of progress: a trial waits for the driver at each report."""
INTERRUPTED = "interrupted"


class ToTune:
    """Passes a run's reports on to Tune, and stops the run once the file ``stop`` exists: the run
    then writes its checkpoints.

    With a ``metric``, every evaluation of it is reported once, as ``step`` and the metric; without
    one, the part of the run that is done.
    """

    def __init__(self, job: Job, stop: Path, metric: TaskMetric | None) -> None:
        self.job, self.stop, self.metric = job, stop, metric
        self.steps = dict.fromkeys(set(job.tasks) - job.frozen, 0)
        self.reported = 0
        self.last = time.monotonic()

    def __call__(self, task: str, step: int, values: Mapping[str, float]) -> None:
        if self.stop.exists():
            raise KeyboardInterrupt
        if task in self.steps:
            self.steps[task] = step
        if self.metric is not None:
            self.report_metric(task, step, values)
        elif time.monotonic() - self.last > PROGRESS_SECONDS:
            self.last = time.monotonic()
            tune.report({"done_part": self.done_part})

    def report_metric(self, task: str, step: int, values: Mapping[str, Any]) -> None:
        if self.metric is None or task != self.metric.task or step <= self.reported:
            return
        value = values.get(str(self.metric.reported))
        if value is not None and math.isfinite(value):
            self.reported = step
            tune.report({"step": step, str(self.metric): float(value), "done_part": self.done_part})

    @property
    def done_part(self) -> float:
        parts = [self.steps[name] / self.job.steps_of(name) for name in self.steps]
        return sum(parts) / max(1, len(parts))


def run_trial(run: Run, stop: Path, metric: TaskMetric | None = None, early: bool = True) -> None:
    """Do the rest of a run and report to Tune. Raises TaskrayError if the run fails.

    The evaluations of earlier attempts are reported again, so that the scheduler of a search that
    is started again takes the same decisions. ``early=False`` reports nothing before the end, so
    that no scheduler can stop the run. Two trials of the same point share a folder: the second
    waits until the first has ended.
    """
    # Another lock than that of ``train``, which raises where this one waits.
    with lock_folder(run.folder, "a run folder", wait=True, name=".trial.lock"):
        _run_trial(run, ToTune(run.job, stop, metric if early else None), metric, early)


def _run_trial(run: Run, listener: ToTune, metric: TaskMetric | None, early: bool) -> None:
    what = run_state(run)
    if metric is not None and early and what is not RunState.START_OVER:
        for line in read_metrics(run.folder):
            if "values" in line:
                listener.report_metric(line["task"], line["step"], line["values"])
    result = (
        (read_result(run.folder) or {}) if what is RunState.DONE else _train(run, what, listener)
    )
    if result.get("error"):
        raise TaskrayError(result["error"])
    final: dict[str, Any] = {"done_part": 1.0, "seconds": result.get("seconds")}
    if metric is not None:
        value = value_of(result, str(metric))
        if value is None or not math.isfinite(value):
            raise TaskrayError(f"{metric} has no finite value at the end")
        final |= {"step": run.job.steps_of(metric.task), str(metric): value}
    tune.report(final)


def _train(run: Run, what: RunState, listener: Callable[..., None]) -> dict[str, Any]:
    (run.folder / RESULT).unlink(missing_ok=True)  # outdated as soon as training starts
    try:
        return train(
            run.job,
            run.folder,
            resume="auto" if what is RunState.RESUME else "never",
            console=Console(file=StringIO(), quiet=True),
            listener=listener,
        )
    except KeyboardInterrupt:
        raise TaskrayError(INTERRUPTED) from None
