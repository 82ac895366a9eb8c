"""The run folder: what a run leaves behind, written so that a crash never spoils it.

::

    config.yaml      the resolved job, loadable by ``taskray train``
    metrics.jsonl    one line a report, one line an event
    tensorboard/     the same scalars as event files, one folder a task
    panels.npz       a few images with truth and prediction
    errors.log       tracebacks of the tasks that failed; absent where none did
    result.json      written last
    .lock            held while somebody writes here; see :func:`claim`
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import BaseModel

from taskray.errors import InputError, one_line
from taskray.job.config import dump_yaml

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG, METRICS, RESULT, PANELS = "config.yaml", "metrics.jsonl", "result.json", "panels.npz"
ERRORS = "errors.log"
LOCK = ".lock"


def atomic_write(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file, in one step that a crash cannot split."""
    return atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_text(path: Path) -> str:
    """A text file; InputError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None


def plain(value: Any) -> Any:
    """``value`` as strict JSON: floats that are not finite become None, arrays become lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def make_folder(path: Path, purpose: str) -> None:
    """Make a folder, where it is not there; InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be {purpose}: {error.strerror}") from None


@contextmanager
def claim(path: Path, purpose: str) -> Iterator[None]:
    """A folder, made where it is not there, for this process alone. InputError where another one
    is at work in it. The system lets go when the process ends, however it ends."""
    make_folder(path, purpose)
    try:
        file = (path / LOCK).open("w")
    except OSError as error:
        raise InputError(f"{path}: cannot be {purpose}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another taskray is at work in this folder") from None
        except OSError:  # a filesystem without locks
            pass
        yield


class RunFolder:
    """Writes one run's folder. Opening an existing folder goes on where it ended.

    ``elapsed`` is the time of the last line already there (0 in a new folder): a resumed run
    adds it to its own clock, so that time never runs backwards. ``tensorboard=False`` leaves
    the event files out.
    """

    def __init__(self, path: str | Path, tensorboard: bool = True) -> None:
        self.path = Path(path)
        make_folder(self.path, "a run folder")
        self._metrics = self.path / METRICS
        self.elapsed = self._repair()
        self._file: IO[str] | None = None
        self._tensorboard = tensorboard
        self._writers: dict[str, SummaryWriter] = {}

    def _repair(self) -> float:
        """Cut off a last line that a crash left unfinished; returns the time of the last one."""
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
        """One report of a task: ``values`` at its ``step``, ``time`` seconds into the run.

        Values that are None or not finite become null, and stay out of TensorBoard.
        """
        self._append({"task": task, "step": step, "time": round(time, 3), "values": plain(values)})
        if not self._tensorboard:
            return
        writer = self._writer(task)
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                writer.add_scalar(name, value, step)

    def event(
        self, text: str, time: float, task: str | None = None, step: int | None = None
    ) -> None:
        """Something that people should know: a restart, a failure, a refused prediction."""
        line = {"event": text, "task": task, "step": step, "time": round(time, 3)}
        self._append({k: v for k, v in line.items() if v is not None})

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``; floats that are not finite become null."""
        text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(self.path / RESULT, text + "\n")

    def write_panels(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write ``panels.npz``. Keys: ``<task>/<evaluation>/image`` uint8 [N,H,W,3] and
        ``<task>/<evaluation>/<quantity>/{truth,prediction}`` float32 [N,C,H,W]."""

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **dict(arrays))

        atomic_write(self.path / PANELS, save)

    def write_errors(self, tracebacks: Mapping[str, str]) -> None:
        """Write ``errors.log``: by task, where its error comes from. Removed where none failed."""
        failed = {task: text for task, text in tracebacks.items() if text}
        if failed:
            texts = [f"==== task {task}\n{text.rstrip()}\n" for task, text in failed.items()]
            write_text(self.path / ERRORS, "\n".join(texts))
        else:
            (self.path / ERRORS).unlink(missing_ok=True)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        if self._file:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self._metrics.open("a", encoding="utf-8")
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def _writer(self, task: str) -> SummaryWriter:
        if task not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._writers[task] = SummaryWriter(str(self.path / "tensorboard" / task))
        return self._writers[task]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` (or of the run folder ``path``); none if there is no file.

    A truncated last line, as a crash leaves it, is left out; any other malformed line raises
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
            if number == len(texts):  # no newline after it: the writer was cut off
                break
            raise InputError(f"{path}: line {number}: expected one JSON object") from None
    return lines


def read_result(path: str | Path) -> dict[str, Any] | None:
    """``result.json`` of a run folder; None while there is none."""
    file = Path(path) / RESULT
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: malformed JSON: {error}") from None
    if not isinstance(result, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(result).__name__}")
    return result


def read_panels(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of ``panels.npz`` in a run folder; empty while there is none."""
    file = Path(path) / PANELS
    if not file.exists():
        return {}
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        raise InputError(f"{file}: cannot be read as .npz: {one_line(error)}") from None
