"""Tasks that cost unequally: does a heavy one hold up a light one? (Taskology, supplement 6.4)

Depth and normals train side by side, a process and a thread each. Normals has the network of the
job (``equal``) or the mean of three of them, which takes three times as long (``unequal``); depth
is the same in both. Each pair of tasks trains

  asynchronous   predictions may be of any age, as in the job
  lock_step      ``staleness: {max_steps: 0, on_stale: wait}``: the synchronous algorithm

and depth's rate of steps with the heavy peer is divided by that with the light one. ``light``
should stay within 3 % of 1 where tasks are asynchronous. In lock-step depth falls to the rate of
the slower one: ``light_over_heavy``, depth's rate over that of normals, is 1 there, and
``heaviness`` (how much longer a step of the heavy task takes) where they are asynchronous.

The mediator is a plain pass over few batches, so that after the first pass every look-up is a hit
and depth does the same work whatever its peer does. All four collectives live from the start and
train by turns, one window of time each in every repetition; the rest are idle. It needs a core for
each of the two tasks, and no other work on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from _common import (
    finish,
    main_job,
    median,
    own_ray,
    parse,
    parser,
    say,
    shared_data,
    small_job,
    with_threads,
)
from _running import Running, rate

from taskray.job.config import Job

MODES = {
    "asynchronous": (),
    "lock_step": ("staleness={max_steps: 0, on_stale: wait, wait_seconds: 3600}",),
}
PAIRS = ("equal", "unequal")
LIGHT, HEAVY = "depth", "normals"
QUICK = {
    "window": 1.0, "repetitions": 1, "lead": 0.2, "samples": 32, "chunk": 5, "small": True,
    "modes": "asynchronous",
}  # fmt: skip

Rates = dict[str, dict[str, float]]
"""Of each pair: steps per second of each task, in one repetition."""


def make_job(mode: str, pair: str, settings: Any) -> Job:
    """The main job, with the mediator as a plain pass and one or more networks for normals."""
    make, width = (small_job, 8) if settings.small else (main_job, 16)
    members = settings.members if pair == "unequal" else 1
    job = make(
        f"name={mode}_{pair}",
        "steps=100000000",
        "checkpoint.every=100000000",
        f"runtime.chunk_steps={settings.chunk}",
        f"data.sim_train.limit={settings.samples}",
        f"data.real_video.limit={settings.samples}",
        "mediator.window=all",
        "evaluation.data={}",
        "consistency.depth_normals.warmup_steps=0",
        f"tasks.{HEAVY}.model={{name: '_ensemble:Ensemble', base: {width}, members: {members}}}",
        *MODES[mode],
    )
    return with_threads(job)


def warm(running: Running, settings: Any) -> None:
    """One pass over the mediator, so that every look-up is a hit, and stand still."""
    running.wait_for_reports(2 + 2 * (settings.samples // 8) // settings.chunk)
    running.pause()


def summary(rates: Sequence[Rates]) -> dict[str, Any]:
    """What the repetitions of one mode tell."""
    return {
        "light": median(r["unequal"][LIGHT] / r["equal"][LIGHT] for r in rates),
        "heaviness": median(r["equal"][HEAVY] / r["unequal"][HEAVY] for r in rates),
        "light_over_heavy": median(r["unequal"][LIGHT] / r["unequal"][HEAVY] for r in rates),
        "steps_per_second": {
            pair: {task: median(r[pair][task] for r in rates) for task in (LIGHT, HEAVY)}
            for pair in PAIRS
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--window", type=float, default=20.0, help="seconds of each window")
    options.add_argument("--lead", type=float, default=2.0, help="seconds of a window left out")
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--chunk", type=int, default=10, help="steps between two reports")
    options.add_argument("--samples", type=int, default=128, help="frames of each dataset")
    options.add_argument("--members", type=int, default=3, help="networks of the heavy one")
    options.add_argument("--modes", default=",".join(MODES), help="which of the two")
    options.add_argument("--small", action="store_true", help="small frames and networks")
    settings = parse(options, arguments, QUICK)
    rates: dict[str, list[Rates]] = {mode: [] for mode in settings.modes.split(",")}
    with own_ray() as folder, ExitStack() as stack:
        running = {}
        for mode in rates:
            for pair in PAIRS:
                job = make_job(mode, pair, settings)
                one = stack.enter_context(Running(job, folder / job.name))
                one.start(shared_data(job))
                warm(one, settings)
                say(f"{job.name} is warm")
                running[mode, pair] = one
        for number in range(settings.repetitions):
            for mode in rates:
                now: Rates = {}
                for pair in PAIRS if number % 2 == 0 else reversed(PAIRS):
                    one = running[mode, pair]
                    since, until = one.run_for(settings.window, settings.lead)
                    now[pair] = {n: rate(s, since, until) for n, s in one.stamps.items()}
                rates[mode].append(now)
                say(f"{mode} {number}: {now}")
    result = {mode: summary(found) for mode, found in rates.items()}
    finish("unequal_tasks", {**result, "target_light": 0.97}, settings)


if __name__ == "__main__":
    main()
