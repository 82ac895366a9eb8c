"""What fills the cache: each trainer with its own forward pass, or forward servers on demand.

  trainer        ``publisher: trainer``: what a task predicts in its own step serves all (ours)
  server_reuse   ``publisher: forward_server``, ``reuse: true``: a server predicts once for each
                 copy of its weights and batch
  server         ``publisher: forward_server``, ``reuse: false``: every look-up asks every peer's
                 server for a forward pass (the paper's scheme)

2, 3 and 6 tasks: depth and normals by turns, under names of their own (depth_a, normals_a,
depth_b ...), small networks on small frames. A task asks every peer that predicts the other
quantity, so N tasks have ``edges`` = 2 * floor(N/2) * ceil(N/2) pairs of consumer and producer,
and a visit of a mediator batch by all of them costs N forward passes with ``trainer`` and
N + edges with ``server``: it grows with the square of N.

  steps_per_second     steps of all tasks together, in wall-clock time
  forwards_per_visit   forward passes of trainers (consistency steps) and servers, divided by
                       consistency steps and multiplied by N: per visit of a batch by all tasks
  against_trainer      steps per second divided by those of ``trainer``: median over repetitions

The three collectives of one N live at once and train by turns, each repetition one window of
time. Their actors share the cores, so extra work of a scheme slows all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _common import (
    PATIENCE,
    finish,
    median,
    numbers,
    own_ray,
    parse,
    parser,
    say,
    shared_data,
    small_job,
    with_threads,
)
from _running import (
    Running,
    rate,
)

from taskray.job.config import Job

SCHEMES = {
    "trainer": ("runtime.publisher=trainer",),
    "server_reuse": ("runtime.publisher=forward_server", "forward_server.reuse=true"),
    "server": ("runtime.publisher=forward_server", "forward_server.reuse=false"),
}
QUICK = {
    "tasks": [2], "window": 1.0, "repetitions": 1, "lead": 0.2, "frames": 64,
    "schemes": "trainer,server",
}  # fmt: skip


def make_job(scheme: str, num_tasks: int, settings: Any) -> Job:
    """The small job with so many tasks: depth_a, normals_a, depth_b, normals_b ..."""
    job = small_job(
        f"name={scheme}_{num_tasks}",
        "steps=100000000",
        "checkpoint.every=1000000",
        f"runtime.chunk_steps={settings.chunk}",
        "evaluation.data={}",
        *SCHEMES[scheme],
        frames=settings.frames,
    )
    names = [(("depth", "normals")[i % 2], "abcdefgh"[i // 2]) for i in range(num_tasks)]
    tasks = {f"{task}_{letter}": job.tasks[task] for task, letter in names}
    return with_threads(job.model_copy(update={"tasks": tasks}))


def forwards(running: Running) -> tuple[int, int]:
    """Consistency steps of all trainers (each one forward pass), and forward passes of all
    servers, while all stand still."""
    import ray

    own = running.ask(lambda actor: actor.member.trainer.meter.totals.consistency_steps)
    served = [server.statistics.remote() for server in running.collective.roster.servers.values()]
    passes = [found["forward_passes"] for found in ray.get(served, timeout=PATIENCE)]
    return sum(own.values()), sum(passes)


def measure(num_tasks: int, settings: Any, folder: Path) -> dict[str, Any]:
    names = settings.schemes.split(",")
    speeds: dict[str, list[float]] = {scheme: [] for scheme in names}
    passes: dict[str, list[float]] = {scheme: [] for scheme in names}
    with ExitStack() as stack:
        running = {}
        for scheme in names:
            job = make_job(scheme, num_tasks, settings)
            running[scheme] = stack.enter_context(Running(job, folder / job.name))
            running[scheme].start(shared_data(job))
        for one in running.values():
            one.wait_for_reports(3)
            one.pause()
        for _ in range(settings.repetitions):
            for scheme, one in running.items():
                own, served = forwards(one)
                since, until = one.run_for(settings.window, settings.lead)
                own_after, served_after = forwards(one)
                speeds[scheme].append(sum(rate(s, since, until) for s in one.stamps.values()))
                share = (served_after - served) / max(1, own_after - own)
                passes[scheme].append(num_tasks * (1 + share))
    schemes = {
        scheme: {
            "steps_per_second": median(speeds[scheme]),
            "forwards_per_visit": median(passes[scheme]),
            "against_trainer": median(
                a / b for a, b in zip(speeds[scheme], speeds["trainer"], strict=True)
            ),
        }
        for scheme in names
    }
    say(f"{num_tasks} tasks: {schemes}")
    return {"edges": 2 * (num_tasks // 2) * ((num_tasks + 1) // 2), **schemes}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", type=numbers, default=[2, 3, 6], help="numbers of tasks")
    options.add_argument("--schemes", default=",".join(SCHEMES), help="trainer and others")
    options.add_argument("--window", type=float, default=6.0, help="seconds of each window")
    options.add_argument("--lead", type=float, default=1.0, help="seconds of a window left out")
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--chunk", type=int, default=5, help="steps between two reports")
    options.add_argument("--frames", type=int, default=256, help="frames of each dataset")
    settings = parse(options, arguments, QUICK)
    with own_ray() as folder:
        result = {str(n): measure(n, settings, folder) for n in settings.tasks}
    finish("publishers", {"num_tasks": result}, settings)


if __name__ == "__main__":
    main()
