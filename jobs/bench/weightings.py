"""What the weightings of several heads cost, and what the loop costs beside plain torchjd.

Segmentation, depth and normals on one network with a shared encoder (``encoder_decoder``). Three
contenders take turns in one process and with the same threads, a few steps each time:

  ours   the trainer of a task, with streams of batches, meters and gradient clipping
  sum    the same with the weighting ``sum``
  bare   the loop as one would write it by hand with torchjd: network, losses, optimizer, clipping
         and batches are the same, and the batches are in a list in memory

``against_bare``: steps per second of ours over those of the bare loop; target: 0.98. ``cost``: time
of a step with the weighting over the time with ``sum``; target for ``geometric``, ``dwa`` and
``uncertainty``: below 1.01. Both are medians over repetitions of the ratio within one; with
``cpu`` before them they are of the process's CPU time, background threads included, which is
steadier when other processes run.
``gradnorm``, ``focused`` and ``fixed`` are not in torchjd, and ``famo`` predicts twice.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _common import finish, local_data, median, parse, parser, say
from torch import Tensor, nn

from taskray.job import plugins
from taskray.job.config import Job, parse_job
from taskray.loop.assembly import build_model, build_task
from taskray.loop.interfaces import NoPeers
from taskray.loop.optimization import Updates
from taskray.loop.trainer import Trainer
from taskray.loop.wiring import wire
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.member import Member
from taskray.weighting.borrowed import quiet

QUICK = {
    "height": 32, "width": 48, "frames": 16, "batch": 2, "base": 16, "steps": 1, "warmup": 1,
    "repetitions": 1, "names": "uncertainty,pcgrad,gradnorm",
}  # fmt: skip
HEADS = ("segmentation", "depth", "normals")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "fixed": {"weights": dict.fromkeys(HEADS, 1.0)},
    "focused": {"focus": ["depth"]},
    "gradnorm": {"window": 1},
    "stch": {"mu": 1.0},
    "cosmos": {"lambda_": 1.0},
    "fairgrad": {"alpha": 1.0},
    "krum": {"n_byzantine": 0},
    "trimmed_mean": {"trim_number": 1},
}
"""Those that a weighting requires; GradNorm learns from the second step on."""
COUNTED = {"uncertainty", "imtl_l", "famo"}
"""torchjd's of these take the number of heads."""
Step = Callable[[], None]


def make_job(weighting: str, settings: Any) -> Job:
    reader = {
        "name": "world", "height": settings.height, "width": settings.width,
        "num_samples": settings.frames,
    }  # fmt: skip
    task = {
        "task": {"name": "multi", "heads": {head: head for head in HEADS}},
        "model": {
            "name": "encoder_decoder", "backbone": "resnet18", "width": settings.base,
        },
        "dedicated": "frames",
        "batch_size": settings.batch,
        "weighting": {"name": weighting, **ARGUMENTS.get(weighting, {})},
        "optimizer": {"clip_norm": 1.0, "lr": 1e-4},
    }  # fmt: skip
    whole = {
        "name": "bench", "steps": 10**8, "data": {"frames": {"reader": reader}},
        "tasks": {"scene": task},
    }  # fmt: skip
    return parse_job(whole, "job")


def trainer(job: Job, data: Mapping[str, Any]) -> Trainer:
    nowhere = CheckpointStore(tempfile.gettempdir())
    return Member(job, "scene", wire(job), data, nowhere, NoPeers()).trainer


def ours(job: Job, data: Mapping[str, Any]) -> Step:
    """A step of the trainer."""
    loop = trainer(job, data)

    def step() -> None:
        for _ in loop.step():
            pass

    return step


def bare(job: Job, data: Mapping[str, Any], name: str) -> Step:
    """The same step by hand."""
    config, task = job.tasks["scene"], build_task(job, "scene")
    network = build_model(job, "scene", task)
    source = trainer(job, data)
    batches = [source.supervised.streams[0].next().tensors for _ in range(8)]
    source.close()
    combine, learned = torchjd_step(name, network)
    parameters = [*network.parameters(), *learned]
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    optimizer, number = Updates(named, config.optimizer).optimizer, 0

    def step() -> None:
        nonlocal number
        batch = batches[number % len(batches)]
        number += 1
        losses = task.loss(task.predict(network(batch["image"])), batch)
        optimizer.zero_grad(set_to_none=True)
        combine(list(losses.values()))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


Combine = Callable[[Sequence[Tensor]], None]


def torchjd_step(name: str, network: nn.Module) -> tuple[Combine, list[nn.Parameter]]:
    """How PyTorch and torchjd make a gradient of losses, and what of it is learnt.

    For aggregators a backward pass for each head, as in LibMTL: the features of an encoder are made
    of each other, so ``torchjd.autojac.mtl_backward`` would count them more than once.
    """
    from torchjd import aggregation, scalarization

    module, _, of_torchjd = plugins.BUILTIN["weighting"][name].partition(":")
    given = {k: v for k, v in ARGUMENTS.get(name, {}).items() if name != "fixed"}
    if name == "sum":
        return lambda losses: torch.autograd.backward(torch.stack(list(losses)).sum()), []
    if module.endswith("aggregated"):
        extra = {"nash_mtl": {"n_tasks": len(HEADS)}, "cagrad": {"c": 0.4}}.get(name, {})
        aggregator = getattr(aggregation, of_torchjd)(**given, **extra)

        shared = [p for n, p in network.named_parameters() if n.startswith("encoder.")]
        sizes = [p.numel() for p in shared]

        def aggregate(losses: Sequence[Tensor]) -> None:
            rows = []
            for loss in losses:
                for parameter in shared:
                    parameter.grad = None
                loss.backward(retain_graph=loss is not losses[-1])
                rows.append(torch.cat([p.grad.reshape(-1) for p in shared if p.grad is not None]))
            with quiet():
                parts = aggregator(torch.stack(rows)).split(sizes)
            for parameter, part in zip(shared, parts, strict=True):
                parameter.grad = part.view_as(parameter)

        return aggregate, []
    equal = {"weights": torch.full((len(HEADS),), 1 / len(HEADS))}
    extra = {"cosmos": equal, "pbi": {"theta": 5.0, **equal}}.get(name, {})
    count = [len(HEADS)] if name in COUNTED else []
    scalarizer = getattr(scalarization, of_torchjd)(*count, **given, **extra)

    def scalarize(losses: Sequence[Tensor]) -> None:
        torch.autograd.backward(scalarizer(torch.stack(list(losses))))

    return scalarize, list(scalarizer.parameters())


def in_torchjd(name: str) -> bool:
    """Whether a bare loop can do the same with torchjd alone, in one forward pass."""
    return name not in ("fixed", "focused", "gradnorm", "famo")


def seconds(step: Step, count: int) -> tuple[float, float]:
    """Of a step: by the clock, and of the CPU."""
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count, (time.process_time() - cpu) / count


def measure(name: str, data: Mapping[str, Any], settings: Any) -> dict[str, float]:
    """The times of a weighting beside the sum and beside torchjd."""
    contenders = {"ours": ours(make_job(name, settings), data)}
    if name != "sum":
        contenders["sum"] = ours(make_job("sum", settings), data)
    if in_torchjd(name):
        contenders["bare"] = bare(make_job(name, settings), data, name)
    for step in contenders.values():
        seconds(step, settings.warmup)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in contenders}
    for number in range(settings.repetitions):
        order = list(contenders)
        for side in order if number % 2 == 0 else reversed(order):
            times[side].append(seconds(contenders[side], settings.steps))
    found = {"ms": 1e3 * median(clock for clock, _ in times["ours"])}
    for unit, prefix in enumerate(("", "cpu_")):
        mine = [pair[unit] for pair in times["ours"]]
        if "sum" in times:
            theirs = [pair[unit] for pair in times["sum"]]
            found[f"{prefix}cost"] = median(a / b for a, b in zip(mine, theirs, strict=True))
        if "bare" in times:
            theirs = [pair[unit] for pair in times["bare"]]
            found[f"{prefix}against_bare"] = median(
                b / a for a, b in zip(mine, theirs, strict=True)
            )
    say(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--height", type=int, default=64)
    options.add_argument("--width", type=int, default=96)
    options.add_argument("--frames", type=int, default=64, help="frames of the dataset")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--base", type=int, default=64, help="channels of the decoders")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--steps", type=int, default=3, help="steps of a turn")
    options.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    options.add_argument("--repetitions", type=int, default=9, help="turns of each contender")
    options.add_argument("--names", default=",".join(plugins.BUILTIN["weighting"]))
    settings = parse(options, arguments, QUICK)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        data = local_data(make_job("sum", settings))
        found = {name: measure(name, data, settings) for name in settings.names.split(",")}
    finally:
        torch.set_num_threads(threads)
    finish("weightings", {"weightings": found}, settings)


if __name__ == "__main__":
    main()
