"""What the runtime costs: two task actors against two bare PyTorch loops, in steps per second.

Both sides train depth and normals side by side, one process and one thread each, the same
networks, losses, optimizer and clipping, at the same niceness. The actors are driven as in a
real run: chunks of steps through ``Collective``, streams of batches, checkpoints, metrics and
TensorBoard files in a run folder. The bare loops take their batches from a list in memory and
write nothing.

  supervised   every step is a supervised step, tasks are not tied
  exchange     supervised and consistency steps take turns. The actors publish and look up through
               the cache; the bare loops do the same maths on constant peer predictions in memory.
               The mediator is a plain pass over few batches, so that after the first pass every
               look-up is a hit and no step is spared its backward pass (``skipped`` shows it).

All processes live from the start; whoever is not measured stands still. A repetition is one
window of time for each side, in alternating order, rates taken between a task's first and last
report in the window (the two tasks train all the while). ``ratio`` is the median over
repetitions of (steps/s of both actors) / (steps/s of both bare loops); target: 0.95 each.
``others_cpu`` is the CPU time of everything that does not train (driver, cache, Ray), as a
fraction of one core: in the bare windows that is what an idle Ray costs both sides.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import torch
from _common import (
    PATIENCE,
    Running,
    Stamp,
    ends,
    finish,
    local_data,
    main_job,
    median,
    others_cpu,
    own_ray,
    parse,
    parser,
    rate,
    say,
    shared_data,
    small_job,
    with_threads,
)
from torch import Tensor, nn

from taskray.config import Job, parse_job
from taskray.data.batch import Batch
from taskray.data.streams import DedicatedStream, plain_batches
from taskray.loop.assembly import (
    build_model,
    build_relations,
    build_task,
    mediator_columns,
    seed_of,
)
from taskray.loop.optimization import build_optimizer

QUICK = {"window": 1.5, "repetitions": 1, "chunk": 5, "samples": 64, "small": True, "lead": 0.3}
MODES = ("supervised", "exchange")


# ---- the bare side ----------------------------------------------------------------------------


class BareLoop:
    """One task as one would write it by hand, with its batches in memory."""

    def __init__(self, job: Job, name: str, num_batches: int = 64) -> None:
        assert job.mediator is not None
        torch.set_num_threads(job.tasks[name].threads or 1)
        config = job.tasks[name]
        self.task, self.clip = build_task(job, name), config.optimizer.clip_norm
        self.model = build_model(job, name, self.task)
        self.optimizer = build_optimizer(self.model.parameters(), config.optimizer)
        relations = build_relations(job, self.task)
        self.relations = [(r.relation, r.config.weight) for r in relations]
        data = local_data(job)
        assert config.dedicated is not None
        columns = (*self.task.inputs, *self.task.labels)
        source = data[config.dedicated].open()
        dedicated = DedicatedStream(source, config.batch_size, seed_of(job, name), columns)
        self.labelled = [dedicated.next().tensors for _ in range(num_batches)]
        dedicated.close()
        mediator = plain_batches(
            data[job.mediator.data].open(),
            job.mediator.batch_size,
            mediator_columns(self.task, relations),
        )
        self.unlabelled = [b.tensors for b in islice(mediator, num_batches) if _full(b, job)]
        self.peers = [self._peers(job, name, batch) for batch in self.unlabelled]
        self.step = 0

    @torch.no_grad()
    def _peers(self, job: Job, name: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for other in job.tasks:
            if other != name:
                task = build_task(job, other)
                found |= task.predict(build_model(job, other, task)(task.network_input(batch)))
        return found

    def supervised(self) -> Tensor:
        batch = self.labelled[self.step % len(self.labelled)]
        prediction = self.task.predict(self.model(self.task.network_input(batch)))
        return torch.stack(list(self.task.loss(prediction, batch).values())).sum()

    def consistency(self) -> Tensor:
        number = self.step // 2 % len(self.unlabelled)
        batch, peers = self.unlabelled[number], self.peers[number]
        prediction = self.task.predict(self.model(self.task.network_input(batch)))
        known = {**peers, **prediction}
        losses = [w * torch.stack(list(r(known, batch).values())).sum() for r, w in self.relations]
        return torch.stack(losses).sum()

    def steps(self, mode: str, count: int) -> None:
        for _ in range(count):
            tied = mode == "exchange" and self.step % 2 == 1
            loss = self.consistency() if tied else self.supervised()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.step += 1


def _full(batch: Batch, job: Job) -> bool:
    assert job.mediator is not None
    return len(batch.tensors["image"]) == job.mediator.batch_size


def bare_process(
    job: dict[str, Any], name: str, nice: int, pipe: Connection, barrier: Any, chunk: int
) -> None:
    """Serves ``(mode, seconds)`` with the stamps of a window, until it is terminated."""
    os.nice(nice - os.nice(0))
    loop = BareLoop(parse_job(job, "job"), name)
    pipe.send(os.getpid())
    while True:
        mode, seconds = pipe.recv()
        stamps = []
        barrier.wait(PATIENCE)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            loop.steps(mode, chunk)
            stamps.append((time.monotonic(), loop.step))
        pipe.send(stamps)


class BareLoops:
    """All tasks of a job as bare loops, each in a process of its own."""

    def __init__(self, job: Job, nice: int, chunk: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.barrier = spawn.Barrier(len(job.tasks))
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        for name in job.tasks:
            self.pipes[name], theirs = spawn.Pipe()
            given = (job.model_dump(mode="json"), name, nice, theirs, self.barrier, chunk)
            process = spawn.Process(target=bare_process, args=given, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)

    def wait_until_ready(self) -> None:
        self.pids = [self._receive(pipe) for pipe in self.pipes.values()]

    def run_for(self, mode: str, seconds: float) -> dict[str, list[Stamp]]:
        for pipe in self.pipes.values():
            pipe.send((mode, seconds))
        return {
            name: [Stamp(at, step, {}) for at, step in self._receive(pipe)]
            for name, pipe in self.pipes.items()
        }

    def _receive(self, pipe: Connection) -> Any:
        if not pipe.poll(PATIENCE):
            raise SystemExit("a bare loop does not answer")
        return pipe.recv()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join(10.0)


# ---- the two sides, by turns ------------------------------------------------------------------


class Comparison:
    """One mode's collective and the bare loops, measured by turns."""

    def __init__(self, mode: str, running: Running, bare: BareLoops, settings: Any) -> None:
        self.mode, self.running, self.bare = mode, running, bare
        self.window, self.lead = settings.window, settings.lead
        self.rates: dict[str, list[dict[str, float]]] = {"bare": [], "actors": []}
        self.cpu: dict[str, list[float]] = {"bare": [], "actors": []}
        self.skipped: list[float] = []
        self.waited: list[float] = []

    def repeat(self, number: int) -> None:
        sides = [self._bare, self._actors]
        for side in sides if number % 2 == 0 else reversed(sides):
            side()
        now = {side: sum(rates[-1].values()) for side, rates in self.rates.items()}
        say(f"{self.mode} {number}: " + ", ".join(f"{k} {v:.2f} steps/s" for k, v in now.items()))

    def _bare(self) -> None:
        trainers = [*self.bare.pids, *self.running.recorder.pids.values()]
        before, began = others_cpu(trainers), time.monotonic()
        stamps = self.bare.run_for(self.mode, self.window)
        self.cpu["bare"].append((others_cpu(trainers) - before) / (time.monotonic() - began))
        since, until = began + self.lead, min(s[-1].at for s in stamps.values())
        self.rates["bare"].append({n: rate(s, since, until) for n, s in stamps.items()})

    def _actors(self) -> None:
        trainers = [*self.bare.pids, *self.running.recorder.pids.values()]
        before, began = others_cpu(trainers), time.monotonic()
        since, until = self.running.run_for(self.window, self.lead)
        self.cpu["actors"].append((others_cpu(trainers) - before) / (time.monotonic() - began))
        self.rates["actors"].append(
            {n: rate(s, since, until) for n, s in self.running.stamps.items()}
        )
        for stamps in self.running.stamps.values():
            first, last = (stamp.totals for stamp in ends(stamps, since, until))
            tied = last["consistency_steps"] - first["consistency_steps"]
            skipped = last["skipped_consistency_steps"] - first["skipped_consistency_steps"]
            waited = last["wait_seconds"] - first["wait_seconds"]
            self.skipped.append(skipped / max(1, tied))
            self.waited.append(waited / (last["train_seconds"] - first["train_seconds"]))

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
            "others_cpu": {side: median(values) for side, values in self.cpu.items()},
            "skipped": max(self.skipped),
            "wait_fraction": median(self.waited),
        }


def jobs_of(settings: Any) -> dict[str, Job]:
    """The two jobs: tied and not."""
    make = small_job if settings.small else main_job
    common = [
        "steps=100000000",
        f"runtime.chunk_steps={settings.chunk}",
        f"checkpoint.every={settings.checkpoint_every}",
        f"data.sim_train.limit={settings.samples * 4}",
        f"data.real_video.limit={settings.samples}",
        "mediator.window=all",
        "evaluation.data={}",
        "consistency.depth_normals.warmup_steps=0",
    ]
    alone = "consistency.depth_normals.weight=0"
    return {
        "supervised": with_threads(make(*common, "name=supervised", alone)),
        "exchange": with_threads(make(*common, "name=exchange")),
    }


def niceness(running: Running) -> int:
    """That of the task actors."""
    import ray

    actor = next(iter(running.collective.actors.values()))
    found: int = ray.get(actor.__ray_call__.remote(lambda self: os.nice(0)), timeout=PATIENCE)
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
    finish("step_overhead", {**result, "target_ratio": 0.95, "nice": nice}, settings)


def warm(collective: Running, settings: Any) -> None:
    """One pass over the mediator, so that every look-up is a hit, and stand still."""
    visits = settings.samples // 8
    collective.wait_for_reports(2 + 2 * visits // settings.chunk)
    collective.pause()


if __name__ == "__main__":
    main()
