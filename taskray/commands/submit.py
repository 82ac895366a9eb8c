"""``taskray submit``: a job on a cluster."""

from __future__ import annotations

import argparse

from taskray.commands.arguments import add_job

HELP = "run a job on a cluster, through Ray's job submission"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``taskray submit``."""
    add_job(parser)
    parser.add_argument(
        "--address", required=True, metavar="URL", help="the cluster's dashboard, http://..."
    )
    parser.add_argument("--follow", action="store_true", help="print the job's log until it ends")
    parser.add_argument(
        "--out", metavar="DIR", help="run folder on the cluster (default: ~/taskray-runs/<name>)"
    )
    parser.add_argument(
        "--python", default="python", metavar="COMMAND",
        help="the Python interpreter of the cluster's Ray (default: python)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Submit the job; returns the exit code, with ``--follow`` that of the job."""
    from rich.console import Console

    from taskray.run.submit import submit

    return submit(
        arguments.job,
        arguments.address,
        arguments.overrides,
        follow=arguments.follow,
        out=arguments.out,
        python=arguments.python,
        console=Console(),
    )
