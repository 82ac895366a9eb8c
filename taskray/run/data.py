"""Datasets without a run: built or converted, and shown to a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from taskray.data.storage.convert import build_reader, check_replaceable, convert
from taskray.data.storage.parquet import read_manifest
from taskray.data.storage.store import prepare
from taskray.errors import InputError
from taskray.files import make_folder
from taskray.job.config import DataConfig, load_job, parse
from taskray.job.validation import nearest
from taskray.record.formatting import size
from taskray.report.console import print_plain
from taskray.report.dataset import check_sheet, show
from taskray.report.progress import dataset_progress
from taskray.run.backend import ray_session


def build_dataset(
    values: Mapping[str, Any], name: str, out: Path | None, inline: bool, console: Console
) -> None:
    """Convert the dataset with these settings into the folder ``out``, or into the cache.

    Raises InputError for wrong settings, and for a folder that taskray must not replace.
    """
    config: DataConfig = parse(DataConfig, dict(values), f"data {name}")
    build_reader(config, name)  # wrong arguments are reported before Ray starts
    if out is not None:
        out = out.resolve()
        make_folder(out.parent, "a folder of datasets")
        check_replaceable(out)
    with ray_session(None, inline), dataset_progress(console, name) as progress:
        if out is None:
            out = prepare(config, name=name, use_ray=not inline, progress=progress)
        else:
            convert(config, out, name=name, use_ray=not inline, progress=progress)
    manifest = read_manifest(out)
    stored = sum(file.stat().st_size for file in out.glob("*.parquet"))
    rows, columns = manifest["num_rows"], ", ".join(manifest["columns"])
    print_plain(console, f"{out}: {rows} rows, {size(stored)}; columns: {columns}")
    for where, reason in manifest["errors"]:
        print_plain(console, f"left out: {where}: {reason}")


def show_dataset(
    source: str, dataset: str | None, limit: int, save: Path | None, console: Console
) -> None:
    """Print what a Parquet dataset contains, or the dataset called ``dataset`` of a job file.

    Raises InputError where ``source`` is neither, or the job has no such dataset.
    """
    if save is not None:
        check_sheet(save)
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".parquet":
        if dataset is not None:
            raise InputError(f"--dataset {dataset}", f"{source} is a dataset, expected a job file")
        config = DataConfig.model_validate({"reader": {"name": "parquet", "path": source}})
        show(config, path, path.name, limit, save, console)
        return
    config, name = _dataset_of_job(source, dataset)
    with dataset_progress(console, name) as progress:
        path = prepare(config, name=name, use_ray=False, progress=progress)
    show(config, path, name, limit, save, console)


def _dataset_of_job(source: str, dataset: str | None) -> tuple[DataConfig, str]:
    job = load_job(source)
    if dataset is None and len(job.data) == 1:
        dataset = next(iter(job.data))
    if dataset is None:
        raise InputError(source, f"has several datasets, expected --dataset {'|'.join(job.data)}")
    if dataset not in job.data:
        raise InputError(source, f"no dataset {dataset!r}; {nearest(dataset, list(job.data))}")
    return job.data[dataset], dataset
