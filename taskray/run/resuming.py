"""Whether what a run folder holds is a run of this very job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from taskray.errors import InputError
from taskray.job.config import Job, parse_job
from taskray.record.folder import CONFIG
from taskray.runtime.checkpoints import CheckpointStore


def check_same_job(job: Job, folder: Path, checkpoints: str) -> None:
    """A run goes on from its own checkpoints only: those of another job would be reported as
    this one's. InputError names the key in which the two differ.

    ``steps`` may grow, and where and how it runs may change, besides what :func:`essence` leaves
    out. Where there is no checkpoint is nothing to go on from, so any job may begin there.
    Checkpoints that are kept apart say themselves of which job they are.
    """
    store = CheckpointStore(checkpoints)
    places: list[tuple[str | Path, str, dict[str, Any] | None]]
    places = [(folder, "--out", saved_config(folder))]
    if job.checkpoint.path and (text := store.read_job()):
        places.append((checkpoints, "checkpoint.path", parsed_config(text, checkpoints)))
    now = _to_go_on(job.model_dump(mode="json"))
    for place, other, before in places:
        if before is None:
            continue
        names = dict.fromkeys([*job.tasks, *(before.get("tasks") or {})])
        came_to = {name: steps[-1] for name in names if (steps := store.steps(name))}
        if not came_to:
            continue
        key = difference(_to_go_on(before), now)
        own = [name for name in came_to if name in job.tasks]
        too_far = [f"tasks.{n}.steps" for n in own if came_to[n] > job.steps_of(n)]
        if key or too_far:
            raise InputError(
                f"{place} holds a run of another job ({key or too_far[0]} differs): "
                f"another {other}, or --resume never"
            )


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The ``config.yaml`` of a run folder as plain values; None where it has none to read.

    A setting that is newer than the run has its default there.
    """
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return parsed_config(text, str(folder / CONFIG))


def parsed_config(text: str, source: str) -> dict[str, Any] | None:
    """The text of a ``config.yaml`` as plain values; None where it holds none."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict):
        return None
    try:
        return parse_job(values, source).model_dump(mode="json")
    except InputError:  # what no longer is a job differs from every job, by its own values
        return values


def essence(values: Mapping[str, Any]) -> dict[str, Any]:
    """A job's plain values without what leaves its training as it is."""
    beside = ("name", "description", "evaluation", "checkpoint")
    kept = {k: v for k, v in values.items() if k not in beside}
    runtime = kept.get("runtime") or {}
    kept["runtime"] = {k: v for k, v in runtime.items() if k != "address"}
    kept["tasks"] = {
        name: {k: v for k, v in task.items() if k not in ("threads", "cpus")}
        for name, task in (kept.get("tasks") or {}).items()
    }
    # datasets that only evaluations use may come and go
    used = {task.get("dedicated") for task in kept["tasks"].values()}
    used.add((kept.get("mediator") or {}).get("data"))
    kept["data"] = {n: d for n, d in (kept.get("data") or {}).items() if n in used}
    return kept


def _to_go_on(values: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in a run that goes on: a person may let it train for longer."""
    kept = essence(values)
    kept["runtime"] = {"publisher": kept["runtime"].get("publisher")}
    kept.pop("steps", None)
    for task in kept["tasks"].values():
        for name in ("steps", "gpus"):
            task.pop(name, None)
    return kept


def difference(before: Any, now: Any) -> str | None:
    """The dotted path of the first value in which two jobs differ; None where they are the same.
    What is absent in one of them is as null there."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return None if before == now else ""
    for key in dict.fromkeys([*now, *before]):
        inner = difference(before.get(key), now.get(key))
        if inner is not None:
            return f"{key}.{inner}" if inner else str(key)
    return None
