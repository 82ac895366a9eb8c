"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_job(parser: argparse.ArgumentParser) -> None:
    """``JOB.yaml`` and ``--set``."""
    parser.add_argument("job", metavar="JOB.yaml", help="a job file")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """``--set a.b=v``, collected in ``overrides``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=v", dest="overrides",
        help="set the value of a dotted key of the job; repeatable",
    )  # fmt: skip


def add_record(parser: argparse.ArgumentParser) -> None:
    """``--record DIR``."""
    parser.add_argument(
        "--record", type=Path, metavar="DIR",
        help="also write the table, commit and hardware to DIR/<name>.md and DIR/<name>.json",
    )  # fmt: skip
