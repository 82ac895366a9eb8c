"""``taskray data``: build the embedded world, look at a dataset, convert one to Parquet.

::

    taskray data world --domain sim --split train --num-samples 1024 [--frames 2] [--out DIR]
    taskray data show DIR [--save sheet.png]
    taskray data show JOB.yaml --dataset real_test
    taskray data convert seven_scenes path=~/chess height=96 --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from taskray.errors import InputError
from taskray.job.config import DataConfig, load_job, override, parse
from taskray.job.validation import nearest

WORLD_ARGUMENTS = {"num_samples": int, "frames": int, "height": int, "width": int, "seed": int,
                   "label_fraction": float}  # fmt: skip
"""Arguments of the world's reader that are options here; see ``taskray.data.world.World``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``taskray data``."""
    commands = parser.add_subparsers(required=True, metavar="ACTION", dest="action")

    world = commands.add_parser("world", help="build the embedded world")
    world.add_argument("--domain", choices=("sim", "real"), default="sim")
    world.add_argument("--split", choices=("train", "validation", "test"), default="train")
    for name, kind in WORLD_ARGUMENTS.items():
        world.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)

    show = commands.add_parser("show", help="rows, columns, ranges and pictures of a dataset")
    show.add_argument("source", metavar="PATH_OR_JOB", help="a folder of Parquet, or a job file")
    show.add_argument("--dataset", metavar="NAME", help="which dataset of the job")
    show.add_argument("--save", type=Path, metavar="SHEET.png", help="also write a contact sheet")
    show.add_argument(
        "--limit", type=_count, default=1000, help="look at so many rows at most (default: 1000)"
    )

    convert = commands.add_parser("convert", help="convert a dataset to Parquet, by any reader")
    convert.add_argument("reader", metavar="READER", help="a reader's name or import path")
    convert.add_argument("arguments", nargs="*", metavar="key=value", help="its arguments")
    convert.add_argument("--limit", type=_count, help="only the first so many rows")

    for command, required in ((world, False), (convert, True)):
        where = "folder to write" if required else "folder to write (default: the cache)"
        command.add_argument("--out", type=Path, metavar="DIR", required=required, help=where)
        command.add_argument("--inline", action="store_true", help="in one process, without Ray")


def run(arguments: argparse.Namespace) -> int:
    """Run ``taskray data ...``; returns the exit code."""
    if arguments.action == "show":
        return _show(arguments.source, arguments.dataset, arguments.limit, arguments.save)
    if arguments.action == "world":
        chosen = {k: v for k, v in vars(arguments).items() if k in WORLD_ARGUMENTS}
        reader = {"name": "world", "domain": arguments.domain, "split": arguments.split, **chosen}
        return _build({"reader": reader}, "world", arguments.out, arguments.inline)
    reader = {**_key_values(arguments.arguments), "name": arguments.reader}
    values = {"reader": reader, "limit": arguments.limit}
    return _build(values, "convert", arguments.out, arguments.inline)


def _build(values: dict[str, Any], name: str, out: Path | None, inline: bool) -> int:
    """Convert a dataset into ``out``, or into the cache."""
    config: DataConfig = parse(DataConfig, values, f"data {name}")
    from rich.console import Console

    from taskray.data.storage.parquet import read_manifest
    from taskray.data.storage.store import build_reader, check_replaceable, convert, prepare
    from taskray.record.folder import make_folder
    from taskray.record.formatting import size
    from taskray.report.progress import dataset_progress
    from taskray.report.say import say

    build_reader(config, name)  # what is wrong is told before Ray starts
    if out is not None:
        out = out.resolve()
        make_folder(out.parent, "a folder of datasets")
        check_replaceable(out)
    console = Console()
    with _ray(inline), dataset_progress(console, name) as progress:
        if out is None:
            out = prepare(config, name=name, use_ray=not inline, progress=progress)
        else:
            convert(config, out, name=name, use_ray=not inline, progress=progress)
    manifest = read_manifest(out)
    stored = sum(file.stat().st_size for file in out.glob("*.parquet"))
    rows, columns = manifest["num_rows"], ", ".join(manifest["columns"])
    say(console, f"{out}: {rows} rows, {size(stored)}; columns: {columns}")
    for where, reason in manifest["errors"]:
        say(console, f"left out: {where}: {reason}")
    return 0


def _show(source: str, dataset: str | None, limit: int, save: Path | None) -> int:
    """Look at a stored dataset, or at one of a job's."""
    from rich.console import Console

    from taskray.data.storage.store import prepare
    from taskray.report.dataset import check_sheet, show
    from taskray.report.progress import dataset_progress

    if save is not None:
        check_sheet(save)
    console = Console()
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".parquet":
        if dataset is not None:
            raise InputError(f"--dataset {dataset}: {source} is a dataset, not a job")
        config = DataConfig.model_validate({"reader": {"name": "parquet", "path": source}})
        show(config, path, path.name, limit, save, console)
        return 0
    config, name = _dataset_of_job(source, dataset)
    with dataset_progress(console, name) as progress:
        path = prepare(config, name=name, use_ray=False, progress=progress)
    show(config, path, name, limit, save, console)
    return 0


def _dataset_of_job(source: str, dataset: str | None) -> tuple[DataConfig, str]:
    job = load_job(source)
    if dataset is None and len(job.data) == 1:
        dataset = next(iter(job.data))
    if dataset is None:
        names = "|".join(job.data)
        raise InputError(f"{source}: has several datasets; name one: --dataset {names}")
    if dataset not in job.data:
        raise InputError(f"{source}: no dataset {dataset!r}; {nearest(dataset, list(job.data))}")
    return job.data[dataset], dataset


def _key_values(texts: Sequence[str]) -> dict[str, Any]:
    for text in texts:
        if "=" not in text:
            raise InputError(f"{text!r}: expected key=value, an argument of the reader")
    return override({}, texts)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _ray(inline: bool) -> AbstractContextManager[None]:
    if inline:
        return nullcontext()
    from taskray.runtime.session import session

    return session()
