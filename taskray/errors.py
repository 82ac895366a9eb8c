"""The errors that a person sees. Each message is one line: ``key: got X, expected Y``."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import shorten

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of system errors: not permitted, and no space on the disk or in a quota."""

LONGEST = 300
"""Characters of another library's message that :func:`one_line` keeps: some fill a page."""


class TaskrayError(Exception):
    """Base of every error that taskray raises on purpose; ``exit_code`` is that of the command."""

    exit_code = 1


class InputError(TaskrayError):
    """A config, dataset, checkpoint or option of the user is wrong: exit code 2.

    Args:
        key: the file, the dotted key or the option at fault.
        text: what was found and what was expected, on one line.
    """

    exit_code = 2

    def __init__(self, key: str, text: str) -> None:
        super().__init__(key, text)  # both, because an exception is unpickled from its arguments
        self.key, self.text = key, text

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.text else self.key


class TrainingError(TaskrayError):
    """A task stopped: which task, at which step, and why.

    It contains only strings and integers, so that it can be pickled between processes.
    """

    def __init__(self, task: str, step: int, reason: str) -> None:
        reason = " ".join(reason.split())
        super().__init__(task, step, reason)
        self.task, self.step, self.reason = task, step, reason

    def __str__(self) -> str:
        return f"task {self.task!r} failed at step {self.step}: {self.reason}"


def one_line(error: BaseException) -> str:
    """The message of any error on one line, for use inside another message.

    The type comes first where the text alone may not explain the error (``KeyError: 'depth'``).
    Texts of other libraries are cut after ``LONGEST`` characters.
    """
    text = " ".join(str(error).split())
    if isinstance(error, TaskrayError) and text:
        return text
    text = shorten(text, LONGEST, placeholder=" ...")
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def system_error(error: OSError, key: str | None = None) -> TaskrayError | None:
    """An error of the system whose cause is outside taskray, in one line: InputError where a file
    may not be read or written, TaskrayError where there is no space. None for any other.

    ``key`` comes first in the line; without one it is the file.
    """
    if error.errno not in (*DENIED, *FULL):
        return None
    file = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    text = os.strerror(error.errno)
    if error.errno in FULL:  # the file is often a temporary one
        return TaskrayError(": ".join(filter(None, (key or file, text))))
    if key is None or (file is not None and file.startswith(key)):
        return InputError(file or text, text if file else "")
    return InputError(key, ": ".join(filter(None, (file, text))))


@contextmanager
def naming_system_errors(key: str) -> Iterator[None]:
    """An OSError that :func:`system_error` knows leaves the block as that error of ``key``."""
    try:
        yield
    except OSError as error:
        named = system_error(error, key)
        if named is None:
            raise
        raise named from error


def full_traceback(error: BaseException) -> str:
    """Where an error comes from, in full, for the log."""
    return "".join(traceback.format_exception(error))


@contextmanager
def naming_errors(task: str, step: Callable[[], int]) -> Iterator[None]:
    """Any error of the block leaves it as a TrainingError of this task and the present step."""
    try:
        yield
    except TrainingError:
        raise
    except TaskrayError as error:
        raise TrainingError(task, step(), str(error)) from error
    except Exception as error:
        raise TrainingError(task, step(), f"{type(error).__name__}: {error}") from error


@contextmanager
def naming_cause(what: Callable[[], str]) -> Iterator[None]:
    """Any error of the block that is not taskray's own leaves it with ``what`` failed before it."""
    try:
        yield
    except TaskrayError:
        raise
    except Exception as error:
        raise TaskrayError(f"{what()} failed: {type(error).__name__}: {error}") from error
