"""The trials of a search as a table: values, metric and status of each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from taskray.files import plain, write_text
from taskray.record.folder import read_result
from taskray.record.formatting import NOTHING, describe, duration
from taskray.report.console import print_table
from taskray.report.render import markdown_table
from taskray.report.tables import Table, heading_of, study_table, to_json
from taskray.tuning.record import record
from taskray.tuning.runs import Run, value_of
from taskray.tuning.settings import SpaceConfig

if TYPE_CHECKING:
    from taskray.tuning.progress import Trial

NOTE = "One seed for each trial: differences below the spread over seeds mean nothing"


@dataclass(frozen=True)
class TrialRow:
    """One trial. ``point``: the values that the search chose, empty for the job's own values.
    ``values``: those of all searched fields. ``value``: the last value of the metric."""

    title: str
    folder: Path
    point: Mapping[str, Any]
    values: Mapping[str, Any]
    value: float | None
    step: int
    seconds: float | None
    error: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    finished: bool = False

    @property
    def status(self) -> str:
        if self.error:
            return f"failed: {self.error}"
        return "finished" if self.finished else "stopped early"


def rows_of(
    run_of: Callable[[Mapping[str, Any]], Run],
    config: SpaceConfig,
    own: Mapping[str, Any],
    default: Trial,
    trials: Sequence[Trial],
) -> list[TrialRow]:
    """The rows of the default trial, then of the others in the order given."""
    rows = []
    for trial in (default, *trials):
        point = trial.point if trial is not default else {}
        run = run_of(point)
        finished = trial.error is None and trial.done_part >= 1
        result = (read_result(run.folder) or {}) if finished else {}
        rows.append(
            TrialRow(
                run.title,
                run.folder,
                point,
                {**own, **point},
                trial.report.get(config.metric),
                int(trial.report.get("step") or 0),
                trial.report.get("seconds"),
                trial.error,
                {key: value_of(result, key) for key in config.metrics},
                finished,
            )
        )
    return rows


def write_trials(
    rows: Sequence[TrialRow], config: SpaceConfig, names: Mapping[str, str], folder: Path
) -> Table:
    """Write ``trials.md``, ``trials.csv``, ``trials.json`` and the ``table.json`` of the report."""
    keys = [config.metric, *config.metrics]
    header = ["trial", *names.values(), *keys, "step", "seconds", "status"]
    lines = [
        [
            row.folder.name,
            *(row.values[path] for path in names),
            row.value,
            *(row.metrics[key] for key in config.metrics),
            row.step,
            row.seconds,
            row.status,
        ]
        for row in rows
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([header, *([_plain(v) for v in line] for line in lines)])
    write_text(folder / "trials.csv", out.getvalue())
    content = [
        {
            "trial": row.folder.name,
            "parameters": dict(row.values),
            "metrics": {config.metric: row.value, **row.metrics},
            "step": row.step,
            "seconds": row.seconds,
            "status": row.status,
        }
        for row in rows
    ]
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / "trials.json", text + "\n")
    markdown = markdown_table(_grid(rows, config, names))
    write_text(folder / "trials.md", "\n".join([*markdown, "", f"{NOTE}.", ""]))
    table = _table(rows, config)
    write_text(folder / "table.json", to_json(table))
    return table


def show(
    rows: Sequence[TrialRow],
    best: TrialRow,
    config: SpaceConfig,
    names: Mapping[str, str],
    console: Console,
) -> None:
    """Print the trials, the best one bold."""
    header, *lines = _grid(rows, config, names)
    table = rich.table.Table(title=config.name, title_justify="left", box=box.SIMPLE_HEAD)
    for number, title in enumerate(header):
        table.add_column(Text(title), justify="left" if number == 0 else "right")
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*map(Text, line), style="bold" if row is best else "")
    print_table(console, table)
    console.print(f"{NOTE}.", style="dim")


def record_search(
    folder: Path,
    config: SpaceConfig,
    table: Table,
    rows: Sequence[TrialRow],
    command: str,
    best: TrialRow,
    source: Path,
) -> Path:
    """Record the search, see :func:`taskray.tuning.record.record`."""
    results = [result for row in rows if (result := read_result(row.folder)) is not None]
    facts = {
        "command": command,
        "seeds": [config.seed],
        "best": dict(best.point) or "the job's own values",
        "trials": {status: sum(row.status.split(":")[0] == status for row in rows)
                   for status in ("finished", "stopped early", "failed")},
    }  # fmt: skip
    return record(folder, config.name, config.description, table, facts, results, source)


def _grid(
    rows: Sequence[TrialRow], config: SpaceConfig, names: Mapping[str, str]
) -> list[list[str]]:
    keys = [config.metric, *config.metrics]
    header = ["", *names.values(), *(heading_of(k).replace(" · ", "\n") for k in keys)]
    lines = [[*header, "steps", "time", "ended"]]
    for row in rows:
        lines.append(
            [
                row.folder.name if not row.point else "",
                *(_short(row.values[path]) for path in names),
                describe(config.metric).format(row.value),
                *(describe(key).format(row.metrics[key]) for key in config.metrics),
                str(row.step),
                duration(row.seconds),
                row.status,
            ]
        )
    return lines


def _table(rows: Sequence[TrialRow], config: SpaceConfig) -> Table:
    """The finished trials as a table for the report."""
    results = {
        row.folder.name: {config.metric: row.value, **row.metrics} for row in rows if row.finished
    }
    return study_table(
        config.name,
        results,
        metrics=[config.metric, *config.metrics],
        labels={row.folder.name: row.title for row in rows},
        notes=[NOTE],
    )


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else "" if value is None else value


def _short(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
