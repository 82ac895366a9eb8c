"""``taskray doctor``: check a job and this machine."""

from __future__ import annotations

import argparse

from taskray.commands.arguments import add_job
from taskray.commands.exit_codes import DONE

HELP = "check a job and this machine before anything is started"

add_arguments = add_job


def run(arguments: argparse.Namespace) -> int:
    """Print what the job needs; returns the exit code."""
    from taskray.job.config import load_job

    job = load_job(arguments.job, arguments.overrides)  # errors in it come before slow imports
    from rich.console import Console

    from taskray.run.doctor import doctor

    doctor(job, Console())
    return DONE
