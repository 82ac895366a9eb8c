"""What the depth of a run is to be compared with: a depth map that looks at no frame.

``jobs/mean_depth.py RUN TRAINING TEST`` scores, on the dataset TEST of a run's job, and as the
run's own ``depth`` is scored, one and the same map for every frame: at each pixel the geometric
mean of the true depths of the dataset TRAINING. Scenes have a floor below and walls around, so a
network that has learnt no more than where things usually are comes to this error, too. It prints
one line of JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from constant_velocity import column, script
from torch import Tensor

from taskray.errors import InputError
from taskray.job.config import override, parse_job, read_yaml
from taskray.loop.assembly import build_task
from taskray.record.folder import CONFIG

DEPTH = "depth"


def measure(run: Path, training: str, test: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """The metrics of the mean map; InputError where there is no depth task or no true depth."""
    job = parse_job(override(read_yaml(run / CONFIG), overrides), str(run / CONFIG))
    if DEPTH not in job.tasks:
        raise InputError(f"{run / CONFIG}: tasks", f"expected a task with the name {DEPTH!r}")
    true = column(job, test, DEPTH)
    metric = build_task(job, DEPTH).metric()
    metric.update({DEPTH: mean_map(column(job, training, DEPTH)).expand_as(true)}, {DEPTH: true})
    return {key: float(value) for key, value in metric.compute().items()}


def mean_map(depth_n1hw: Tensor) -> Tensor:
    """Geometric mean over the frames that have a depth there, ``[1, 1, h, w]``; where none has
    one, that of all pixels."""
    measured = depth_n1hw > 0
    logs = depth_n1hw.clamp(min=1e-6).log() * measured
    count = measured.sum(dim=0, keepdim=True)
    everywhere = logs.sum() / measured.sum()
    mean = logs.sum(dim=0, keepdim=True) / count.clamp(min=1)
    return mean.where(count > 0, everywhere).exp()


if __name__ == "__main__":
    sys.exit(script(__doc__, measure))
