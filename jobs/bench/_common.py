"""What the benchmarks share: their arguments, their result, and the job that they measure.

Every benchmark prints progress on stderr and one JSON object on the last line of stdout. Run
them alone on a machine: every result contains ``load_at_start``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from taskray.data.storage.source import Handle, RayHandle, load_in_process
from taskray.job.config import Job, load_job
from taskray.loop.wiring import wire
from taskray.run.datasets import prepare_datasets
from taskray.run.recorder import hardware
from taskray.tuning.record import commit_of

MAIN_JOB = Path(__file__).resolve().parents[1] / "depth_normals.yaml"
THREE_TASKS = MAIN_JOB.parent / "special_cases" / "three_tasks.yaml"
FRAMES, PAIRS = "frames", "pairs"
"""Its datasets."""
PATIENCE = 300.0
"""Seconds after which something that was waited for is taken to have failed."""
UNET = ("model=unet", "memory_format=contiguous", "augment={}")
SMALL_MODEL = "{name: unet, base: 8, depth: 2}"


# ---- a benchmark as a program -----------------------------------------------------------------


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark: its docstring as help, and ``--quick``."""
    result = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--quick", action="store_true", help="tiny sizes: proves that it runs, measures nothing"
    )
    return result


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def finish(name: str, result: Mapping[str, Any], settings: argparse.Namespace) -> None:
    """Print the result as one JSON object, on one line."""
    whole = {
        "benchmark": name,
        **result,
        "settings": {k: v for k, v in vars(settings).items() if k != "load"},
        "hardware": hardware(),
        "commit": commit_of(Path(__file__).parent),
        "load_at_start": round(settings.load, 2),
    }
    print(json.dumps(rounded(whole)), flush=True)


def parse(
    arguments: argparse.ArgumentParser, given: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """The settings; with ``--quick`` those of ``quick`` that were not given."""
    if "--quick" in (sys.argv[1:] if given is None else given):
        arguments.set_defaults(**quick)
    settings = arguments.parse_args(given)
    settings.load = os.getloadavg()[0]
    return settings


def numbers(text: str) -> list[int]:
    """``2,3,6`` as an argument."""
    return [int(part) for part in text.split(",") if part]


def rounded(value: Any) -> Any:
    """Floats to four significant digits, everywhere."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {str(k): rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def median(values: Iterable[float]) -> float:
    """The median; NaN of nothing."""
    values = list(values)
    return statistics.median(values) if values else float("nan")


# ---- the job ----------------------------------------------------------------------------------


def three_tasks_job(*overrides: str) -> Job:
    """Depth, motion and segmentation in one relation, ``jobs/special_cases/three_tasks.yaml``,
    each with labels of its own."""
    labels = [f"tasks.depth.dedicated={FRAMES}", f"tasks.motion.dedicated={PAIRS}"]
    return load_job(THREE_TASKS, [*labels, "tasks.depth.task.loss=log_mse", *overrides])


def main_job(*overrides: str) -> Job:
    """The main job, ``jobs/depth_normals.yaml``, with overrides, on the U-Net: beside its short
    steps everything else weighs more. Steps on labels and on the mediator take turns."""
    unet = [f"tasks.{task}.{key}" for task in ("depth", "normals") for key in UNET]
    return load_job(MAIN_JOB, [*unet, "mediator.with_labels=false", *overrides])


def small_job(*overrides: str, frames: int = 256) -> Job:
    """The main job with a small network on so many small frames of each dataset: a step takes
    milliseconds."""
    small = [f"tasks.{task}.model={SMALL_MODEL}" for task in ("depth", "normals")]
    for name in ("sim_train", "real_video"):
        sizes = {"height": 32, "width": 48, "num_samples": frames}
        small += [f"data.{name}.reader.{key}={value}" for key, value in sizes.items()]
    return main_job(*small, *overrides)


def with_threads(job: Job, threads: int = 1) -> Job:
    """The same job with so many computing threads in each task."""
    tasks = {n: t.model_copy(update={"threads": threads}) for n, t in job.tasks.items()}
    return job.model_copy(update={"tasks": tasks})


def shared_data(job: Job) -> dict[str, Handle]:
    """The datasets that the job trains on, decoded in the object store as a run has them, without
    the seconds that a Ray Data plan takes. Needs Ray."""
    import ray

    return {
        name: RayHandle(handle.info, [ray.put(block) for block in handle.blocks])
        for name, handle in local_data(job).items()
    }


def local_data(job: Job) -> dict[str, Any]:
    """The datasets that the job trains on, decoded in this process."""
    paths = prepare_datasets(job, use_ray=False, console=Console(quiet=True))
    columns = wire(job).columns_of_datasets()
    return {
        name: load_in_process(paths[name], job.data[name], wanted, name=name)
        for name, wanted in columns.items()
    }


@contextmanager
def own_ray(**options: Any) -> Iterator[Path]:
    """A Ray of our own, connected to as ``taskray train`` does; gives a temporary folder."""
    from taskray.runtime.session import session

    with tempfile.TemporaryDirectory(prefix="taskray-bench-") as folder, session(**options):
        yield Path(folder)
