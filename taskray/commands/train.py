"""``taskray train``: one collective run of a job."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from taskray.commands.arguments import add_job
from taskray.commands.exit_codes import DONE, FAILED, INTERRUPTED

HELP = "run a job: train its tasks together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``taskray train``."""
    add_job(parser)
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<name of the job>)")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto",
        help="auto: continue from the run's checkpoints; never: delete them and start from step 0",
    )  # fmt: skip
    parser.add_argument(
        "--inline", action="store_true", help="the same loop in one process, without Ray"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table of metrics; returns the exit code."""
    from taskray.job.config import load_job

    job = load_job(arguments.job, arguments.overrides)  # errors in it come before slow imports
    from rich.console import Console

    from taskray.record.folder import ERRORS
    from taskray.report.compare import comparison_table
    from taskray.report.console import print_plain, print_table
    from taskray.report.render import to_rich
    from taskray.run.train import train

    folder = arguments.out or Path("runs") / job.name
    console = Console()
    try:
        result = train(
            job, folder, resume=arguments.resume, inline=arguments.inline, console=console
        )
    except KeyboardInterrupt:
        how = "the same command" if arguments.resume == "auto" else "--resume auto"
        print(f"taskray: interrupted; {how} continues from {folder}", file=sys.stderr)
        return INTERRUPTED
    print_table(console, to_rich(comparison_table({job.name: result})))
    print_plain(console, f"run folder: {folder}   report: {folder / 'report.html'}")
    if result["error"]:
        print(f"taskray: {result['error']} (log: {folder / ERRORS})", file=sys.stderr)
        return FAILED
    return DONE
