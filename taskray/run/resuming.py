"""Whether a run folder contains a run of the same job, so that a run may continue from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from taskray.errors import InputError
from taskray.job.config import Job, parse_job
from taskray.job.yaml_values import load_yaml
from taskray.record.folder import CONFIG
from taskray.runtime.checkpoints import CheckpointStore


def check_same_job(job: Job, folder: Path, checkpoints: str) -> None:
    """Raise InputError where the run would continue from checkpoints of another job, whose results
    would be reported as this job's. The error names the first key that differs.

    ``steps`` may grow, and the settings that :func:`essence` leaves out may change. A folder
    without checkpoints accepts any job. A separate checkpoint folder (``checkpoint.path``)
    contains a copy of its job.
    """
    store = CheckpointStore(checkpoints)
    places: list[tuple[str | Path, str, dict[str, Any] | None]]
    places = [(folder, "--out", saved_config(folder))]
    if job.checkpoint.path and (text := store.read_job()):
        places.append((checkpoints, "checkpoint.path", parsed_config(text, checkpoints)))
    now = _needed_to_continue(job.model_dump(mode="json"))
    for place, other, before in places:
        if before is None:
            continue
        names = dict.fromkeys([*job.tasks, *(before.get("tasks") or {})])
        last_step = {name: steps[-1] for name in names if (steps := store.steps(name))}
        if not last_step:
            continue
        key = difference(_needed_to_continue(before), now)
        shared = [name for name in last_step if name in job.tasks]
        too_far = [f"tasks.{n}.steps" for n in shared if last_step[n] > job.steps_of(n)]
        if key or too_far:
            raise InputError(
                str(place),
                f"is of another job ({key or too_far[0]} differs): give another {other}, or "
                "--resume never",
            )


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The ``config.yaml`` of a run folder as plain values; None where it cannot be read.

    A setting that did not exist when the run was made has its default value.
    """
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return parsed_config(text, str(folder / CONFIG))


def parsed_config(text: str, source: str) -> dict[str, Any] | None:
    """The text of a ``config.yaml`` as plain values; None where it is no mapping."""
    try:
        values = load_yaml(text)
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict):
        return None
    try:
        return parse_job(values, source).model_dump(mode="json")
    except InputError:  # no longer a valid job: its values differ from those of any valid job
        return values


def essence(values: Mapping[str, Any]) -> dict[str, Any]:
    """A job's plain values without the settings that do not change its training."""
    ignored = ("name", "description", "evaluation", "checkpoint")
    kept = {k: v for k, v in values.items() if k not in ignored}
    runtime = kept.get("runtime") or {}
    kept["runtime"] = {k: v for k, v in runtime.items() if k != "address"}
    kept["tasks"] = {
        name: {k: v for k, v in task.items() if k not in ("threads", "cpus")}
        for name, task in (kept.get("tasks") or {}).items()
    }
    # datasets that only evaluations use do not change the training
    used = {name for task in kept["tasks"].values() for name in _datasets(task.get("dedicated"))}
    used.add((kept.get("mediator") or {}).get("data") or "")
    kept["data"] = {n: d for n, d in (kept.get("data") or {}).items() if n in used}
    return kept


def _datasets(dedicated: str | Mapping[str, str] | None) -> Collection[str]:
    """The names under ``tasks.X.dedicated``."""
    if isinstance(dedicated, Mapping):
        return dedicated.values()
    return [dedicated] if dedicated else []


def _needed_to_continue(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that must be the same for a run to continue: unlike :func:`essence` without the
    numbers of steps, because a person may train a run for longer."""
    kept = essence(values)
    kept["runtime"] = {"publisher": kept["runtime"].get("publisher")}
    kept.pop("steps", None)
    for task in kept["tasks"].values():
        for name in ("steps", "gpus"):
            task.pop(name, None)
    return kept


def difference(before: Any, now: Any) -> str | None:
    """The dotted path of the first value in which two jobs differ; None where they are equal.
    A missing key equals null."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return None if before == now else ""
    for key in dict.fromkeys([*now, *before]):
        inner = difference(before.get(key), now.get(key))
        if inner is not None:
            return f"{key}.{inner}" if inner else str(key)
    return None
