"""The run folder: the files that a run writes, readable after a crash at any moment.

::

    config.yaml      the resolved job, loadable by ``taskray train``
    metrics.jsonl    one line for each report and each event; names: ``loop.metric_key``
    tensorboard/     the same scalars as event files, one folder for each task
    panels.npz       a few images with truth and prediction
    labels/          which row of a dataset keeps which label, if the job splits them
    errors.log       tracebacks of the tasks that failed; absent if none did
    result.json      written last
    .lock            locked while a process writes here; see :func:`taskray.files.lock_folder`
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import BaseModel

from taskray.errors import InputError, TaskrayError, naming_system_errors, one_line
from taskray.files import (
    atomic_write,
    encode,
    make_folder,
    plain,
    read_json,
    write_json,
    write_text,
)
from taskray.job.config import dump_yaml

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG, METRICS, RESULT, PANELS = "config.yaml", "metrics.jsonl", "result.json", "panels.npz"
ERRORS, TENSORBOARD, LABELS = "errors.log", "tensorboard", "labels"


class RunFolder:
    """Writes one run's folder. An existing folder is continued.

    ``elapsed`` is the time of the last line already in it (0 in a new folder): a resumed run
    adds it to its own clock, so that time never runs backwards. ``tensorboard=False`` writes no
    event files.
    """

    def __init__(self, path: str | Path, tensorboard: bool = True) -> None:
        self.path = Path(path)
        make_folder(self.path, "a run folder")
        self._metrics = self.path / METRICS
        self.elapsed = self._repair()
        self._file: IO[bytes] | None = None
        self._tensorboard = tensorboard
        self._writers: dict[str, SummaryWriter] = {}

    def _repair(self) -> float:
        """Cut off a last line that a crash left unfinished; returns the latest time in the file."""
        if self._metrics.exists():
            content = self._metrics.read_bytes()
            complete = content.rfind(b"\n") + 1
            if complete < len(content):
                os.truncate(self._metrics, complete)
        lines = read_metrics(self._metrics)
        times = (line.get("time") for line in lines)
        return max((float(t) for t in times if isinstance(t, (int, float))), default=0.0)

    def write_config(self, job: BaseModel | Mapping[str, Any]) -> None:
        """Write ``config.yaml`` from a job (or from plain values)."""
        if isinstance(job, BaseModel):
            text = dump_yaml(job)
        else:
            text = yaml.safe_dump(dict(job), sort_keys=False)
        write_text(self.path / CONFIG, text)

    def log(self, task: str, step: int, time: float, values: Mapping[str, float | None]) -> None:
        """Write one report of a task: ``values`` at its ``step``, ``time`` seconds into the run.

        Values that are None or not finite become null, and are left out of TensorBoard.
        """
        self._append({"task": task, "step": step, "time": round(time, 3), "values": plain(values)})
        if not self._tensorboard:
            return
        with naming_system_errors(str(self.path / TENSORBOARD)):
            writer = self._writer(task)
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    writer.add_scalar(name, value, step)

    def event(
        self, text: str, time: float, task: str | None = None, step: int | None = None
    ) -> None:
        """Write one event that a person should know of: a restart, a failure, a refusal."""
        line = {"event": text, "task": task, "step": step, "time": round(time, 3)}
        self._append({k: v for k, v in line.items() if v is not None})

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``; floats that are not finite become null."""
        write_json(self.path / RESULT, result)

    def write_panels(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write ``panels.npz``. Keys: ``<task>/<evaluation>/image`` uint8 [N,H,W,3] and
        ``<task>/<evaluation>/<quantity>/{truth,prediction}`` float32 [N,C,H,W]."""

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **dict(arrays))

        atomic_write(self.path / PANELS, save)

    def write_errors(self, tracebacks: Mapping[str, str]) -> None:
        """Write ``errors.log``: the traceback of each failed task. Removed if no task failed."""
        failed = {task: text for task, text in tracebacks.items() if text}
        if failed:
            texts = [f"==== task {task}\n{text.rstrip()}\n" for task, text in failed.items()]
            write_text(self.path / ERRORS, "\n".join(texts))
        else:
            (self.path / ERRORS).unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files."""
        writers, self._writers = self._writers, {}
        file, self._file = self._file, None
        if file:
            file.close()  # nothing is left to write: each line was flushed
        with naming_system_errors(str(self.path / TENSORBOARD)):
            for writer in writers.values():
                writer.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            self.close()
        except (OSError, TaskrayError):
            if kind is None:  # else the error of the block is the one to report
                raise

    def _append(self, line: Mapping[str, Any]) -> None:
        content = encode(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        with naming_system_errors(str(self._metrics)):
            if self._file is None:
                self._file = self._metrics.open("ab")
            try:
                self._file.write(content)
                self._file.flush()
            except OSError:
                file, self._file = self._file, None
                with suppress(OSError):
                    file.close()  # tries to write the rest, and fails again
                self._repair()
                raise

    def _writer(self, task: str) -> SummaryWriter:
        if task not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._writers[task] = SummaryWriter(str(self.path / TENSORBOARD / task))
        return self._writers[task]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` (or of the run folder ``path``); empty without the file.

    A truncated last line, as a crash leaves it, is ignored; any other malformed line raises
    InputError with its number.
    """
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError
            lines.append(line)
        except ValueError:
            if number == len(texts):  # without a newline: a crash cut it off
                break
            raise InputError(
                str(path), f"line {number}: got {text[:40]!r}, expected one JSON object"
            ) from None
    return lines


def read_result(path: str | Path) -> dict[str, Any] | None:
    """``result.json`` of a run folder; None without the file. InputError if it is malformed."""
    file = Path(path) / RESULT
    return read_json(file) if file.exists() else None


def read_panels(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of ``panels.npz`` in a run folder; empty without the file."""
    file = Path(path) / PANELS
    if not file.exists():
        return {}
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # NumPy raises many types for a damaged archive
        raise InputError(str(file), f"cannot be read as .npz: {one_line(error)}") from None
