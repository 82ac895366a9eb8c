"""The exit codes of every command; InputError and TaskrayError carry their own (2 and 1)."""

from __future__ import annotations

DONE, FAILED, INTERRUPTED = 0, 1, 130

HELP = (
    "exit codes: 0 done; 2 wrong input (one line: file, key, what was expected); 1 the run failed "
    "(one line: task, step, reason, log file); 130 stopped by Ctrl-C, checkpoints written"
)
