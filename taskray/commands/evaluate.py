"""``taskray evaluate``: measure the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskray.commands.arguments import add_overrides
from taskray.commands.exit_codes import DONE

HELP = "measure the checkpoints of a run again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``taskray evaluate``."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the table of metrics; returns the exit code."""
    from rich.console import Console

    from taskray.report.compare import comparison_table
    from taskray.report.console import print_table
    from taskray.report.render import to_rich
    from taskray.run.evaluate import evaluate_run

    console = Console()
    result = evaluate_run(arguments.folder, arguments.overrides, console)
    print_table(console, to_rich(comparison_table({result["name"]: result})))
    return DONE
