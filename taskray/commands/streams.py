"""What a command prints on a console that does not have every character, such as ASCII."""

from __future__ import annotations

import codecs
import io
import sys

STAND_INS = {
    "—": "-", "–": "-", "\u2212": "-", "·": "|", "…": "...", "×": "x", "±": "+-", "°": "deg",
    "↑": "^", "↓": "v", "←": "<-", "→": "->", "δ": "d", "Δ": "D", "²": "^2", "³": "^3",
}  # fmt: skip
"""Character that taskray prints -> its stand-in; any other is printed as ``?``."""


def accept_every_character() -> None:
    """Let stdout and stderr print a stand-in where their encoding lacks a character: a run that
    has finished must not fail at its last table."""
    codecs.register_error("taskray", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="taskray")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(STAND_INS.get(character, "?") for character in missing), error.end
