"""The content of ``result.json``, made from the driver's state of each task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from taskray.errors import TaskrayError, TrainingError
from taskray.job.config import Job
from taskray.loop.evaluation import Evaluation
from taskray.loop.meters import Totals
from taskray.loop.metric_key import edge_name
from taskray.loop.report import ChunkReport


@dataclass
class TaskState:
    """The driver's state of one task: its last report, its error, its evaluations."""

    step: int = 0
    restarts: int = 0
    report: ChunkReport | None = None
    error: TaskrayError | None = None
    traceback: str = ""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def failed_at_once(self) -> bool:
        """Whether the task failed before it made a step."""
        made = self.error.step if isinstance(self.error, TrainingError) else self.step
        return self.error is not None and made == 0 and self.report is None


def ends_run(job: Job, states: dict[str, TaskState]) -> str | None:
    """Why the run ends although tasks could train on, in one line; None: it does not. What a job
    has of a task that fails before its first step cannot work, and is to be found at once."""
    failed = [name for name, state in states.items() if state.failed_at_once]
    if not failed or job.runtime.on_failure == "continue":
        return None
    return (
        f"the run ends, because task {failed[0]!r} failed before its first step; "
        "with runtime.on_failure: continue the others train on"
    )


def summarize(
    job: Job, states: dict[str, TaskState], cache: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The content of ``result.json``, from the last report of each task."""
    failed = [s.error for s in states.values() if s.error is not None]
    complete = all(
        s.step >= job.steps_of(n) and s.evaluations.keys() >= job.evaluation.data.keys()
        for n, s in states.items()
    )
    staleness = {}
    for name, state in states.items():
        for peer, edge in state.report.totals.edges.items() if state.report else ():
            more = {"bound": edge.bound, "misses": edge.misses}
            staleness[edge_name(name, peer)] = {**edge.summary(), **more}
    return {
        "name": job.name,
        "status": "failed" if failed else "finished" if complete else "interrupted",
        "error": str(failed[0]) if failed else None,
        "seconds": round(seconds, 2),
        "tasks": {n: _task_summary(job, s) for n, s in states.items()},
        "staleness": staleness,
        "cache": cache,
    }


def _task_summary(job: Job, state: TaskState) -> dict[str, Any]:
    totals = state.report.totals if state.report else Totals()
    seconds = totals.train_seconds
    main = next(iter(job.evaluation.data), None)
    evaluations = {title: e.metrics for title, e in state.evaluations.items()}
    return {
        "steps": state.step,
        "supervised_steps": totals.supervised_steps,
        "consistency_steps": totals.consistency_steps,
        "skipped_consistency_steps": totals.skipped_consistency_steps,
        "replaced_by_supervised": totals.replaced_by_supervised,
        "restarts": state.restarts,
        "steps_per_second": round(state.step / seconds, 3) if seconds else 0.0,
        "data_wait_fraction": round(totals.wait_seconds / seconds, 5) if seconds else 0.0,
        "corrupt_rows": state.report.corrupt_rows if state.report else 0,
        "misses": totals.misses,
        "error": str(state.error) if state.error else None,
        "metrics": evaluations.get(main, {}) if main else {},
        "evaluations": evaluations,
        "constant": {title: e.constant for title, e in state.evaluations.items() if e.constant},
    }
