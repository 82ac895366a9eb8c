"""Files and folders that a crash cannot leave half written: atomic write, folder lock, JSON, text.

One of each for the whole project. Everything here is local; checkpoints on object stores are
written by ``runtime.checkpoints``.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taskray.errors import InputError, naming_system_errors

LOCK = ".lock"
"""The file whose lock :func:`lock_folder` holds, if no other is named."""


def atomic_write(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` make a file or a folder at a temporary place beside ``path``, then rename it.

    Readers see the old content or the new, and a crash leaves the old. A folder at ``path`` is
    removed just before the rename: a crash in between leaves nothing there. InputError if
    ``path`` may not be written, TaskrayError if the disk is full.
    """
    with naming_system_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        _remove(temporary)
        try:
            write(temporary)
            if temporary.is_dir():
                _remove(path)  # a rename cannot replace a folder that has content
            os.replace(temporary, path)
        finally:
            _remove(temporary)
    return path


def remove_temporaries(path: Path, dead: bool = False) -> None:
    """Remove what killed processes left of an :func:`atomic_write` of ``path``, whose name may be
    a pattern; with ``dead`` only that of processes that do not run on this machine.

    Only for the process that holds the lock under which ``path`` is written.
    """
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if not (dead and _runs(left.name.split(".")[-2])):
            _remove(left)


def _runs(process: str) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(int(process), 0)
    except PermissionError:  # it runs, as another user
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path, purpose: str) -> None:
    """Make a folder and its parents if they do not exist; InputError if that is not possible.

    ``purpose`` completes the error: ``<path>: cannot be <purpose>``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(path), f"cannot be {purpose}: {error.strerror}") from None


@contextmanager
def lock_folder(path: Path, purpose: str, wait: bool = False, name: str = LOCK) -> Iterator[None]:
    """Make a folder if it does not exist, and lock it for this process inside the block.

    If another process holds the lock: InputError, or with ``wait`` one line on stderr and then
    the lock as soon as it is free. The system releases the lock when the process ends, however
    it ends. Filesystems without locks are used without one.

    Args:
        path: the folder.
        purpose: what the folder is, for errors: ``a run folder``.
        wait: wait for the lock.
        name: the lock file in the folder; two names are two locks.
    """
    make_folder(path, purpose)
    try:
        file = (path / name).open("w")
    except OSError as error:
        raise InputError(str(path), f"cannot be {purpose}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(
                    str(path), "another taskray process is working in this folder"
                ) from None
            print(
                f"{path}: waiting for another taskray process ({purpose})",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a filesystem without locks
            pass
        yield


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    return atomic_write(path, lambda temporary: temporary.write_bytes(encode(text)))


def encode(text: str) -> bytes:
    """A text in UTF-8. A file name that is not UTF-8 is written with escapes, as in JSON."""
    return text.encode("utf-8", errors="backslashreplace")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8; InputError if it is missing, unreadable or in another encoding."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(str(path), "no such file") from None
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(str(path), "not a text file in UTF-8") from None


def write_json(path: Path, value: Any) -> Path:
    """Write ``value`` as a JSON file atomically; see :func:`plain`."""
    return write_text(path, to_json(value) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object; InputError if it contains anything else."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(str(path), f"malformed JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(str(path), f"got {type(content).__name__}, expected a JSON object")
    return content


def to_json(value: Any) -> str:
    """``value`` as indented strict JSON; see :func:`plain`."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """``value`` in the types of strict JSON: floats that are not finite become None, arrays and
    tuples become lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
