"""Whether staleness follows the mediator's window: not the length of its dataset, and not the
ratio of the tasks' speeds.

Depth and normals with small networks, both labelled, supervised and consistency steps by turns.

``runs``: two tasks of equal speed, every window with every length of the mediator, and besides

  stream   a mediator that is decoded as it goes and is longer than the run: no batch comes again
           in another window. Only a window can make predictions meet on it
  all      the plain pass, for contrast: staleness follows the dataset, hits begin with pass two

``ratios``: depth is ``ratio`` times as fast as normals, on the stream. The network of normals is
the same and sleeps ``delay_ms`` in each forward pass: ``ratio`` - 1 times the time of a step of the
run with equal tasks (the first of ``ratios``). ``measured_ratio`` is that of the steps per second,
each between a task's first report and its last. Both end at about the same time.

  steps_mean, steps_max   age of the peer's predictions that were used, in steps of the producer
  bound                   the largest age that the window lets through: one pass of the producer,
                          and what is under way
  hit_rate                of look-ups. A first pass over a window finds little, by construction
  later_hit_rate          of look-ups after the task's own first pass over a window
  misses                  look-ups without a usable prediction, by reason
  replaced                consistency steps that were spent on labels instead
  pass_steps              steps of a task for one pass over a window
  spread                  by window: largest steps_mean over its datasets divided by the smallest.
                          Near 1 where the dataset does not matter

Each value is of one consumer, whose name is the key (depth uses predictions of normals). Runs of
another pace give other values: compare settings, not milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import (
    finish,
    local_data,
    numbers,
    own_ray,
    parse,
    parser,
    say,
    small_job,
    with_threads,
)
from _running import Running, rate
from rich.console import Console

from taskray.data.streams.batch import Batch
from taskray.job.config import Job
from taskray.loop.interfaces import PeerPredictions
from taskray.run.datasets import Opener, prepare_datasets

BATCH = 2
STREAM = "stream"
FAST, SLOW = "depth", "normals"
PEER = {FAST: SLOW, SLOW: FAST}
QUICK = {
    "windows": [], "datasets": [], "ratios": [4], "ratio_window": 4, "slow_steps": 30, "frames": 64,
}  # fmt: skip


def make_job(window: str, dataset: str, settings: Any, *overrides: str) -> Job:
    """Two tasks of equal speed; ``dataset`` is a number of batches, or ``stream``."""
    streamed = dataset == STREAM
    job = small_job(
        f"steps={settings.steps}",
        f"mediator.window={window}",
        f"mediator.visits={settings.visits}",
        f"mediator.batch_size={BATCH}",
        f"tasks.{FAST}.batch_size={BATCH}",
        f"tasks.{SLOW}.batch_size={BATCH}",
        f"data.real_video.limit={settings.frames if streamed else int(dataset) * BATCH}",
        f"data.real_video.materialize={'never' if streamed else 'always'}",
        "runtime.chunk_steps=10",
        "checkpoint.every=1000000",
        "evaluation.data={}",
        f"name=window_{window}_{dataset}",
        *overrides,
        frames=settings.frames,
    )
    return with_threads(job)


def train(job: Job, folder: Path) -> dict[str, dict[str, Any]]:
    """One run; what each task found, and its steps per second."""
    with Running(job, folder / job.name) as running:
        opener = Opener(job, prepare_datasets(job, True, Console(quiet=True)), use_ray=True)
        try:
            running.start_together(opener.for_training(), count_later_look_ups)
            running.wait_until_done()
        finally:
            opener.close()
        later = running.ask(lambda actor: actor.later)
        stamps = running.stamps
    found = {}
    for name, peer in PEER.items():
        totals = stamps[name][-1].totals
        edge, (hits, look_ups) = totals.edges[peer], later[name]
        found[name] = {
            **edge.summary(),
            "bound": edge.bound,
            "later_hit_rate": hits / max(1, look_ups),
            "misses": edge.misses,
            "replaced": totals.replaced_by_supervised,
            "consistency_steps": totals.consistency_steps,
            "steps_per_second": rate(stamps[name], stamps[name][0].at, stamps[name][-1].at),
        }
    return found


def count_later_look_ups(actor: Any) -> None:
    """In the process of a task: count the look-ups after its own first pass over a window, and
    their hits, from now on."""
    collect, later = actor.peers.collect, [0, 0]

    def collect_and_count(batch: Batch, step: int) -> PeerPredictions:
        found: PeerPredictions = collect(batch, step)
        if batch.place.visit >= batch.place.size:
            later[0] += bool(found.by_quantity)
            later[1] += 1
        return found

    actor.peers.collect, actor.later = collect_and_count, later


def measure(window: str, dataset: str, settings: Any, folder: Path) -> dict[str, Any]:
    """One run of two tasks of equal speed."""
    tasks = train(make_job(window, dataset, settings), folder)
    limit = settings.frames if dataset == STREAM else int(dataset) * BATCH
    width = limit // BATCH if window == "all" else min(int(window), limit // BATCH)
    visits = 1 if window == "all" else settings.visits
    found = {
        "window": window,
        "dataset": dataset,
        "steps_mean": sum(task["steps_mean"] for task in tasks.values()) / len(tasks),
        "steps_max": max(task["steps_max"] for task in tasks.values()),
        "bound": tasks[FAST]["bound"],
        "hit_rate": sum(task["hit_rate"] for task in tasks.values()) / len(tasks),
        "later_hit_rate": sum(task["later_hit_rate"] for task in tasks.values()) / len(tasks),
        "pass_steps": 2 * width,
        "passes_over_dataset": settings.steps / 2 / visits * BATCH / limit,
        "tasks": tasks,
    }
    say(str(found))
    return found


def measure_ratio(ratio: int, delay: float, settings: Any, folder: Path) -> dict[str, Any]:
    """One run of two tasks of which one is slower, on the stream."""
    job = make_job(
        str(settings.ratio_window),
        STREAM,
        settings,
        f"name=ratio_{ratio}",
        f"tasks.{FAST}.steps={ratio * settings.slow_steps}",
        f"tasks.{SLOW}.steps={settings.slow_steps}",
        f"tasks.{SLOW}.model={{name: '_delayed:Delayed', base: 8, seconds: {delay:.6f}}}",
    )
    tasks = train(job, folder)
    found = {
        "ratio": ratio,
        "measured_ratio": tasks[FAST]["steps_per_second"] / tasks[SLOW]["steps_per_second"],
        "delay_ms": 1e3 * delay,
        "window": settings.ratio_window,
        "tasks": tasks,
    }
    say(str(found))
    return found


def measure_ratios(settings: Any, folder: Path) -> list[dict[str, Any]]:
    """Equal tasks first: the delays of the slower ones are multiples of their step."""
    equal = measure_ratio(1, 0.0, settings, folder)
    step = 1 / max(task["steps_per_second"] for task in equal["tasks"].values())
    others = [ratio for ratio in settings.ratios if ratio != 1]
    return [equal, *(measure_ratio(r, (r - 1) * step, settings, folder) for r in others)]


def spread(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By window: how much mean staleness differs between datasets, as a ratio."""
    means: dict[str, list[float]] = {}
    for one in found:
        means.setdefault(one["window"], []).append(one["steps_mean"])
    return {w: max(values) / max(1e-9, min(values)) for w, values in means.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--windows", type=words, default=["4", "16", "64", "all"])
    options.add_argument("--datasets", type=words, default=["32", "128", "512", STREAM])
    options.add_argument("--visits", type=int, default=4, help="passes over a window")
    options.add_argument("--steps", type=int, default=1200, help="of each of two equal tasks")
    options.add_argument("--ratios", type=numbers, default=[1, 2, 4, 10], help="of speeds")
    options.add_argument("--ratio-window", type=int, default=16, help="window of the ratios")
    options.add_argument("--slow-steps", type=int, default=400, help="of the slower task")
    options.add_argument("--frames", type=int, default=1024, help="converted; the stream's length")
    settings = parse(options, arguments, QUICK)
    local_data(small_job("evaluation.data={}", frames=settings.frames))
    pairs = [(w, d) for w in settings.windows for d in settings.datasets]
    with own_ray() as folder:
        ratios = measure_ratios(settings, folder)
        found = [
            measure(window, dataset, settings, folder)
            for window, dataset in pairs
            if not (window == "all" and dataset == STREAM)
        ]
    result = {"ratios": ratios, "spread": spread(found), "runs": found}
    finish("staleness_window", result, settings)


def words(text: str) -> list[str]:
    """``a,b,c`` as an argument."""
    return [part for part in text.split(",") if part]


if __name__ == "__main__":
    main()
