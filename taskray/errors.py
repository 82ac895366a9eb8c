"""The errors a person sees. Each message is one line: where, which key, what was expected."""

from __future__ import annotations


class TaskrayError(Exception):
    """Base of every error taskray raises on purpose; ``exit_code`` is that of the command."""

    exit_code = 1


class InputError(TaskrayError):
    """What the user gave is wrong (config, data, checkpoint): exit code 2.

    Args:
        key: the file, the dotted key or the option at fault.
        text: what was found and what was expected, in one line.
    """

    exit_code = 2

    def __init__(self, key: str, text: str = "") -> None:
        super().__init__(key, text)
        self.key, self.text = key, text

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.text else self.key


class TrainingError(TaskrayError):
    """A task stopped: which task, at which step, and why.

    Only strings and integers, so that it survives the way between two processes.
    """

    def __init__(self, task: str, step: int, reason: str) -> None:
        reason = " ".join(reason.split())
        super().__init__(task, step, reason)
        self.task, self.step, self.reason = task, step, reason

    def __str__(self) -> str:
        return f"task {self.task!r} failed at step {self.step}: {self.reason}"


def one_line(error: BaseException) -> str:
    """What went wrong, in one line, with the kind of error where its text says too little."""
    text = " ".join(str(error).split())
    speaks = isinstance(error, (TaskrayError, ValueError, OSError)) and text
    return text if speaks else f"{type(error).__name__}: {text}".rstrip(": ")
