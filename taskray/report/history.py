"""A run folder as the report reads it, finished or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from taskray.errors import InputError
from taskray.files import read_text
from taskray.loop.metric_key import Evaluated, MetricKey, parse
from taskray.record.folder import CONFIG, read_metrics, read_panels, read_result

MEASURED, CONSTANT = "evaluations", "constant"
"""Parts of a task's result: the evaluations of its network, and of its constant predictor."""


@dataclass(frozen=True)
class Series:
    """One value of one task over time: three lists of equal length, steps increasing."""

    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.values)


class Run:
    """A run folder, read once. Any file may be missing.

    Raises InputError for a folder that contains none of a run's files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(str(path), "no such folder")
        self.lines = read_metrics(self.path)
        self.finished = read_result(self.path)
        self.result: dict[str, Any] = self.finished or {}
        config = self.path / CONFIG
        self.config_text = read_text(config) if config.exists() else ""
        if not (self.lines or self.result or self.config_text):
            raise InputError(
                str(path), "not a run folder: expected config.yaml, metrics.jsonl or result.json"
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self.config_text)
        except yaml.YAMLError:
            return {}
        return values if isinstance(values, dict) else {}

    @cached_property
    def panels(self) -> dict[str, np.ndarray]:
        return read_panels(self.path)

    @property
    def name(self) -> str:
        return str(self.result.get("name") or self.config.get("name") or self.path.name)

    @property
    def status(self) -> str:
        return str(self.result.get("status", "finished")) if self.finished else "unfinished"

    @property
    def seconds(self) -> float | None:
        times = [line["time"] for line in self.lines if line.get("time") is not None]
        seconds = self.result.get("seconds", max(times, default=None))
        return None if seconds is None else float(seconds)

    @property
    def tasks(self) -> list[str]:
        named = [*(self.config.get("tasks") or {}), *(self.result.get("tasks") or {})]
        logged = [line["task"] for line in self.lines if "values" in line and "task" in line]
        return list(dict.fromkeys([*named, *logged]))

    @property
    def uses_consistency(self) -> bool:
        """Whether the job has a relation with a weight above 0 and consistency steps."""
        mediator = self.config.get("mediator") or {}
        relations = self.config.get("consistency") or {}
        active = any((r or {}).get("weight", 1.0) > 0 for r in relations.values())
        return bool(mediator) and mediator.get("consistency_steps", 1) > 0 and active

    def task_result(self, task: str) -> dict[str, Any]:
        return dict((self.result.get("tasks") or {}).get(task) or {})

    def keys(self, task: str) -> list[MetricKey]:
        """The logged values of a task, in order of appearance."""
        values = [line["values"] for line in self.lines if _reports(line, task)]
        return [parse(name) for name in dict.fromkeys(name for v in values for name in v)]

    def series(self, task: str, key: MetricKey) -> Series:
        """One value over time. A restarted task repeats the steps since its last checkpoint: only
        the last value of each step counts."""
        series, name = Series(), str(key)
        for line in self.lines:
            if not _reports(line, task):
                continue
            value = line["values"].get(name)
            if value is None:
                continue
            step = int(line["step"])
            while series.steps and series.steps[-1] >= step:
                for values in (series.steps, series.times, series.values):
                    values.pop()
            series.steps.append(step)
            series.times.append(float(line["time"]))
            series.values.append(float(value))
        return series

    @property
    def events(self) -> list[dict[str, Any]]:
        """Event lines in order, then those that are only in the result."""
        logged = [line for line in self.lines if "event" in line]
        known = {line["event"] for line in logged}
        for event in self.result.get("events") or []:
            line = event if isinstance(event, dict) else {"event": str(event)}
            if line.get("event") not in known:
                logged.append(line)
        return logged

    def evaluations(self, task: str) -> dict[str, dict[str, float | None]]:
        """Evaluation title -> metric -> value: the result's, or the last ones logged."""
        return evaluations_of(self.task_result(task)) or self._logged_evaluations(task)

    def _logged_evaluations(self, task: str) -> dict[str, dict[str, float | None]]:
        found: dict[str, dict[str, float | None]] = {}
        for key in self.keys(task):
            if isinstance(key, Evaluated) and (series := self.series(task, key)):
                found.setdefault(key.title, {})[key.metric] = series.values[-1]
        return found

    def as_result(self) -> dict[str, Any]:
        """The known part of the result, in the shape of ``result.json``."""
        tasks = {t: {**self.task_result(t), "evaluations": self.evaluations(t)} for t in self.tasks}
        return {**self.result, "name": self.name, "tasks": tasks}


def evaluations_of(
    task_result: Mapping[str, Any], of: str = MEASURED
) -> dict[str, dict[str, float | None]]:
    """All evaluations in one task's part of a result, of its network or of its constant predictor;
    older results only have ``metrics``."""
    evaluations = task_result.get(of)
    if evaluations or of == CONSTANT:
        return {str(title): dict(values) for title, values in (evaluations or {}).items()}
    metrics = task_result.get("metrics")
    return {"evaluation": dict(metrics)} if metrics else {}


def _reports(line: dict[str, Any], task: str) -> bool:
    return (
        line.get("task") == task
        and isinstance(line.get("values"), dict)
        and line.get("step") is not None
        and line.get("time") is not None
    )
