"""``taskray data``: build the embedded world, show a dataset, convert one to Parquet.

::

    taskray data world --domain sim --split train --num-samples 1024 [--frames 2] [--out DIR]
    taskray data show DIR [--save sheet.png]
    taskray data show JOB.yaml --dataset real_test
    taskray data convert seven_scenes path=~/chess height=96 --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taskray.commands.exit_codes import DONE
from taskray.errors import InputError

HELP = "build, show or convert datasets"

WORLD_ARGUMENTS = {"num_samples": int, "frames": int, "height": int, "width": int, "seed": int,
                   "label_fraction": float}  # fmt: skip
"""Arguments of the world's reader that are options here; see ``taskray.data.world.World``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``taskray data``."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    world = actions.add_parser("world", help="build the embedded world")
    world.set_defaults(action=run_world)
    world.add_argument("--domain", choices=("sim", "real"), default="sim")
    world.add_argument("--split", choices=("train", "validation", "test"), default="train")
    for name, kind in WORLD_ARGUMENTS.items():
        world.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)

    show = actions.add_parser("show", help="rows, columns, ranges and pictures of a dataset")
    show.set_defaults(action=run_show)
    show.add_argument("source", metavar="PATH_OR_JOB", help="a folder of Parquet, or a job file")
    show.add_argument("--dataset", metavar="NAME", help="the dataset of the job")
    show.add_argument("--save", type=Path, metavar="SHEET.png", help="also write a contact sheet")
    show.add_argument(
        "--limit", type=_count, default=1000, help="largest number of rows read (default: 1000)"
    )

    convert = actions.add_parser("convert", help="convert a dataset of any reader to Parquet")
    convert.set_defaults(action=run_convert)
    convert.add_argument("reader", metavar="READER", help="a reader's name or import path")
    convert.add_argument("arguments", nargs="*", metavar="key=value", help="its arguments")
    convert.add_argument("--limit", type=_count, help="convert only the first rows, this many")

    for action, required in ((world, False), (convert, True)):
        where = "folder to write" if required else "folder to write (default: the cache)"
        action.add_argument("--out", type=Path, metavar="DIR", required=required, help=where)
        action.add_argument("--inline", action="store_true", help="in one process, without Ray")


def run(arguments: argparse.Namespace) -> int:
    """Run ``taskray data ...``; returns the exit code."""
    arguments.action(arguments)
    return DONE


def run_world(arguments: argparse.Namespace) -> None:
    """``taskray data world``."""
    from rich.console import Console

    from taskray.run.data import build_dataset

    chosen = {k: v for k, v in vars(arguments).items() if k in WORLD_ARGUMENTS}
    reader = {"name": "world", "domain": arguments.domain, "split": arguments.split, **chosen}
    values = {"reader": reader}
    build_dataset(values, "world", arguments.out, arguments.inline, Console())


def run_convert(arguments: argparse.Namespace) -> None:
    """``taskray data convert``."""
    reader = {**_key_values(arguments.arguments), "name": arguments.reader}
    from rich.console import Console

    from taskray.run.data import build_dataset

    values = {"reader": reader, "limit": arguments.limit}
    build_dataset(values, "convert", arguments.out, arguments.inline, Console())


def run_show(arguments: argparse.Namespace) -> None:
    """``taskray data show``."""
    from rich.console import Console

    from taskray.run.data import show_dataset

    show_dataset(arguments.source, arguments.dataset, arguments.limit, arguments.save, Console())


def _key_values(texts: Sequence[str]) -> dict[str, Any]:
    from taskray.job.config import override

    for text in texts:
        if "=" not in text:
            raise InputError(repr(text), "expected key=value, an argument of the reader")
    return override({}, texts)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)
