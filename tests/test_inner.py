"""Relations inside one task: between its own predictions, on its labelled batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import Watch, run
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.job.config import Job, override, parse_job
from taskray.loop.assembly import build_inner_relations, build_task
from taskray.loop.inner import InnerRelation, join
from taskray.loop.wiring import wire
from taskray.relations.relation import Relation
from taskray.run.checks import check
from taskray.runtime.checkpoints import CheckpointStore
from taskray.weighting.weighting import Fixed

READER = {"name": "world", "height": 32, "width": 48, "num_samples": 8, "frames": 2}


class Flat(nn.Module, Relation):
    """Depth is the same, learned, distance in both frames; the normals are not used."""

    quantities = ("depth", "depth_2")
    inputs = ("intrinsics",)

    def __init__(self, start: float = 2.0) -> None:
        super().__init__()
        self.distance = nn.Parameter(torch.tensor(start))

    def forward(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert batch["intrinsics"].shape[1:] == (3, 3)
        assert all(predictions[q].requires_grad for q in self.quantities)
        return {q: (predictions[q] - self.distance).abs().mean() for q in self.quantities}


class OfTheLabel(Relation):
    quantities = ("depth",)
    labels = ("segmentation",)

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"off": (predictions["depth"] - batch["segmentation"]).abs().mean()}


def job_of(*overrides: str) -> Job:
    heads = {"depth": "depth", "normals": "normals"}
    flat = {"relation": "test_inner:Flat", "weight": 0.25}
    values: dict[str, Any] = {
        "name": "inner",
        "steps": 4,
        "data": {"labelled": {"reader": READER}},
        "tasks": {
            "scene": {
                "task": {"name": "multi", "heads": heads},
                "dedicated": "labelled",
                "batch_size": 2,
                "model": {"name": "unet", "base": 8, "depth": 2},
                "relations": {"flat": flat},
            }
        },
    }
    return parse_job(override(values, overrides), "job")


def relation(**config: Any) -> InnerRelation:
    job = job_of(*(f"tasks.scene.relations.flat.{k}={v}" for k, v in config.items()))
    (built,) = build_inner_relations(job, "scene", build_task(job, "scene"))
    return built


def test_a_relation_inside_a_task_is_part_of_every_step_on_labels(tmp_path: Path) -> None:
    watch = Watch()
    run(job_of("runtime.chunk_steps=1"), tmp_path, watch, inline=True)
    for _, report in watch.reports:
        loss = {k.removeprefix("loss/"): v for k, v in report.values.items()}
        parts = loss["depth/mse"] + loss["normals/cosine"] + 0.25 * loss["consistency/flat"]
        assert loss["supervised"] == pytest.approx(parts, rel=1e-5)
        terms = loss["consistency/flat/depth"] + loss["consistency/flat/depth_2"]
        assert loss["consistency/flat"] == pytest.approx(terms, rel=1e-5)
    weights = CheckpointStore(tmp_path / "checkpoints").latest("scene").weights
    assert float(weights["relation:flat.distance"]) != 2.0
    longer = run(job_of("steps=6"), tmp_path, inline=True)
    assert longer["tasks"]["scene"]["supervised_steps"] == 6


def test_what_it_needs_of_other_frames_is_read_from_the_labelled_dataset() -> None:
    (columns,) = wire(job_of()).roles["scene"].labels.values()
    assert set(columns) == {"image", "image_2", "intrinsics", "depth", "normals"}
    by_head = job_of("tasks.scene.dedicated={depth: labelled}")
    (columns,) = wire(by_head).roles["scene"].labels.values()
    assert set(columns) == {"image", "image_2", "intrinsics", "depth"}


def test_a_blended_loss_is_a_weighted_mean_and_a_loss_of_its_own_without_the_label() -> None:
    losses = {"depth/mse": torch.tensor(3.0), "normals/cosine": torch.tensor(2.0)}
    terms = {"depth": ["depth/mse"], "normals": ["normals/cosine"]}
    weighted = {"flat": 0.25 * torch.tensor(8.0)}
    blended = relation(blend_into="depth")
    joined = join(losses, weighted, [blended], terms, step=0)
    assert joined == {"depth/mse": 0.75 * 3 + 0.25 * 8, "normals/cosine": 2}
    only = {"normals/cosine": torch.tensor(2.0)}
    joined = join(only, weighted, [blended], {"depth": [], "normals": list(only)}, step=0)
    assert joined == {"normals/cosine": 2, "relation:flat": 2}
    assert join(losses, weighted, [relation()], terms, step=0) == {**losses, "relation:flat": 2}
    warming = relation(blend_into="depth", warmup_steps=4)
    joined = join(losses, {"flat": torch.tensor(0.5)}, [warming], terms, step=1)
    assert float(joined["depth/mse"]) == 0.875 * 3 + 0.5


def test_two_relations_blend_into_one_head_in_any_order() -> None:
    losses, terms = {"depth/mse": torch.tensor(3.0)}, {"depth": ["depth/mse"]}
    one = relation(blend_into="depth")
    two = replace(one, name="other")
    weighted = {"flat": torch.tensor(2.0), "other": torch.tensor(5.0)}
    expected = {"depth/mse": 0.75 * 0.75 * 3 + 2 + 5}
    assert join(losses, weighted, [one, two], terms, step=0) == expected
    assert join(losses, weighted, [two, one], terms, step=0) == expected


def test_a_relation_is_no_loss_of_the_one_head_with_labels() -> None:
    tenth = Fixed({"depth": 0.1}, heads=["depth"])
    of_heads, rest = tenth.by_head(
        {"depth/mse": torch.tensor(1.0), "relation:flat": torch.tensor(5.0)}
    )
    assert of_heads == {"depth": 1}
    assert rest == [5]


def test_a_relation_whose_label_no_dataset_gives_is_refused() -> None:
    job = job_of(
        "tasks.scene.dedicated={depth: labelled}",
        "tasks.scene.relations={label: {relation: 'test_inner:OfTheLabel'}}",
    )
    with pytest.raises(
        InputError, match=r"tasks\.scene\.relations\.label: needs the label 'segmentation'"
    ):
        wire(job)


def test_a_relation_that_needs_a_label_is_left_out_of_batches_without_it() -> None:
    job = job_of("tasks.scene.relations={label: {relation: 'test_inner:OfTheLabel'}}")
    (label,) = build_inner_relations(job, "scene", build_task(job, "scene"))
    assert label.fits({"segmentation": torch.zeros(1)})
    assert not label.fits({"depth": torch.zeros(1)})
    (columns,) = wire(job).roles["scene"].labels.values()
    assert "segmentation" in columns


def test_initial_weights_of_a_learned_relation_depend_on_the_seed_alone() -> None:
    def first() -> Tensor:
        job = job_of("tasks.scene.relations.flat.relation=test_inner:Drawn")
        (built,) = build_inner_relations(job, "scene", build_task(job, "scene"))
        return built.relation.weight

    before = first()
    torch.rand(1)
    assert torch.equal(first(), before)


class Drawn(nn.Linear, Relation):
    quantities = ("depth",)

    def __init__(self) -> None:
        super().__init__(1, 1)


MEDIATOR = "mediator={data: labelled}"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["tasks.scene.relations.flat.blend_into=edges"], r"flat\.blend_into: got 'edges', exp"),
        (
            ["tasks.scene.relations.flat.blend_into=depth", "tasks.scene.relations.flat.weight=2"],
            r"job: tasks\.scene\.relations\.flat\.weight: got 2, expected at most 1",
        ),
        (["tasks.scene.task=normals"], r"flat: needs 'depth', which this task does not predict"),
        (["tasks.scene.dedicated=null", MEDIATOR], r"flat: got a task without labelled batches"),
        (
            ["consistency={flat: {relation: depth_normals}}", MEDIATOR],
            r"flat: duplicate name 'flat': it is under 'consistency', too",
        ),
        (
            ["consistency={label: {relation: 'test_inner:OfTheLabel'}}", MEDIATOR],
            r"consistency\.label\.relation: needs the label 'segmentation', and labels of the med",
        ),
    ],
)
def test_a_relation_that_does_not_fit_is_refused_by_its_key(
    overrides: list[str], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        check(job_of(*overrides))
