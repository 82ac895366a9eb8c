"""The doctor lets every task make a step on two rows: what would fail in a run's first step is
found before it."""

from __future__ import annotations

import pytest
import torch
from collectives import tiny_job

from taskray.data.streams.batch import Batch
from taskray.errors import InputError
from taskray.loop.assembly import build_tasks
from taskray.run.requirements import PROCESS_BYTES, processes_of
from taskray.run.trial import Trial, try_steps


def trial(*overrides: str) -> Trial:
    job = tiny_job("data.labelled.limit=2", *overrides)
    normals = torch.zeros(2, 3, 16, 24)
    normals[:, 2] = -1
    tensors = {
        "image": torch.rand(2, 3, 16, 24),
        "depth": torch.full((2, 1, 16, 24), 3.0),
        "normals": normals,
        "intrinsics": torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]).repeat(2, 1, 1),
    }
    rows = dict.fromkeys(job.data, Batch(tensors))
    return try_steps(job, build_tasks(job), rows, dict.fromkeys(job.tasks, 1))


def test_a_good_job_has_no_problem_and_its_steps_are_measured():
    found = trial("tasks.depth.batch_size=8", "consistency.depth_normals.start_step=5000")
    assert found.problems == []
    for measured in found.measured.values():
        assert measured.seconds.keys() == {"labels", "consistency"}
        assert all(seconds > 0 for seconds in measured.seconds.values())
    # the memory grows with the batch: 8 rows of depth, 4 of normals
    assert found.measured["depth"].kept_bytes > 1.5 * found.measured["normals"].kept_bytes > 0


@pytest.mark.parametrize(
    ("setting", "problems"),
    [
        (
            "tasks.depth.task=faults:DepthWhoseLossIsATensor",
            [
                "tasks.depth: a step on its labels fails: the loss of task 'faults:DepthWhoseLossIs"
                "ATensor' returned a Tensor, expected a dict of named scalar tensors"
            ],
        ),
        (
            "tasks.depth.task=faults:DepthWithALossPerFrame",
            [
                "tasks.depth: a step on its labels fails: the loss of task 'faults:DepthWithALossPe"
                "rFrame' returned the shape 2 under 'l1', expected a dict of named scalar tensors"
            ],
        ),
        (
            "consistency.depth_normals.relation=faults:RelationThatIsATensor",
            [
                f"tasks.{task}: a consistency step fails: relation 'depth_normals' returned a "
                "Tensor, expected a dict of named scalar tensors"
                for task in ("depth", "normals")
            ],
        ),
        (
            "tasks.depth.model.name=faults:NetworkForOneSize",
            ["tasks.depth: its prediction fails: network 'faults:NetworkForOneSize' on 2x3x16x24"],
        ),
        (
            "tasks.depth.task=faults:HalfSizeDepth",
            ["tasks.depth: its prediction fails: prediction of 'depth' has shape 2x1x8x12"],
        ),
    ],
)
def test_what_would_fail_in_the_first_step_is_named_with_its_key(setting, problems):
    found = [str(problem) for problem in trial(setting).problems]
    assert len(found) == len(problems)
    for text, beginning in zip(found, problems, strict=True):
        assert text.startswith(beginning)
        assert "\n" not in text


def test_a_loss_that_is_not_finite_is_found():
    faulty = "tasks.depth.task={name: faults:DepthThatBecomesNaN, at: 0}"
    (problem,) = trial(faulty).problems
    assert "a step on its labels fails" in str(problem)
    assert "not finite" in str(problem)


@pytest.mark.parametrize("name", ["Nameless", "OneNamed"])
def test_a_task_without_quantities_is_refused(name):
    with pytest.raises(InputError, match=rf"tasks\.depth\.task: 'faults:{name}' has no quantities"):
        build_tasks(tiny_job(f"tasks.depth.task=faults:{name}"))


def test_each_process_has_its_own_memory_besides_that_of_its_task():
    model = torch.nn.Linear(10, 10, bias=False)
    job = tiny_job("tasks.depth.optimizer.name=sgd")
    found = processes_of(job, {"depth": model}, {"depth": 1000})
    assert found == {
        "driver": PROCESS_BYTES,
        "cache": PROCESS_BYTES,
        "depth": PROCESS_BYTES + 400 * 3 + 1000,
    }
