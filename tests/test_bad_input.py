"""Whatever a person gives that is wrong ends in one clear line and an exit code: no traceback, no
hang. Everything here goes through the command itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from collectives import tiny_job
from PIL import Image
from torch import Tensor

from taskray.cli import main
from taskray.job.config import dump_yaml
from taskray.models.unet import UNet
from taskray.relations.relation import Relation

if TYPE_CHECKING:
    from decimal import Decimal

HERE = __name__
Outcome = tuple[int, str, str]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """The datasets of the tiny job are converted once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def train(tmp_path, capsys) -> Callable[..., Outcome]:
    """Run the tiny job with settings; returns exit code, stdout and stderr."""
    file = tmp_path / "job.yaml"

    def run(*settings: str, inline: bool = True, out: str = "run", resume: str = "auto") -> Outcome:
        file.write_text(dump_yaml(tiny_job("steps=4")))
        chosen = [word for setting in settings for word in ("--set", setting)]
        where = ["--out", str(tmp_path / out), "--resume", resume]
        code = main(["train", str(file), *where, *chosen, *(["--inline"] if inline else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def told(outcome: Outcome, code: int, *parts: str) -> str:
    """Checks that an outcome is this exit code and one line with these parts; returns the line."""
    found, _, stderr = outcome
    assert stderr.startswith("taskray: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr, f"{part!r} not in {stderr!r}"
    assert found == code, stderr
    return stderr


def parquet(folder: Path, rows: int = 8, **replaced: bytes | None) -> Path:
    """A small dataset as Parquet; ``replaced`` columns hold those bytes in every other row."""
    folder.mkdir(exist_ok=True)
    table: dict[str, list[object]] = {"key": [f"k{n}" for n in range(rows)]}
    for name in ("image", "depth", "normals", "intrinsics"):
        good = _bytes(name)
        table[name] = [replaced.get(name, good) if n % 2 else good for n in range(rows)]
    types = {n: pa.string() if n == "key" else pa.binary() for n in table}
    pq.write_table(pa.table(table, schema=pa.schema(types)), folder / "part-00000.parquet")
    return folder


def _bytes(name: str) -> bytes:
    buffer = io.BytesIO()
    if name == "image":
        Image.new("RGB", (24, 16)).save(buffer, format="PNG")
    else:
        shapes = {"depth": (1, 16, 24), "normals": (3, 16, 24), "intrinsics": (3, 3)}
        np.save(buffer, np.ones(shapes[name], np.float32))
    return buffer.getvalue()


def reads(path: Path, name: str = "labelled") -> str:
    return f"data.{name}.reader={{name: parquet, path: {path}}}"


# ---- the job ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("tasks.depth.task=dpeth", "tasks.depth.task: unknown task 'dpeth'; did you mean 'depth'?"),
        ("tasks.depth.model=resnet", "tasks.depth.model: unknown model 'resnet'"),
        ("tasks.depth.model=nowhere:Net", "tasks.depth.model: cannot import 'nowhere'"),
        ("tasks.depth.model=json:Net", "tasks.depth.model: module 'json' has no 'Net'"),
        (f"tasks.depth.model={HERE}:Broken", "tasks.depth.model: KeyError: 'no such layer'"),
        (f"tasks.depth.model={HERE}:Quits", "tasks.depth.model: SystemExit: 0"),
        (f"tasks.depth.model={HERE}:Hinted", "tasks.depth.model: its signature cannot be read: Na"),
        (
            f"tasks.depth.model={HERE}:HERE",
            "'test_bad_input:HERE' is of type str, expected a class",
        ),
        ("tasks.depth.model=builtins:dict", "tasks.depth.model: its signature cannot be read: no"),
        ("tasks.depth.task=json:JSONDecoder", "makes JSONDecoder, expected taskray.tasks.task.Tas"),
        ("data.test.reader=pathlib:Path", "data.test.reader: 'pathlib:Path' makes PosixPath, expe"),
        ("tasks.depth.model.bsae=8", "tasks.depth.model.bsae: unknown key; did you mean 'base'?"),
        ("tasks.depth.model.base=9", "tasks.depth.model.base: got 9, expected a multiple of 8"),
        (
            "tasks.depth.model.norm=layer",
            "tasks.depth.model.norm: got 'layer', expected 'group' or 'batch'",
        ),
        ("tasks.depth.task.loss=l3", "tasks.depth.task.loss: unknown loss 'l3'"),
        (
            "tasks.depth.task.max_depth=0.01",
            "tasks.depth.task.max_depth: got 0.01, expected more than",
        ),
        ("data.test.reader.frames=4", "data.test.reader.frames: got 4, expected 1, 2 or 3"),
        (
            "data.test.reader=wrold",
            "data.test.reader: unknown reader 'wrold'; did you mean 'world'",
        ),
        ("consistency.depth_normals.relation=dn", "depth_normals.relation: unknown relation 'dn'"),
        ("checkpoint.path=nothing://x", "checkpoint.path: nothing://x: cannot be opened: "),
        ("tasks.depth.gpus=64", "tasks.depth.gpus: 64 GPUs asked for, torch has "),
    ],
)
def test_names_and_arguments_are_checked_before_anything_starts(train, setting, problem):
    told(train(setting), 2, problem)


def test_a_module_that_ends_the_process_does_not_end_training_well(train, tmp_path, monkeypatch):
    (tmp_path / "quits_at_once.py").write_text("import sys; sys.exit()")
    monkeypatch.syspath_prepend(tmp_path)
    told(train("tasks.depth.model=quits_at_once:Net"), 2, "cannot import 'quits_at_once': SystemEx")


def test_a_relation_whose_quantities_nobody_predicts(train):
    outcome = train("tasks={depth: {task: depth, dedicated: labelled}}")
    told(outcome, 2, "consistency.depth_normals: needs 'normals', which no task predicts")


def test_a_job_file_that_is_missing_or_malformed(tmp_path, capsys):
    for command in (["train"], ["doctor"], ["submit", "--address", "http://127.0.0.1:1"]):
        code = main([*command, str(tmp_path / "none.yaml")])
        told((code, *capsys.readouterr()), 2, "none.yaml: no such file")
    (tmp_path / "bad.yaml").write_text("a: [1")
    told((main(["train", str(tmp_path / "bad.yaml")]), *capsys.readouterr()), 2, "line 1: malfor")


@pytest.mark.parametrize("kind", ["cpus", "gpus"])
def test_more_cpus_or_gpus_than_there_are(train, ray_session, kind):
    outcome = train(f"tasks.depth.{kind}=64", inline=False)
    told(outcome, 2, f"tasks.*.{kind}: got 64 in all, expected at most the ")


def test_a_run_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "run").write_text("")
    told(train(), 2, "run: cannot be a run folder")


# ---- the data -----------------------------------------------------------------------------


def test_a_dataset_that_is_not_there(train, tmp_path):
    told(train(reads(tmp_path / "none")), 2, "data.labelled.reader: ", "none: no such file or fold")


def test_truncated_parquet(train, tmp_path):
    file = parquet(tmp_path / "data") / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    told(train(reads(file.parent)), 2, "part-00000.parquet: not a readable Parquet file")


def test_parquet_whose_pages_are_damaged(train, tmp_path):
    file = parquet(tmp_path / "data") / "part-00000.parquet"
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    told(train(reads(file.parent)), 2, "part-00000.parquet: damaged Parquet")


@pytest.mark.parametrize(
    "content", [b"no picture", _bytes("image")[:40], None], ids=["text", "cut", "null"]
)
def test_images_that_do_not_decode_are_skipped_up_to_a_number(train, tmp_path, content):
    data = parquet(tmp_path / "data", image=content)
    code, _, stderr = train(reads(data), "data.labelled.max_corrupt_rows=4")
    assert code == 0, stderr
    outcome = train(reads(data), "data.labelled.max_corrupt_rows=2", out="again")
    told(
        outcome,
        1,
        "task ",
        "dataset 'labelled'",
        "max_corrupt_rows",
        "part-00000.parquet: k",
        "log: ",
    )


def test_an_array_of_the_wrong_shape_is_a_corrupt_row(train, tmp_path):
    data = parquet(tmp_path / "data", depth=_bytes("normals"))
    outcome = train(reads(data), "data.labelled.max_corrupt_rows=0")
    told(outcome, 1, "depth: got float32 3x16x24, expected float32 1x16x24 as in the other rows")


def test_a_stored_array_of_words(tmp_path, capsys):
    buffer = io.BytesIO()
    np.save(buffer, np.array(["a", "b"]))
    table = pa.table({"key": ["k0"], "words": [buffer.getvalue()]})
    pq.write_table(table, tmp_path / "a.parquet")
    code = main(["data", "show", str(tmp_path)])
    told(
        (code, *capsys.readouterr()),
        2,
        "a.parquet: no readable row; the first error: k0: words: got <U1, expected numbers",
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["world", "--out", "."], "is the current folder, which is never replaced"),
        (["world", "--out", "afile"], "afile: is a file, expected a folder"),
        (["world", "--out", "afile/x"], "afile: cannot be a folder of datasets: File exists"),
        (["world", "--out", "link"], "photos: is not replaced, because 'mine.jpg' is not part"),
        (["show", "data", "--save", "x.psd"], "x.psd: expected the name of a picture, such as sh"),
        (["show", "data", "--save", "x.xbm"], "x.xbm: expected the name of a picture, such as sh"),
        (["show", "data", "--save", "x"], "--save x: expected the name of a picture"),
        (["show", "data", "--save", "afile/x.png"], "afile: cannot be a folder of pictures: File"),
        (["show", "data", "--save", "dir.png"], "--save dir.png: is a folder, expected a file"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_before_any_work(
    tmp_path, monkeypatch, capsys, words, problem
):
    def work(*arguments, **keywords):
        raise AssertionError("too late")

    for name in ("World.index", "World.load"):
        monkeypatch.setattr(f"taskray.data.world.{name}", work)
    monkeypatch.setattr("taskray.run.data.show", work)
    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "data")
    (tmp_path / "afile").touch()
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    (tmp_path / "link").symlink_to("photos")
    told((main(["data", *words]), *capsys.readouterr()), 2, problem)


def test_zero_rows(train, tmp_path):
    told(train(reads(parquet(tmp_path / "data", rows=0))), 2, "data: no rows")


def test_a_dataset_without_the_labels_of_its_task(train, tmp_path):
    data = parquet(tmp_path / "data")
    table = pq.read_table(data / "part-00000.parquet").drop(["depth"])
    pq.write_table(table, data / "part-00000.parquet")
    told(
        train(reads(data)),
        2,
        "data.labelled: has no column 'depth', needed by 'depth'; it has",
    )


@pytest.mark.parametrize(
    ("key", "dataset"),
    [("tasks.depth.batch_size", "labelled"), ("mediator.batch_size", "unlabelled")],
)
def test_a_batch_larger_than_its_dataset_is_refused(train, key, dataset):
    problem = f"{key}: got 33, expected at most the 32 rows of data.{dataset}"
    told(train(f"{key}=33"), 2, problem)


# ---- the run ------------------------------------------------------------------------------


class Broken(UNet):
    """A network that cannot be built."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        raise KeyError("no such layer")


class Quits(UNet):
    """A network whose author ends the process where something is missing."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        raise SystemExit(0)


class Hinted(UNet):
    """A network with an argument whose type is there for type checkers alone."""

    def __init__(self, in_channels: int, out_channels: int, rate: Decimal | None = None) -> None:
        super().__init__(in_channels, out_channels)


class Unequal(Relation):
    """A relation that cannot compare what it is given."""

    quantities = ("depth", "normals")

    def __call__(self, predictions, batch) -> dict[str, Tensor]:
        return {"loss": (predictions["depth"][..., ::2] - predictions["normals"]).mean()}


def test_two_predictions_that_do_not_fit_each_other(train):
    outcome = train(f"consistency.depth_normals.relation={HERE}:Unequal", "steps=20")
    told(outcome, 1, "failed at step 1", "relation 'depth_normals' failed on depth 4x1x32x48, norm")


def test_a_prediction_of_the_wrong_shape(train):
    outcome = train("tasks.depth.task=faults:HalfSizeDepth")
    told(outcome, 1, "task 'depth' failed at step", "16", "32")


@pytest.mark.parametrize("inline", [True, False])
def test_a_failed_task_is_named_with_step_cause_and_log(train, ray_session, tmp_path, inline):
    outcome = train("tasks.depth.task={name: faults:DepthThatRaises, at: 1}", inline=inline)
    told(
        outcome, 1, "task 'depth' failed at step ", "RuntimeError: the label store is on fire",
        "errors.log",
    )  # fmt: skip
    log = (tmp_path / "run" / "errors.log").read_text()
    assert "==== task depth" in log
    assert 'raise RuntimeError("the label store is on fire")' in log
    assert "normals" not in log


@pytest.mark.parametrize("inline", [True, False])
def test_what_only_an_actor_can_find_wrong_with_a_job_ends_with_2_as_well(
    train, ray_session, inline
):
    outcome = train(
        "mediator={data: unlabelled, window: all, shuffle: true}",
        "data.unlabelled.materialize=never",
        inline=inline,
    )
    told(outcome, 2, "mediator.shuffle: dataset 'unlabelled' is streamed")


def test_an_error_that_nobody_foresaw_leaves_its_traceback_in_a_file(train, monkeypatch):
    def surprise(*arguments, **keywords):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("taskray.run.train.train", surprise)
    line = told(train(), 1, "unexpected: ZeroDivisionError: surprise (log: ")
    log = Path(line.split("log: ")[1].rstrip(")\n"))
    assert "Traceback" in log.read_text()
    log.unlink()


# ---- checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
def test_a_checkpoint_of_another_model_is_refused_and_the_old_result_kept(
    train, ray_session, tmp_path, inline
):
    assert train()[0] == 0
    before = {f: (tmp_path / "run" / f).read_bytes() for f in ("result.json", "config.yaml")}
    outcome = train("tasks.depth.model.base=16", inline=inline)
    told(outcome, 2, "checkpoints/depth/step_4: from another model: weight 'encoder.0.0.weight'")
    assert before == {f: (tmp_path / "run" / f).read_bytes() for f in before}


def test_a_checkpoint_of_another_optimizer_is_refused(train):
    assert train()[0] == 0
    outcome = train("tasks.depth.optimizer.name=sgd", "steps=8")
    told(outcome, 2, "checkpoints/depth/step_4: ", "optimizer")


def test_damaged_checkpoints_are_named(train, tmp_path):
    assert train()[0] == 0
    for file in tmp_path.glob("run/checkpoints/*/*/model.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    told(train("steps=8"), 2, "step_4: the checkpoint cannot be read")


def test_a_run_of_another_job_is_never_gone_on_from(train, tmp_path):
    assert train()[0] == 0
    before = {f: (tmp_path / "run" / f).read_bytes() for f in ("result.json", "config.yaml")}
    for setting, key in (
        ("seed=1", "seed"),
        ("consistency.depth_normals.weight=0.5", "consistency.depth_normals.weight"),
        ("consistency={}", "consistency.depth_normals"),
        ("tasks.depth.optimizer.lr=0.1", "tasks.depth.optimizer.lr"),
        ("data.labelled.reader.num_samples=16", "data.labelled.reader.num_samples"),
        ("runtime.publisher=forward_server", "runtime.publisher"),
        ("steps=3", "tasks.depth.steps"),
    ):
        line = told(train(setting), 2, f"run: is of another job ({key} differs): ")
        assert "another --out, or --resume never" in line
    assert before == {f: (tmp_path / "run" / f).read_bytes() for f in before}


def test_checkpoints_that_are_kept_apart_say_of_which_job_they_are(train, tmp_path):
    apart = f"checkpoint.path={tmp_path / 'apart'}"
    assert train(apart)[0] == 0
    told(train(apart, "seed=1", out="other"), 2, "apart: is of another job (seed differs)")
    assert train(apart, "steps=6", out="moved")[0] == 0  # of the same job, from another place
    own = f"checkpoint.path={tmp_path / 'mine'}"
    assert train(own, "seed=1", out="mine")[0] == 0
    told(train(apart, "steps=6", out="mine"), 2, "mine: is of another job (seed differs)")
    told(train("checkpoint.path=/proc/none", out="new"), 2, "checkpoint.path: cannot write to /pro")


def test_a_run_goes_on_where_only_its_length_and_its_place_are_others(train):
    assert train()[0] == 0
    assert train("steps=6", "runtime.chunk_steps=2", "checkpoint.every=3", "name=other")[0] == 0


def test_a_run_goes_on_though_a_setting_has_been_invented_since(train, tmp_path):
    assert train("tasks.depth.augment={brightness: 0.1}")[0] == 0
    config = tmp_path / "run/config.yaml"
    older = yaml.safe_load(config.read_text())
    del older["tasks"]["depth"]["augment"]["hue"]
    del older["mediator"]["shuffle"]
    config.write_text(yaml.safe_dump(older))
    assert train("tasks.depth.augment={brightness: 0.1}", "steps=6")[0] == 0


def test_starting_over_removes_nothing_that_the_job_begins_from(train, tmp_path):
    assert train()[0] == 0
    own = f"tasks.normals.checkpoint={tmp_path / 'run'}"
    told(train(own, resume="never"), 2, "tasks.normals.checkpoint: ", "another --out")
    missing = "tasks.normals.checkpoint=nowhere"
    told(
        train(missing, resume="never"),
        2,
        "tasks.normals.checkpoint: nowhere: expected a checkpoint",
    )
    assert (tmp_path / "run/checkpoints/normals/step_4/manifest.json").is_file()


def test_any_job_may_begin_where_another_one_left_no_checkpoint(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_yaml(tiny_job("seed=1")))
    assert train()[0] == 0
