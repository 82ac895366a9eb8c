"""Labels from which nothing can be learnt are found before the first step, and so are other units
than metres."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from collectives import tiny_job
from PIL import Image

from taskray.cli import main
from taskray.errors import InputError
from taskray.job.config import Job, dump_yaml
from taskray.loop.assembly import build_tasks
from taskray.loop.evaluation import Evaluation, measured_nothing
from taskray.run.checks import check
from taskray.run.labels import check_values
from taskray.tasks.depth import Depth
from taskray.tasks.detection import Detection
from taskray.tasks.multi import Multi
from taskray.tasks.normals import Normals
from taskray.tasks.segmentation import Segmentation
from taskray.tasks.task import Task


def stored(folder: Path, *depths: np.ndarray | float) -> Path:
    """A small dataset as Parquet, with these depth maps."""
    folder.mkdir()
    table: dict[str, list[object]] = {"key": [f"k{n}" for n in range(len(depths))]}
    picture, normals = io.BytesIO(), np.zeros((3, 16, 24), np.float32)
    Image.new("RGB", (24, 16)).save(picture, format="PNG")
    normals[2] = -1
    arrays = {
        "depth": [np.broadcast_to(np.float32(d), (1, 16, 24)) for d in depths],
        "normals": [normals for _ in depths],
        "intrinsics": [np.eye(3, dtype=np.float32) for _ in depths],
    }
    table["image"] = [picture.getvalue() for _ in depths]
    for name, values in arrays.items():
        table[name] = [_npy(value) for value in values]
    types = {n: pa.string() if n == "key" else pa.binary() for n in table}
    pq.write_table(pa.table(table, schema=pa.schema(types)), folder / "part-00000.parquet")
    return folder


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def alone(path: Path, *overrides: str) -> Job:
    """Depth on one stored dataset, and measured on it."""
    return tiny_job(
        f"data={{rooms: {{reader: {{name: parquet, path: {path}}}}}}}",
        "tasks={depth: {task: {name: depth, max_depth: 10}, dedicated: rooms, batch_size: 2, "
        "model: {base: 8, depth: 2}}}",
        "mediator=null",
        "consistency={}",
        "evaluation.data={rooms: rooms}",
        "steps=3",
        *overrides,
    )


@pytest.mark.parametrize(
    ("depths", "found"),
    [((0.025, 0.098), "0.025 to 0.098"), ((0.0, 0.0), "0 to 0"), ((np.nan, np.nan), "none")],
)
def test_a_dataset_without_one_valid_label_is_refused(tmp_path, depths, found):
    job = alone(stored(tmp_path / "data", *depths))
    with pytest.raises(InputError) as caught:
        check_values(job, build_tasks(job), {"rooms": tmp_path / "data"})
    assert str(caught.value) == (
        "data.rooms: no label 'depth' is valid for task 'depth': "
        f"expected 0.1 to 10 m, found {found}"
    )


def test_one_valid_pixel_in_the_last_row_is_enough(tmp_path):
    last = np.zeros((1, 16, 24), np.float32)
    last[0, 3, 4] = 2.0
    job = alone(stored(tmp_path / "data", *[0.0] * 40, last))
    assert check_values(job, build_tasks(job), {"rooms": tmp_path / "data"}) == []


def test_a_few_rows_without_a_valid_label_are_a_warning(tmp_path):
    job = alone(stored(tmp_path / "data", 0.0, 0.0))
    found = check_values(job, build_tasks(job), {"rooms": tmp_path / "data"}, samples=["rooms"])
    assert found[0].startswith("data.rooms: in its first rows, no label 'depth' is valid")


def test_millimetres_that_are_called_metres_are_a_warning(tmp_path):
    job = alone(stored(tmp_path / "data", 1500.0, 2500.0), "tasks.depth.task.max_depth=10000")
    (found,) = check_values(job, build_tasks(job), {"rooms": tmp_path / "data"})
    assert found == (
        "data.rooms: the median of 'depth' is 1500, expected metres (at most 100); "
        "is it in millimetres?"
    )


def test_train_refuses_labels_of_which_none_is_valid(tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(dump_yaml(alone(stored(tmp_path / "data", 0.05, 0.05))))
    assert main(["train", str(file), "--inline", "--out", str(tmp_path / "run")]) == 2
    assert "data.rooms: no label 'depth' is valid" in capsys.readouterr().err


def test_an_evaluation_that_measured_nothing_is_in_result_console_and_report(tmp_path, capsys):
    stored(tmp_path / "data", 2.0, 3.0)
    bad = stored(tmp_path / "bad", 0.05, 0.05)
    job = alone(
        tmp_path / "data",
        f"data.bad={{reader: {{name: parquet, path: {bad}}}}}",
        "evaluation.data={rooms: bad}",
    )
    file, run = tmp_path / "job.yaml", tmp_path / "run"
    file.write_text(dump_yaml(job))
    text = "evaluation 'rooms' measured nothing of task 'depth': no metric is finite on its 2 rows"
    assert main(["train", str(file), "--inline", "--out", str(run)]) == 0
    assert text in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert text in " ".join(capsys.readouterr().out.split())
    events = [event["event"] for event in json.loads((run / "result.json").read_text())["events"]]
    assert events.count(text) == 1
    assert "data.bad: no label 'depth' is valid for task 'depth'" in events[0]
    assert "measured nothing of task" in (run / "report.html").read_text()


def test_a_task_that_no_evaluation_can_measure_is_named():
    measured = {"a": Evaluation({}), "b": Evaluation({"rmse": 1}, rows=2)}
    assert measured_nothing("depth", measured) == []
    assert measured_nothing("depth", {}) == []
    assert measured_nothing("depth", {"a": Evaluation({})}) == [
        "task 'depth' was not measured: no evaluation has its labels"
    ]


def two_heads(path: Path, dedicated: str, *overrides: str) -> Job:
    """Depth and another quantity on one network, on one stored dataset."""
    return alone(
        path,
        "tasks={rooms: {task: {name: multi, heads: {depth: {name: depth, max_depth: 10}, "
        f"surface: normals}}}}, dedicated: {dedicated}, batch_size: 2, "
        "model: {base: 8, depth: 2}}}",
        *overrides,
    )


@pytest.mark.parametrize("command", ["doctor", "train"])
@pytest.mark.parametrize(
    ("depth", "job", "problem"),
    [
        (
            0.0,
            ("rooms",),
            "data.rooms: no label 'depth' is valid for head 'depth' of task 'rooms': "
            "expected 0.1 to 10 m, found 0 to 0",
        ),
        (
            2.0,
            ("{depth: rooms}",),
            "tasks.rooms: head 'surface' has no labels and no relation, expected one of them",
        ),
        (
            2.0,
            ("rooms", "tasks.rooms.task.heads.surface={name: motion_mask, frames: 1}"),
            "data.rooms: has no column 'motion_mask', needed by 'rooms'; it has",
        ),
    ],
    ids=["no valid value", "no dataset", "no column"],
)
def test_a_head_without_labels_is_named_before_the_first_step(
    tmp_path, capsys, command, depth, job, problem
):
    file = tmp_path / "job.yaml"
    file.write_text(dump_yaml(two_heads(stored(tmp_path / "data", depth, depth), *job)))
    arguments = ["--inline", "--out", str(tmp_path / "run")] if command == "train" else []
    assert main([command, str(file), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert problem in line


def test_a_head_without_labels_may_keep_the_weights_of_a_checkpoint(tmp_path):
    path = stored(tmp_path / "data", 2.0, 2.0)
    with pytest.raises(InputError, match="head 'surface' has no labels"):
        check(two_heads(path, "{depth: rooms}"))
    check(two_heads(path, "{depth: rooms}", "tasks.rooms.checkpoint=runs/before"))


EMPTY_BOXES = torch.full((2, 3, 9), torch.nan)
A_BOX = torch.tensor([[[10.0, 0, -1, 4, 2, 1.5, 0, 0, 1]]])


@pytest.mark.parametrize(
    ("task", "invalid", "valid"),
    [
        (Depth(), {"depth": torch.zeros(2, 1, 4, 6)}, {"depth": torch.ones(2, 1, 4, 6)}),
        (Normals(), {"normals": torch.zeros(2, 3, 4, 6)}, {"normals": torch.ones(2, 3, 4, 6)}),
        (
            Segmentation(),
            {"segmentation": torch.full((2, 1, 4, 6), 255)},
            {"segmentation": torch.zeros((2, 1, 4, 6), dtype=torch.int64)},
        ),
        (Detection(), {"boxes": EMPTY_BOXES}, {"boxes": A_BOX}),
        (Detection(), {"boxes": EMPTY_BOXES[:, :0]}, {"boxes": A_BOX}),
        (Detection(), {"boxes": A_BOX + torch.eye(9)[7]}, {"boxes": A_BOX}),
        (
            Multi({"depth": Depth(), "normals": Normals()}),
            {"depth": torch.zeros(2, 1, 4, 6)},
            {"depth": torch.ones(2, 1, 4, 6)},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Task) else "",
)
def test_every_task_knows_which_labels_are_valid(task, invalid, valid):
    (found,) = task.label_values(invalid)
    assert not found.valid.any()
    (found,) = task.label_values(valid)
    assert found.valid.any()
