"""``taskray report``: report.html of a run or a study."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskray.commands.exit_codes import DONE

HELP = "write report.html of a run or a study"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``taskray report``."""
    parser.add_argument(
        "folder", type=Path, metavar="RUN_OR_STUDY", help="a run folder or a study folder"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="the run folder to compare a run with"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report, print a comparison where there is a baseline; returns the exit code."""
    from rich.console import Console

    from taskray.report.compare import compare_folders
    from taskray.report.console import print_plain, print_table
    from taskray.report.html import write_report
    from taskray.report.render import to_rich

    path = write_report(arguments.folder, arguments.baseline)
    console = Console()
    if arguments.baseline:
        print_table(console, to_rich(compare_folders(arguments.folder, arguments.baseline)))
    print_plain(console, f"report: {path}")
    return DONE
