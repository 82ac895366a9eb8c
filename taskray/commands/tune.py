"""``taskray tune``: a search over the fields of a job."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskray.commands.arguments import add_overrides, add_record

HELP = "search a space of jobs with Ray Tune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``taskray tune``."""
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="a space file")
    parser.add_argument(
        "--job", type=Path, metavar="JOB.yaml", help="a job file (default: the space's)"
    )
    parser.add_argument("--out", type=Path, help="folder (default: runs/<name of the space>)")
    parser.add_argument("--samples", type=int, help="number of trials (default: the space's)")
    add_record(parser)
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the search; returns the exit code."""
    from rich.console import Console

    from taskray.tuning.tune import tune

    return tune(
        arguments.space,
        arguments.job,
        arguments.out,
        arguments.samples,
        arguments.overrides,
        Console(),
        arguments.record,
    )
