"""How long training waits for data or peers, as a fraction of its time: target 0.02 at most.

The main job without evaluation, twice: with both datasets decoded once in the object store
(``materialised``), and with both decoded again for every pass (``streamed``). The run is long
enough for several passes over either dataset, whose boundaries are where a pipeline stalls.

  wait_fraction      what the loops' own meters count (waiting for a batch or an answer of peers),
                     of the wall-clock time between reports: after warm-up, larger of the tasks
  blocked_fraction   the same from the outside: the share of wall-clock time in which the training
                     thread neither ran nor was ready to run, by the kernel's account. It also
                     contains locks and the gaps between chunks, so it bounds the meters from above
  between_chunks     the share of wall-clock time between two chunks (report, checkpoint, driver)
  worst_chunk        seconds waited in the worst single chunk: what a pass boundary costs
  passes             passes completed over the dedicated and the mediator dataset
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import (
    finish,
    main_job,
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
    rate,
)
from rich.console import Console

from taskray.job.config import Job
from taskray.run.datasets import Opener, prepare_datasets

QUICK = {
    "steps": 50,
    "warmup": 15,
    "samples": 128,
    "mediator": 64,
    "small": True,
    "modes": "streamed",
}
MODES = {"materialised": "always", "streamed": "never"}


def make_job(mode: str, settings: Any) -> Job:
    make = small_job if settings.small else main_job
    job = make(
        f"name={mode}",
        f"steps={settings.steps}",
        f"data.sim_train.materialize={MODES[mode]}",
        f"data.real_video.materialize={MODES[mode]}",
        f"data.sim_train.limit={settings.samples}",
        f"data.real_video.limit={settings.mediator}",
        "evaluation.data={}",
        *(["runtime.chunk_steps=5"] if settings.quick else []),
    )
    return with_threads(job)


def measure(mode: str, settings: Any, folder: Path) -> dict[str, Any]:
    job = make_job(mode, settings)
    with Running(job, folder / mode) as running:
        paths = prepare_datasets(job, use_ray=True, console=Console(quiet=True))
        opener = Opener(job, paths, use_ray=True)
        try:
            running.start_together(opener.for_training())
            running.wait_until_done()
        finally:
            opener.close()
        stamps = running.stamps
    tasks = {name: of_task(job, name, ss, settings.warmup) for name, ss in stamps.items()}
    worst = {
        key: max(task[key] for task in tasks.values())
        for key in ("wait_fraction", "blocked_fraction", "between_chunks", "worst_chunk")
    }
    say(f"{mode}: {worst}")
    return {**worst, "tasks": tasks}


def of_task(job: Job, name: str, stamps: Sequence[Stamp], warmup: int) -> dict[str, Any]:
    """One task's fractions of the time from its warm-up to its last step."""
    assert job.mediator is not None
    since = next(stamp.at for stamp in stamps if stamp.step >= warmup)
    first, last = ends(stamps, since, stamps[-1].at)
    wall = last.at - first.at

    def gained(key: str) -> float:
        return float(getattr(last.totals, key) - getattr(first.totals, key))

    waited = [s.totals.wait_seconds for s in stamps if s.at >= since]
    frames, shared = job.data["sim_train"].limit or 1, job.data["real_video"].limit or 1
    visits = job.mediator.visits * shared / job.mediator.batch_size
    return {
        "wait_fraction": gained("wait_seconds") / wall,
        "blocked_fraction": 1 - (last.busy - first.busy) / wall,
        "between_chunks": 1 - gained("train_seconds") / wall,
        "worst_chunk": max(b - a for a, b in pairwise(waited)),
        "seconds": wall,
        "steps_per_second": rate(stamps, since, last.at),
        "replaced": gained("replaced_by_supervised") / max(1, gained("consistency_steps")),
        "passes": {
            "dedicated": gained("supervised_steps") * job.tasks[name].batch_size / frames,
            "mediator": gained("consistency_steps") / visits,
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=2000, help="of each task")
    options.add_argument("--warmup", type=int, default=200, help="steps left out at the start")
    options.add_argument(
        "--samples", type=int, default=1024, help="frames of the dedicated dataset"
    )
    options.add_argument("--mediator", type=int, default=256, help="frames of the mediator")
    options.add_argument("--modes", default=",".join(MODES), help="which of the two")
    options.add_argument("--small", action="store_true", help="small frames and networks")
    settings = parse(options, arguments, QUICK)
    with own_ray() as folder:
        result = {mode: measure(mode, settings, folder) for mode in settings.modes.split(",")}
    finish("data_wait", {**result, "target_wait_fraction": 0.02}, settings)


if __name__ == "__main__":
    main()
