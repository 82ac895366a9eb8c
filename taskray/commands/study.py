"""``taskray study``: a table of variants and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskray.commands.arguments import add_overrides, add_record

HELP = "run a table: variants x seeds of one job"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``taskray study``."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="a study file")
    parser.add_argument("--out", type=Path, help="study folder (default: runs/<name of the study>)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: the study's)")
    add_record(parser)
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the study; returns the exit code."""
    from rich.console import Console

    from taskray.tuning.study import study

    return study(
        arguments.study,
        arguments.out,
        arguments.seeds,
        arguments.overrides,
        Console(),
        arguments.record,
    )
