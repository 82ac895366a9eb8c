"""Pillar encoding on one core: milliseconds from the points of a sweep to the map seen from above.

The encoder of PointPillars on the paper's grid (468 x 468 pillars of 0.32 m, 64 channels), one
thread, no gradient, random weights. A sweep has ``--points`` points, denser near the sensor as
those of a spinning LiDAR are: ``rings`` of equal steps in angle, with ranges up to the edge of
the grid. ``spread`` is the same number evenly over the grid, which no sensor gives and which has
the most pillars to write.

``milliseconds`` is the median over repetitions after a warm-up, of ``rings``, and ``cpu_ms`` that
of the CPU time, which is the same on an idle machine and steadier on any other. The map is written
where points fell; unwritten memory is cleared when the backbone first reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from _common import finish, median, parse, parser, say
from torch import Tensor

from taskray.geometry.grid import Grid
from taskray.models.pillar_encoder import PillarEncoder

QUICK = {"repetitions": 2, "warm_up": 1}
TARGET_MS = 30.0


def rings(number: int, reach: float) -> Tensor:
    """A sweep ``[1, number, 4]`` with as many points at 1 m as at 10 m or 70 m."""
    rng = np.random.default_rng(0)
    distance = 2.0 + (reach - 2.0) * rng.random(number) ** 2
    angle = 2 * np.pi * rng.random(number)
    columns = [distance * np.cos(angle), distance * np.sin(angle), -1.7 + 2 * rng.random(number)]
    return torch.from_numpy(np.stack([*columns, rng.random(number)], axis=1)[None]).float()


def spread(number: int, reach: float) -> Tensor:
    """A sweep ``[1, number, 4]`` with points everywhere."""
    rng = np.random.default_rng(0)
    low = np.array([-reach, -reach, -2.0, 0.0])
    high = np.array([reach, reach, 0.5, 1.0])
    return torch.from_numpy(low + (high - low) * rng.random((1, number, 4))).float()


def measure(act: Callable[[], Any], settings: Any) -> dict[str, float]:
    """What a call takes after the warm-up, by the clock and of the CPU; its result is dropped."""
    clock, cpu = [], []
    for number in range(settings.warm_up + settings.repetitions):
        since, busy = time.perf_counter(), time.thread_time()
        act()
        if number >= settings.warm_up:
            cpu.append((time.thread_time() - busy) * 1e3)
            clock.append((time.perf_counter() - since) * 1e3)
    p90 = float(np.percentile(clock, 90))
    return {"ms": median(clock), "ms_p90": p90, "ms_fastest": min(clock), "cpu_ms": median(cpu)}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--points", type=int, default=20_000)
    options.add_argument("--channels", type=int, default=64)
    options.add_argument("--repetitions", type=int, default=50)
    options.add_argument("--warm-up", type=int, default=5)
    settings = parse(options, arguments, QUICK)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grid = Grid()
    encoder = PillarEncoder(4, settings.channels, grid).eval()
    result: dict[str, Any] = {"grid": list(grid.shape), "target_ms": TARGET_MS}
    for make in (rings, spread):
        points = make(settings.points, grid.x[1])
        cells, inside = grid.cells_of(points)
        result[make.__name__] = {
            **measure(lambda p=points: encoder(p), settings),
            "points_on_the_grid": int(inside.sum()),
            "pillars": len(cells[inside].unique()),
        }
        say(f"{make.__name__}: {result[make.__name__]}")
    headline = {"milliseconds": result["rings"]["ms"], "cpu_ms": result["rings"]["cpu_ms"]}
    finish("pillars", headline | result, settings)


if __name__ == "__main__":
    main()
