"""What the ego-motion of a run is to be compared with: motions that look at no frame.

``jobs/constant_velocity.py RUN TRAINING TEST`` scores, on the dataset TEST of a run's job, and as
the run's own ``ego_motion`` is scored, ``constant``: the mean true motion of the dataset TRAINING,
again and again; ``ahead``: straight ahead, which needs no poses, since what is measured does not
depend on speed; and ``still``: none. It prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskray.data.storage.source import load_in_process
from taskray.data.storage.store import prepare
from taskray.data.streams.stream import plain_batches
from taskray.errors import InputError, TaskrayError
from taskray.job.config import Job, override, parse_job, read_yaml
from taskray.record.folder import CONFIG
from taskray.tasks.motion_metrics import EgoMotionMetrics

MOTION = "camera_motion"


def measure(
    run: Path, training: str, test: str, overrides: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """The metrics of each motion; InputError where a dataset has no true motion."""
    job = parse_job(override(read_yaml(run / CONFIG), overrides), str(run / CONFIG))
    batches = batches_of(job, test, MOTION)
    motion = torch.eye(4).repeat(3, 1, 1)
    motion[0] = mean_motion(column(job, training, MOTION))
    motion[1, 2, 3] = -1.0  # what lies ahead comes nearer
    found = {}
    for name, one in zip(("constant", "ahead", "still"), motion, strict=True):
        metric = EgoMotionMetrics()
        for batch in batches:
            metric.update({MOTION: one.expand_as(batch[MOTION])}, batch)
        found[name] = {key: float(value) for key, value in metric.compute().items()}
    return found


def column(job: Job, dataset: str, name: str) -> Tensor:
    """One column of a dataset, ``[n, ...]``."""
    return torch.cat([batch[name] for batch in batches_of(job, dataset, name)])


def batches_of(job: Job, dataset: str, name: str) -> list[dict[str, Tensor]]:
    """Batches with one column of a dataset, and the places of the rows."""
    if dataset not in job.data:
        raise InputError("data", f"no dataset {dataset!r}, expected one of {', '.join(job.data)}")
    path = prepare(job.data[dataset], name=dataset, use_ray=False)
    source = load_in_process(path, job.data[dataset], [name], name=dataset).open()
    return [batch.tensors for batch in plain_batches(source, 16, [name])]


def mean_motion(motions_n44: Tensor) -> Tensor:
    """The mean translation, and the rotation nearest to the mean of the rotations; ``[4, 4]``."""
    mean = motions_n44.double().mean(dim=0)
    left, _, right = torch.linalg.svd(mean[:3, :3])
    mean[:3, :3] = left @ right
    return mean.to(motions_n44.dtype)


def script(description: str | None, measure: Callable[..., Mapping[str, Any]]) -> int:
    """A command ``RUN TRAINING TEST [--set a.b=v]`` that prints what ``measure`` finds as JSON."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("training", metavar="TRAINING")
    parser.add_argument("test", metavar="TEST")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v", dest="overrides")
    given = parser.parse_args()
    try:
        found = measure(given.run, given.training, given.test, given.overrides)
    except TaskrayError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"run": given.run.name, "dataset": given.test, **rounded(found)}))
    return 0


def rounded(values: Any) -> Any:
    """Figures to four places, at any depth."""
    if isinstance(values, Mapping):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, 4)


if __name__ == "__main__":
    sys.exit(script(__doc__, measure))
