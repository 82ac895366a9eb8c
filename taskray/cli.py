"""The ``taskray`` command: builds the command line, and turns every error into an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

import taskray
from taskray.commands import data, doctor, evaluate, exit_codes, report, study, submit, train, tune
from taskray.commands.streams import accept_every_character
from taskray.errors import TaskrayError, one_line, system_error


class Command(Protocol):
    """What every file in ``taskray.commands`` provides."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the command's arguments to its parser."""

    def run(self, arguments: argparse.Namespace, /) -> int:
        """Run the command; returns the exit code."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "evaluate": evaluate,
    "study": study,
    "tune": tune,
    "submit": submit,
    "report": report,
    "data": data,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    accept_every_character()
    parsed = parser().parse_args(arguments)
    # schedulers stop a job with SIGTERM: it must write its checkpoints as after Ctrl-C
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: int = parsed.run(parsed)
        return code
    except TaskrayError as error:
        print(f"taskray: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("taskray: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        # `taskray ... | head` has closed our output: without this, Python prints an error when
        # it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.FAILED
    except Exception as error:
        if isinstance(error, OSError) and (named := system_error(error)) is not None:
            print(f"taskray: {one_line(named)}", file=sys.stderr)
            return named.exit_code
        print(f"taskray: unexpected: {one_line(error)} (log: {_keep_traceback()})", file=sys.stderr)
        return exit_codes.FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    """The command line, with a parser for each command."""
    top = argparse.ArgumentParser(
        prog="taskray",
        description="Collective training of vision tasks on Ray.",
        epilog=exit_codes.HELP,
    )
    top.add_argument("--version", action="version", version=f"taskray {taskray.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.HELP, description=command.HELP, epilog=exit_codes.HELP
        )
        sub.set_defaults(run=command.run)
        command.add_arguments(sub)
    return top


def _interrupt(signal_number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _keep_traceback() -> str:
    """Write the traceback of the current exception to a file; returns the file's name."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="taskray-", suffix=".log", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            traceback.print_exc(file=file)
    except OSError as error:
        return f"not written, {one_line(error)}"
    return file.name


if __name__ == "__main__":
    sys.exit(main())
