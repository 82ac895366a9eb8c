"""Cross-task consistency: the transfer network, the relation, across tasks and inside one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import WORLD, Watch, run
from torch import Tensor
from torch.nn import functional

from taskray.errors import InputError, TaskrayError
from taskray.job.config import Job, load_job, override, parse_job
from taskray.loop.assembly import build_inner_relations, build_learned, build_relations, build_task
from taskray.loop.learned import RELATION
from taskray.models.transfer import TransferNet
from taskray.relations.cross_task import CrossTask, as_label
from taskray.run.checks import check
from taskray.runtime.checkpoints import CheckpointStore, load_into
from taskray.tasks.depth import Depth
from taskray.tasks.normals import Normals
from taskray.tasks.segmentation import Segmentation

CLASSES = 4
TASKS = {
    "depth": Depth(loss="l1"),
    "segmentation": Segmentation(num_classes=CLASSES),
    "normals": Normals(),
}


def cross(source: str, target: str, **arguments: Any) -> CrossTask:
    torch.manual_seed(0)
    relation = CrossTask(source, target, widths=[4, 6], **arguments)
    tasks = {name: TASKS[name] for name in (source, target)}
    relation.check_tasks(tasks)
    relation.build_for(tasks)
    return relation


def predictions(height: int = 6, width: int = 10) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "depth": (1 + 9 * torch.rand(2, 1, height, width)).requires_grad_(),
        "segmentation": torch.randn(2, CLASSES, height, width).requires_grad_(),
        "normals": torch.randn(2, 3, height, width).requires_grad_(),
    }


# The transfer network


def test_the_published_transfer_network_keeps_any_size_and_has_three_blocks_each_way() -> None:
    network = TransferNet(7, 1)
    assert [block[2].out_channels for block in network.down] == [64, 128, 256]
    assert [block[2].out_channels for block in network.up] == [256, 128, 64]
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.kernel_size for c in convolutions] == [(3, 3)] * 12 + [(1, 1)]
    assert network(torch.rand(2, 7, 13, 22)).shape == (2, 1, 13, 22)


# The relation


def test_depth_is_transferred_to_the_most_likely_classes_by_cross_entropy() -> None:
    relation, known = cross("depth", "segmentation"), predictions()
    transferred = relation.transfer(known["depth"].log())
    expected = functional.cross_entropy(transferred, known["segmentation"].argmax(dim=1))
    torch.testing.assert_close(relation(known, {}), {"prediction": expected})


def test_soft_targets_are_all_probabilities() -> None:
    relation, known = cross("depth", "segmentation", soft=True), predictions()
    q = relation.transfer(known["depth"].log()).log_softmax(dim=1)
    p = known["segmentation"].softmax(dim=1)
    torch.testing.assert_close(relation(known, {}), {"soft": -(p * q).sum(dim=1).mean()})


def test_classes_are_transferred_to_depth_by_the_loss_of_the_depth_task() -> None:
    relation, known = cross("segmentation", "depth"), predictions()
    output = relation.transfer(known["segmentation"].softmax(dim=1))
    depth = TASKS["depth"].predict(output)["depth"]
    expected = (depth - known["depth"]).abs().mean()
    torch.testing.assert_close(relation(known, {}), {"prediction": expected})


def test_normals_are_compared_by_their_angle() -> None:
    relation, known = cross("depth", "normals"), predictions()
    known["normals"] = functional.normalize(known["normals"].detach(), dim=1)
    transferred = functional.normalize(relation.transfer(known["depth"].log()), dim=1)
    expected = 1 - (transferred * known["normals"]).sum(dim=1).mean()
    torch.testing.assert_close(relation(known, {}), {"prediction": expected})


@pytest.mark.parametrize(
    ("source", "target"), [("depth", "segmentation"), ("segmentation", "depth")]
)
@pytest.mark.parametrize("against", ["prediction", "label"])
def test_the_gradient_reaches_source_and_transfer_network_but_never_the_target(
    source: str, target: str, against: str
) -> None:
    relation, known = cross(source, target, against=against), predictions()
    labels = {
        "depth": torch.full((2, 1, 6, 10), 3.0),
        "segmentation": torch.ones(2, 1, 6, 10, dtype=torch.int64),
    }
    (loss,) = relation(known, labels).values()
    loss.backward()
    assert float(known[source].grad.abs().sum()) > 0
    assert all(p.grad is not None for p in relation.parameters())
    assert float(relation.transfer.last.weight.grad.abs().sum()) > 0
    assert known[target].grad is None


def test_against_the_label_pixels_without_one_do_not_count() -> None:
    relation, known = cross("segmentation", "depth", against="label"), predictions()
    label = torch.full((2, 1, 6, 10), 3.0)
    label[..., :5] = 0
    depth = relation.transferred(known["segmentation"])["depth"]
    expected = (depth[..., 5:] - 3).abs().mean()
    torch.testing.assert_close(relation(known, {"depth": label}), {"label": expected})


def test_the_label_of_a_probability_is_whether_it_is_above_a_half() -> None:
    assert as_label("edges", torch.tensor([0.2, 0.7])).tolist() == [0, 1]


def test_predictions_of_two_sizes_are_refused_with_both_sizes() -> None:
    relation, known = cross("depth", "segmentation"), predictions()
    known["segmentation"] = known["segmentation"][..., :8]
    with pytest.raises(
        TaskrayError, match="depth is 6x10 and segmentation is 6x8, expected the sa"
    ):
        relation(known, {})


def test_two_tasks_with_other_classes_are_refused() -> None:
    tasks = {**TASKS, "other": Segmentation(num_classes=7)}
    with pytest.raises(InputError, match="'segmentation' predicts 4 channels and task 'other' 7"):
        CrossTask("depth", "segmentation").check_tasks(tasks)


# In a job


def job_of(*overrides: str) -> Job:
    """Depth and segmentation as two tasks that are consistent with each other."""
    model = {"name": "unet", "base": 8, "depth": 2}
    task = {"dedicated": "data", "model": model, "batch_size": 2, "optimizer": {"lr": 0.01}}
    depth = {"name": "depth", "loss": "log_mse"}
    small = {"name": "cross_task", "widths": [8, 8]}
    values: dict[str, Any] = {
        "name": "cross",
        "steps": 20,
        "data": {"data": {"reader": {**WORLD, "num_samples": 8}}},
        "tasks": {
            "depth": {**task, "task": depth},
            "segmentation": {**task, "task": "segmentation"},
        },
        "mediator": {"data": "data", "batch_size": 2, "window": 2},
        "consistency": {
            "d2s": {"relation": {**small, "source": "depth", "target": "segmentation"}},
            "s2d": {"relation": {**small, "source": "segmentation", "target": "depth"}},
        },
        "runtime": {"chunk_steps": 5},
    }
    return parse_job(override(values, overrides), "job")


def inside(*overrides: str) -> Job:
    """Both as heads of one network, each with its own transfer network (XTasC-Net)."""
    job = job_of().model_dump(mode="json")
    consistency, tasks = job["consistency"], job["tasks"]
    shared = {**tasks["depth"], "task": {"name": "multi", "heads": {}}}
    for name, relation in (("depth", "d2s"), ("segmentation", "s2d")):
        shared["task"]["heads"][name] = tasks[name]["task"]
        blended = {"relation": consistency[relation]["relation"], "blend_into": name}
        shared["relations"][relation] = {**blended, "weight": 0.1}
    values = {**job, "tasks": {"shared": shared}, "consistency": {}, "mediator": None}
    return parse_job(override(values, overrides), "job")


def learned_of(job: Job, name: str) -> Any:
    task = build_task(job, name)
    relations = [*build_relations(job, name, task), *build_inner_relations(job, name, task)]
    return build_learned(job, name, task, relations)


def transfers(weights: dict[str, Tensor]) -> set[str]:
    return {n.removeprefix(RELATION).split(".")[0] for n in weights if n.startswith(RELATION)}


def test_the_transfer_network_is_learned_by_the_task_that_predicts_the_source() -> None:
    job = job_of()
    assert transfers(learned_of(job, "depth").weights()) == {"d2s"}
    assert transfers(learned_of(job, "segmentation").weights()) == {"s2d"}
    assert transfers(learned_of(inside(), "shared").weights()) == {"d2s", "s2d"}
    again = learned_of(job, "depth").weights()
    assert all(torch.equal(v, again[n]) for n, v in learned_of(job, "depth").weights().items())


def falls(watch: Watch, task: str, relation: str) -> None:
    values = [r.values[f"loss/consistency/{relation}"] for _, r in watch.of(task)]
    assert values[-1] < 0.8 * values[0], values


def test_separate_tasks_become_consistent_and_resume_with_their_transfer_networks(
    tmp_path: Path,
) -> None:
    result = run(job_of(), tmp_path, watch := Watch(), inline=True)
    assert result["status"] == "finished"
    falls(watch, "depth", "d2s")
    falls(watch, "segmentation", "s2d")
    checkpoint = CheckpointStore(tmp_path / "checkpoints").latest("depth")
    learned = learned_of(job_of(), "depth")
    load_into(learned, checkpoint)
    for name, value in learned.weights().items():
        assert torch.equal(value, checkpoint.weights[name])


def test_the_heads_of_one_network_become_consistent(tmp_path: Path) -> None:
    result = run(inside(), tmp_path, watch := Watch(), inline=True)
    assert result["status"] == "finished"
    falls(watch, "shared", "d2s")
    falls(watch, "shared", "s2d")


def test_the_job_of_the_shared_encoder_trains_with_a_transfer_network(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "jobs/shared_encoder.yaml"
    job = load_job(path)
    assert job.name == path.stem
    assert job.description
    tiny = ["steps=2", "tasks.shared.batch_size=2", "tasks.shared.model.width=16"]
    sizes = {"height": 32, "width": 64, "num_samples": 4}
    tiny += [f"data.{d}.reader.{key}={value}" for d in job.data for key, value in sizes.items()]
    there = "{name: cross_task, source: depth, target: segmentation, widths: [8]}"
    tiny += [f"tasks.shared.relations={{d2s: {{relation: {there}}}}}"]
    run(load_job(path, tiny), tmp_path, watch := Watch(), inline=True)
    assert "loss/consistency/d2s" in watch.reports[-1][1].values


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("source=edges", r"consistency\.d2s: needs 'edges', which no task predicts"),
        ("source=camera_motion", r"d2s\.relation\.source: got 'camera_motion', expected a quant"),
        ("target=depth", r"d2s\.relation\.target: got 'depth', expected another quantity"),
        ("against=label", r"d2s\.relation: needs the label 'segmentation', and labels of the medi"),
        ("widths=[]", r"d2s\.relation\.widths: got \[\], expected at least 1"),
    ],
)
def test_a_wrong_transfer_is_refused_by_its_key(change: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check(job_of(f"consistency.d2s.relation.{change}"))
