"""How well the latest checkpoints of a run move the frames of a video onto one another.

``jobs/photometric.py RUN DATASET`` takes every pair of a dataset (a name under ``data`` in the
run's job) through the tasks that ``scene_photometric`` ties, and compares each frame with the
other one, sampled where its pixels should stand there (Taskology eq. 9). Errors are means of
|I' - I| over channels and pixels, both directions, the whole dataset; images lie in [0, 1]. It
prints one line of JSON:

``warped``            over the pixels that the predictions call visible
``identity``          over the same pixels, with the other frame as it is
``flat``              over those of them that stay in the frame if everything is as far away as
                      the frame's median, moved so
``everywhere``        over all pixels, with the other frame as it is
``visible``           the fraction of pixels that is visible
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from taskray.data.storage.source import load_in_process
from taskray.data.storage.store import prepare
from taskray.data.streams.stream import plain_batches
from taskray.errors import InputError, TaskrayError
from taskray.job.config import Job, override, parse_job, read_yaml
from taskray.loop.assembly import build_model, build_relations, build_task
from taskray.loop.network import Network, frames_of, inputs_of
from taskray.record.folder import CONFIG
from taskray.relations.scene_photometric import ScenePhotometric
from taskray.relations.two_views import Direction, both_directions
from taskray.runtime.checkpoints import CheckpointStore, load_into


def measure(run: Path, dataset: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """What is printed; InputError where the run has no such relation, dataset or checkpoint."""
    job = parse_job(override(read_yaml(run / CONFIG), overrides), str(run / CONFIG))
    if dataset not in job.data:
        raise InputError(str(run), f"no dataset {dataset!r}, expected one of {', '.join(job.data)}")
    relation, networks = trained(job, run)
    frames = {
        network: frames_of(
            network.task, [q for q in relation.quantities if network.task.predicts(q)]
        )
        for network in networks
    }
    inputs = {c for network in networks for c in inputs_of(network.task, frames[network])}
    columns = tuple(sorted({*inputs, *relation.inputs}))
    path = prepare(job.data[dataset], name=dataset, use_ray=False)
    source = load_in_process(path, job.data[dataset], columns).open()
    sums: dict[str, Tensor] = {}
    for batch in plain_batches(source, job.evaluation.batch_size, columns):
        found: dict[str, Tensor] = {}
        for network in networks:
            found |= network.infer(batch, frames[network])
        for name, error in compare(relation, found, batch.tensors).items():
            sums[name] = sums.get(name, torch.zeros(2)) + error
    result = {name: float(total / count) for name, (total, count) in sums.items()}
    return {**result, "visible": float(sums["warped"][1] / sums["everywhere"][1])}


def trained(job: Job, run: Path) -> tuple[ScenePhotometric, list[Network]]:
    """The relation, and the networks of the tasks that it ties, with the weights of their latest
    checkpoints."""
    store = CheckpointStore(job.checkpoint.path or run / "checkpoints")
    relation, networks = None, []
    for name in job.tasks:
        task = build_task(job, name)
        tied = [
            weighted
            for weighted in build_relations(job, name, task)
            if isinstance(weighted.relation, ScenePhotometric)
        ]
        if not tied:
            continue
        checkpoint = store.latest(name)
        if checkpoint is None:
            raise InputError(f"{store.root}/{name}", f"no checkpoint of task {name!r}")
        model = build_model(job, name, task)
        load_into(model, checkpoint)
        networks.append(Network(task, model, job.tasks[name], "cpu"))
        relation = tied[0].relation
    if not isinstance(relation, ScenePhotometric):
        raise InputError(str(run), "no relation scene_photometric in its job")
    return relation, networks


def compare(
    relation: ScenePhotometric, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Each error as (sum, number of values), both directions together."""
    medians = {name: _flat(predictions[name]) for name in ("depth", "depth_2")}
    both, both_flat = (
        both_directions(p, batch, relation.object_motion, relation.movable)
        for p in (predictions, {**predictions, **medians})
    )
    there, back = (_one_way(*pair, batch) for pair in zip(both, both_flat, strict=True))
    return {name: there[name] + back[name] for name in there}


def _one_way(
    direction: Direction, flat: Direction, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    here, there = (batch["image" + view.frame] for view in (direction.here, direction.there))
    visible = direction.visible(direction.sample(direction.there.depth)).expand_as(here)
    on_both = visible & flat.warped.valid_b1hw
    images = direction.sample(there), flat.sample(there), there
    warped, flattened, still = ((image - here).abs() for image in images)
    return {
        "warped": _sum(warped[visible]),
        "identity": _sum(still[visible]),
        "flat": _sum(flattened[on_both]),
        "everywhere": _sum(still),
    }


def _sum(values: Tensor) -> Tensor:
    return torch.tensor([float(values.double().sum()), values.numel()], dtype=torch.float64)


def _flat(depth_b1hw: Tensor) -> Tensor:
    median = depth_b1hw.flatten(1).median(dim=1).values
    return median[:, None, None, None].expand_as(depth_b1hw)


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("dataset", metavar="DATASET")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v", dest="overrides")
    given = parser.parse_args()
    try:
        found = measure(given.run, given.dataset, given.overrides)
    except TaskrayError as error:
        print(f"photometric: {error}", file=sys.stderr)
        return error.exit_code
    values = {name: round(value, 5) for name, value in found.items()}
    print(json.dumps({"run": given.run.name, "dataset": given.dataset, **values}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
