"""Whether staleness follows the mediator's window, and not the length of its dataset.

Depth and normals with small networks, supervised and consistency steps by turns, every window
with every length of the mediator, and besides

  stream   a mediator that is decoded as it goes and is longer than the run: no batch ever comes
           again in another pass. Only a window can make predictions meet on it
  all      the plain pass, for contrast: staleness follows the dataset, hits begin with pass two

  steps_mean, steps_max   age of the peer's predictions that were used, in steps of the producer;
                          mean and maximum over both directions, after warm-up
  hit_rate                of look-ups. A first walk of a window finds little, by construction
  walk, window_steps      steps of a task for one walk of a window, and for all its visits
  spread                  by window: largest steps_mean over its datasets divided by the smallest.
                          Near 1 where the dataset does not matter

Runs of another pace give other values: compare settings, not milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import (
    finish,
    local_data,
    own_ray,
    parse,
    parser,
    say,
    small_job,
    with_threads,
)
from _running import (
    Running,
    Stamp,
    ends,
)
from rich.console import Console

from taskray.run.datasets import Opener, prepare_datasets

BATCH = 2
QUICK = {
    "windows": ["4", "all"],
    "datasets": ["16", "stream"],
    "steps": 120,
    "warmup": 40,
    "frames": 64,
}


def measure(window: str, dataset: str, settings: Any, folder: Path) -> dict[str, Any]:
    """One run; ``dataset`` is a number of batches, or ``stream``."""
    streamed = dataset == "stream"
    limit = settings.frames if streamed else int(dataset) * BATCH
    job = small_job(
        f"name=window_{window}_{dataset}",
        f"steps={settings.steps}",
        f"mediator.window={window}",
        f"mediator.visits={settings.visits}",
        f"mediator.batch_size={BATCH}",
        f"tasks.depth.batch_size={BATCH}",
        f"tasks.normals.batch_size={BATCH}",
        f"data.real_video.limit={limit}",
        f"data.real_video.materialize={'never' if streamed else 'always'}",
        "runtime.chunk_steps=10",
        "checkpoint.every=1000000",
        "evaluation.data={}",
        frames=settings.frames,
    )
    job = with_threads(job)
    with Running(job, folder / job.name) as running:
        opener = Opener(job, prepare_datasets(job, True, Console(quiet=True)), use_ray=True)
        try:
            running.start_together(opener.for_training())
            running.wait_until_done()
        finally:
            opener.close()
        stamps = running.stamps
    edges = [of_edge(stamps["depth"], "normals", settings.warmup)]
    edges.append(of_edge(stamps["normals"], "depth", settings.warmup))
    width = min(limit // BATCH, limit if window == "all" else int(window))
    walked = settings.steps / 2 / (1 if window == "all" else settings.visits)
    found = {
        "window": window,
        "dataset": dataset,
        "steps_mean": sum(edge[0] for edge in edges) / len(edges),
        "steps_max": max(edge[1] for edge in edges),
        "hit_rate": sum(edge[2] for edge in edges) / len(edges),
        "walk": 2 * width,
        "window_steps": 2 * width * (1 if window == "all" else settings.visits),
        "passes": walked * BATCH / limit,
    }
    say(str(found))
    return found


def of_edge(stamps: Sequence[Stamp], peer: str, warmup: int) -> tuple[float, float, float]:
    """Mean and largest staleness in steps, and the hit rate, of one consumer after warm-up."""
    since = next(stamp.at for stamp in stamps if stamp.step >= warmup)
    window = ends(stamps, since, stamps[-1].at)
    first, last = (stamp.totals["edges"].get(peer, {}) for stamp in window)
    hits, lookups, steps = (
        last.get(key, 0) - first.get(key, 0) for key in ("hits", "lookups", "steps_sum")
    )
    oldest = [s.values.get(f"staleness/{peer}/steps_max", 0.0) for s in stamps if s.at > since]
    return steps / max(1, hits), max(oldest), hits / max(1, lookups)


def spread(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By window: how much mean staleness differs between datasets, as a ratio."""
    means: dict[str, list[float]] = {}
    for one in found:
        means.setdefault(one["window"], []).append(one["steps_mean"])
    return {w: max(values) / max(1e-9, min(values)) for w, values in means.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--windows", type=words, default=["4", "16", "64", "all"])
    options.add_argument("--datasets", type=words, default=["32", "128", "512", "stream"])
    options.add_argument("--visits", type=int, default=4, help="walks of a window")
    options.add_argument("--steps", type=int, default=1200, help="of each task")
    options.add_argument("--warmup", type=int, default=200, help="steps left out at the start")
    options.add_argument("--frames", type=int, default=1024, help="converted; the stream's length")
    settings = parse(options, arguments, QUICK)
    local_data(small_job("evaluation.data={}", frames=settings.frames))
    pairs = [(w, d) for w in settings.windows for d in settings.datasets]
    with own_ray() as folder:
        found = [
            measure(window, dataset, settings, folder)
            for window, dataset in pairs
            if not (window == "all" and dataset == "stream")
        ]
    finish("staleness_window", {"spread": spread(found), "runs": found}, settings)


def words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
