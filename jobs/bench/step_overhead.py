"""What the runtime costs: task actors against as many bare PyTorch loops, in steps per second.

Both sides train depth and normals (with ``--tasks 3`` depth, motion and segmentation) side by
side, one process and one thread each, the same networks, losses, optimizer and clipping, at the
same niceness. The actors are driven as in a
real run: chunks of steps through ``Collective``, streams of batches, checkpoints, metrics and
TensorBoard files in a run folder. The bare loops take their batches from a list in memory and
write nothing.

  supervised   every step is a supervised step, tasks are not tied
  exchange     supervised and consistency steps take turns. The actors publish and look up through
               the cache; the bare loops do the same maths on constant peer predictions in memory.
               The mediator is a plain pass over few batches, so that after the first pass every
               look-up is a hit and no step is spent on labels instead (``replaced`` shows it).

All processes live from the start; what is not measured is idle. A repetition is one
window of time for each side, in alternating order, rates taken between a task's first and last
report in the window (the two tasks train all the while). ``ratio`` is the median over
repetitions of (steps/s of all actors) / (steps/s of all bare loops); target: 0.95 each (0.93 with
three tasks).

``cpu_ms_per_step`` shows where the difference goes, and is steadier than the clock where others
use the machine: CPU time of each task's process, background threads included, and of the
``others`` (driver, cache, Ray; in the bare windows an idle Ray, which burdens both sides) by the
steps of all. Where there are more tasks than cores, the clock also shows how the kernel shared
them out: a side on which the heaviest task got more of them makes fewer steps in all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from _bare import BareLoops
from _common import (
    FRAMES,
    PAIRS,
    finish,
    local_data,
    main_job,
    median,
    own_ray,
    parse,
    parser,
    say,
    shared_data,
    small_job,
    three_tasks_job,
    with_threads,
)
from _running import Running, cpu_of, ends, others_cpu, rate

from taskray.job.config import Job

QUICK = {
    "window": 1.5, "repetitions": 1, "chunk": 5, "samples": 64, "small": True, "lead": 0.3,
    "modes": "exchange",
}  # fmt: skip
MODES = ("supervised", "exchange")


class Comparison:
    """One mode's collective and the bare loops, measured by turns."""

    def __init__(self, mode: str, running: Running, bare: BareLoops, settings: Any) -> None:
        self.mode, self.running, self.bare = mode, running, bare
        self.window, self.lead = settings.window, settings.lead
        self.rates: dict[str, list[dict[str, float]]] = {"bare": [], "actors": []}
        self.cpu: dict[str, list[dict[str, float]]] = {"bare": [], "actors": []}
        self.replaced: list[float] = []
        self.waited: list[float] = []

    def repeat(self, number: int) -> None:
        sides = [self._bare, self._actors]
        for side in sides if number % 2 == 0 else reversed(sides):
            side()
        now = {side: sum(rates[-1].values()) for side, rates in self.rates.items()}
        say(f"{self.mode} {number}: " + ", ".join(f"{k} {v:.2f} steps/s" for k, v in now.items()))

    def _bare(self) -> None:
        with self._counting_cpu("bare", self.bare.pids) as steps:
            began = time.monotonic()
            stamps = self.bare.run_for(self.mode, self.window)
            steps.update({n: s[-1].step - s[0].step for n, s in stamps.items()})
        since, until = began + self.lead, min(s[-1].at for s in stamps.values())
        self.rates["bare"].append({n: rate(s, since, until) for n, s in stamps.items()})

    def _actors(self) -> None:
        before = self._actor_steps()
        with self._counting_cpu("actors", self.running.recorder.pids) as steps:
            since, until = self.running.run_for(self.window, self.lead)
            steps.update({n: step - before[n] for n, step in self._actor_steps().items()})
        self.rates["actors"].append(
            {n: rate(s, since, until) for n, s in self.running.stamps.items()}
        )
        for stamps in self.running.stamps.values():
            first, last = (stamp.totals for stamp in ends(stamps, since, until))
            tied = last.consistency_steps - first.consistency_steps
            replaced = last.replaced_by_supervised - first.replaced_by_supervised
            waited = last.wait_seconds - first.wait_seconds
            self.replaced.append(replaced / max(1, tied))
            self.waited.append(waited / (last.train_seconds - first.train_seconds))

    def _actor_steps(self) -> dict[str, int]:
        return self.running.ask(lambda actor: actor.member.trainer.steps_made)

    @contextmanager
    def _counting_cpu(self, side: str, pids: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """CPU time per step of each task in the block, which fills in how many steps it made."""
        everyone = [*self.bare.pids.values(), *self.running.recorder.pids.values()]
        training = {name: cpu_of([pid]) for name, pid in pids.items()}
        others, steps = others_cpu(everyone), dict[str, int]()
        yield steps
        used = {name: cpu_of([pid]) - training[name] for name, pid in pids.items()}
        spent = others_cpu(everyone) - others
        self.cpu[side].append(
            {name: 1e3 * used[name] / steps[name] for name in steps}
            | {"others": 1e3 * spent / sum(steps.values())}
        )

    def result(self) -> dict[str, Any]:
        totals = {s: [sum(r.values()) for r in rates] for s, rates in self.rates.items()}
        ratios = [a / b for a, b in zip(totals["actors"], totals["bare"], strict=True)]
        of_task = {
            name: median(
                a[name] / b[name]
                for a, b in zip(self.rates["actors"], self.rates["bare"], strict=True)
            )
            for name in self.running.job.tasks
        }
        return {
            "ratio": median(ratios),
            "ratios": ratios,
            "ratio_of_task": of_task,
            "steps_per_second": {side: median(values) for side, values in totals.items()},
            "cpu_ms_per_step": {
                side: {key: median(one[key] for one in cpu) for key in cpu[0]}
                for side, cpu in self.cpu.items()
            },
            "replaced": max(self.replaced),
            "wait_fraction": median(self.waited),
        }


def jobs_of(settings: Any) -> dict[str, Job]:
    """The two jobs: tied and not."""
    if settings.tasks == 3:
        make, labelled, unlabelled, relation = three_tasks_job, FRAMES, PAIRS, "scene"
    else:
        make = small_job if settings.small else main_job
        labelled, unlabelled, relation = "sim_train", "real_video", "depth_normals"
    common = [
        "steps=100000000",
        f"runtime.chunk_steps={settings.chunk}",
        f"checkpoint.every={settings.checkpoint_every}",
        f"data.{labelled}.limit={settings.samples * 4}",
        f"data.{unlabelled}.limit={settings.samples}",
        "mediator.window=all",
        "evaluation.data={}",
        f"consistency.{relation}.warmup_steps=0",
    ]
    alone = f"consistency.{relation}.weight=0"
    return {
        "supervised": with_threads(make(*common, "name=supervised", alone)),
        "exchange": with_threads(make(*common, "name=exchange")),
    }


def niceness(running: Running) -> int:
    """That of the task actors."""
    found: int = next(iter(running.ask(lambda actor: os.nice(0)).values()))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--window", type=float, default=20.0, help="seconds of each window")
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--chunk", type=int, default=25, help="steps between two reports")
    options.add_argument("--samples", type=int, default=256, help="frames of the mediator")
    options.add_argument("--lead", type=float, default=2.0, help="seconds of a window left out")
    options.add_argument("--checkpoint-every", type=int, default=100, help="steps, as in the job")
    options.add_argument("--modes", default=",".join(MODES), help="which of the two")
    options.add_argument("--tasks", type=int, choices=(2, 3), default=2)
    options.add_argument("--small", action="store_true", help="small frames and networks")
    settings = parse(options, arguments, QUICK)
    os.environ["OMP_NUM_THREADS"] = "1"  # the bare loops inherit it; Ray sets it for its workers
    jobs = {m: job for m, job in jobs_of(settings).items() if m in settings.modes.split(",")}
    local_data(jobs_of(settings)["exchange"])  # converts the datasets, where they are not yet
    with own_ray() as folder, ExitStack() as stack:
        running = {m: stack.enter_context(Running(j, folder / m)) for m, j in jobs.items()}
        for mode, collective in running.items():
            collective.start(shared_data(jobs[mode]))
        nice = niceness(next(iter(running.values())))
        bare = BareLoops(jobs_of(settings)["exchange"], nice, settings.chunk)
        stack.callback(bare.close)
        bare.wait_until_ready()
        for mode, collective in running.items():
            warm(collective, settings)
            say(f"{mode}: actors are warm (nice {nice})")
        comparisons = [Comparison(m, r, bare, settings) for m, r in running.items()]
        for number in range(settings.repetitions):
            for comparison in comparisons:
                comparison.repeat(number)
        result = {c.mode: c.result() for c in comparisons}
    target = 0.95 if settings.tasks == 2 else 0.93
    finish("step_overhead", {**result, "target_ratio": target, "nice": nice}, settings)


def warm(collective: Running, settings: Any) -> None:
    """One pass over the mediator, so that every look-up is a hit, and stand still."""
    visits = settings.samples // 8
    collective.wait_for_reports(2 + 2 * visits // settings.chunk)
    collective.pause()


if __name__ == "__main__":
    main()
