"""The ``taskray`` command: what each call does, and with which exit code it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import aiohttp
import pyarrow.parquet as pq
import pytest
import yaml
from collectives import tiny_job
from PIL import Image
from rich.console import Console
from test_bad_input import parquet

from taskray.cli import COMMANDS, main
from taskray.errors import InputError, TaskrayError
from taskray.files import lock_folder
from taskray.job.config import dump_yaml, load_job
from taskray.run.paths import absolute_paths
from taskray.run.submit import check_size, entrypoint, working_folder
from taskray.run.train import train
from taskray.runtime import submission

ROOT = Path(__file__).parent.parent
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """The datasets of the tiny job are converted once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def call(capsys) -> Call:
    """Run the command in this process; gives exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def job(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(dump_yaml(tiny_job("steps=4")))
    return file


def in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


# ---- starting up --------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_on_each_argument_and_on_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "usage: taskray" in text
    assert "exit codes: 0 done; 2" in text
    assert not re.search(
        r"^  [A-Z_.a-z]+\n(?! {4})", text, re.M
    )  # an argument, and nothing said of it
    assert command != "train" or "never: delete them and start from step 0" in " ".join(
        text.split()
    )


def test_help_and_version_are_plain_text(capsys):
    for option, expected in (("--help", "Collective training"), ("--version", "taskray 0.")):
        with pytest.raises(SystemExit):
            main([option])
        text = capsys.readouterr().out
        assert expected in text
        assert "``" not in text


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["train", "j.yaml", "--resume", "x"]])
def test_a_wrong_command_line_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "taskray" in capsys.readouterr().err


def test_errors_of_the_job_file_come_before_the_slow_imports(job):
    code = f"""
import sys
from taskray.cli import COMMANDS, main
for words in (["train", "nowhere.yaml"], ["doctor", {str(job)!r}, "--set", "stepps=3"],
              ["submit", {str(job)!r}, "--address", "http://127.0.0.1:1"]):
    assert main(words) == 2, words
assert not {{"torch", "ray"}} & set(sys.modules)
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_a_closed_pipe_ends_the_command_without_an_error(job):
    pipe = f"{sys.executable} -m taskray doctor {job} | head -n 1"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("tiny\n", "")


def test_the_error_for_a_study_given_as_a_job_names_the_right_command(call):
    study = ROOT / "jobs" / "studies" / "table3_domain_shift.yaml"
    code, _, stderr = call("train", study)
    assert code == 2
    told = f"taskray: {study}: is a study file, expected a job file; use it with: "
    assert stderr == told + f"taskray study {study}\n"


# ---- train and evaluate -------------------------------------------------------------------


def test_train_writes_a_complete_run_folder_and_continues_when_called_again(call, job, tmp_path):
    run = tmp_path / "[/run]"  # which is no markup
    code, out, _ = call("train", job, "--inline", "--out", run)
    assert code == 0
    assert f"run folder: {run}" in out
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "result.json", "report.html"):
        assert (run / name).exists(), name
    assert (run / "checkpoints/depth/step_4/model.safetensors").is_file()
    assert load_job(run / "config.yaml") == load_job(job)

    assert call("train", run / "config.yaml", "--inline", "--out", run, "--set", "steps=6")[0] == 0
    assert json.loads((run / "result.json").read_text())["tasks"]["depth"]["steps"] == 6
    assert "goes on from step 4" in (run / "metrics.jsonl").read_text()
    assert call("train", job, "--inline", "--out", run, "--resume", "never")[0] == 0
    assert "goes on from step" not in (run / "metrics.jsonl").read_text()


def test_a_folder_that_another_run_uses_is_not_changed(call, job, tmp_path):
    run = tmp_path / "run"
    assert call("train", job, "--inline", "--out", run)[0] == 0
    files = {file for file in run.rglob("*") if file.is_file()}
    with lock_folder(run, "a run folder"):
        for words in (["train", job, "--inline", "--out", run, "--resume", "never"],
                      ["train", job, "--inline", "--out", run], ["evaluate", run]):  # fmt: skip
            code, _, stderr = call(*words)
            assert (code, stderr.count("\n")) == (2, 1)
            assert f"{run}: another taskray process is working in this folder" in stderr
    assert {file for file in run.rglob("*") if file.is_file()} == files


def test_tasks_that_differ_by_case_alone_would_share_a_folder(call, job):
    code, _, stderr = call("doctor", job, "--set", "tasks.Depth={task: depth, dedicated: labelled}")
    assert code == 2
    assert "tasks.Depth: differs from 'depth' by case alone" in stderr


def test_relative_paths_are_made_absolute_in_the_folder_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("frames", "runs/old", "world", "sim"):
        (tmp_path / folder).mkdir(parents=True)
    maps = {name: tmp_path / f"{name}.yaml" for name in ("mine", "ours")}
    for file in maps.values():
        file.write_text("classes: [road, car]\nmovable: [car]\n")
    job = tiny_job(
        "tasks.segmentation={task: {name: segmentation, class_map: mine.yaml}, dedicated: test}",
        "consistency.warp.relation={name: segmentation_warp, movable: ./ours.yaml}",
        "tasks.segmentation.checkpoint=~/runs/old",
        "tasks.depth.checkpoint=runs/old#other",
        "tasks.normals.checkpoint=s3://bucket/run",
        "data.labelled.reader={name: cityscapes, path: frames, class_map: mine.yaml}",
        "data.test.reader={name: parquet, path: /there/alone}",
    )
    found = absolute_paths(job)
    assert found.tasks["depth"].checkpoint == f"{tmp_path}/runs/old#other"
    assert found.tasks["normals"].checkpoint == "s3://bucket/run"
    reader = {"path": f"{tmp_path}/frames", "class_map": str(maps["mine"])}
    assert found.data["labelled"].reader.arguments == reader
    assert found.data["test"] == job.data["test"]
    assert found.data["unlabelled"] == job.data["unlabelled"]  # 'world' is no folder there
    assert found.tasks["segmentation"].task.arguments == {"class_map": str(maps["mine"])}
    assert found.tasks["segmentation"].checkpoint == f"{tmp_path}/runs/old"
    assert found.consistency["warp"].relation.arguments == {"movable": str(maps["ours"])}
    same = {"tasks": job.tasks, "data": job.data, "consistency": job.consistency}
    assert found.model_copy(update=same) == job


@pytest.mark.parametrize("settings", [[], ["checkpoint.path=~/elsewhere"]])
def test_actors_get_the_checkpoint_folder_as_an_absolute_path(tmp_path, monkeypatch, settings):
    class Called(Exception):
        pass

    def stop(job, checkpoints, *arguments):
        raise Called(checkpoints)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("taskray.run.train.make_collective", stop)
    with pytest.raises(Called) as called:
        train(tiny_job(*settings), Path("run"), inline=True, console=Console(quiet=True))
    expected = "elsewhere" if settings else "run/checkpoints"
    assert str(called.value) == str(tmp_path / expected)


def test_evaluate_measures_the_checkpoints_again_and_keeps_the_rest(call, job, tmp_path):
    run = tmp_path / "run"
    assert call("train", job, "--inline", "--out", run)[0] == 0
    before = json.loads((run / "result.json").read_text())
    code, out, _ = call("evaluate", run, "--set", "evaluation.data={test: test, own: labelled}")
    assert code == 0
    assert "AbsRel" in out
    after = json.loads((run / "result.json").read_text())
    assert after["evaluated_steps"] == {"depth": 4, "normals": 4}
    for name, task in after["tasks"].items():
        metrics = task["metrics"]
        assert metrics == pytest.approx(before["tasks"][name]["metrics"], rel=1e-4)
        assert set(task["evaluations"]) == {"test", "own"}
        assert {k: v for k, v in task.items() if k not in ("metrics", "evaluations")} == {
            k: v for k, v in before["tasks"][name].items() if k not in ("metrics", "evaluations")
        }
    assert {k for k in after if k not in before} == {"evaluated_steps"}
    assert "own" in (run / "report.html").read_text()


def test_evaluate_refuses_what_it_cannot_measure(call, job, tmp_path):
    assert "not a run folder: no config.yaml" in call("evaluate", tmp_path)[2]
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(job.read_text())
    assert "no checkpoint of task 'depth'" in call("evaluate", run)[2]
    assert call("train", job, "--inline", "--out", run)[0] == 0
    before = (run / "result.json").read_bytes()
    for setting, problem in (
        ("tasks.normals.model.base=16", "normals/step_4: from another model"),
        ("evaluation.data={}", "evaluation.data: empty"),
        ("evaluation.data.test=tset", "no dataset 'tset'"),
    ):
        code, _, stderr = call("evaluate", run, "--set", setting)
        assert (code, stderr.count("\n")) == (2, 1)
        assert problem in stderr
    assert (run / "result.json").read_bytes() == before


def test_a_damaged_file_is_found_before_the_evaluation_and_not_after_it(
    call, job, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    assert call("train", job, "--inline", "--out", run)[0] == 0
    monkeypatch.setattr("taskray.run.evaluate.evaluate_task", None)  # or it would be called
    for name in ("panels.npz", "result.json", "metrics.jsonl"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(b"PK" + whole[: len(whole) // 2] + b"\n")
        code, _, stderr = call("evaluate", run)
        assert (code, stderr.count("\n")) == (2, 1)
        assert str(run / name) in stderr
        (run / name).write_bytes(whole)


def test_report_compares_two_runs(call, job, tmp_path):
    for name in ("one", "two"):
        assert call("train", job, "--inline", "--out", tmp_path / name)[0] == 0
    code, out, _ = call("report", tmp_path / "two", "--baseline", tmp_path / "one")
    assert code == 0
    assert "one" in out
    assert "two" in out
    assert call("report", tmp_path / "none")[0] == 2


# ---- data ---------------------------------------------------------------------------------


def test_data_world_builds_shows_and_converts(call, tmp_path):
    out = tmp_path / "world"
    size = ("--height", 16, "--width", 24, "--frames", 2)
    code, text, _ = call("data", "world", "--num-samples", 5, *size, "--out", out, "--inline")
    assert code == 0
    assert f"{out}: 5 rows" in text
    assert "camera_motion" in text

    code, text, _ = call("data", "show", out, "--save", tmp_path / "sheet.png")
    assert code == 0
    assert "5 rows" in text
    assert "0 corrupt rows" in text
    assert "float32 1x16x24" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000

    few = tmp_path / "few"
    words = ("parquet", f"path={out}", "--limit", 3, "--out", few, "--inline")
    assert call("data", "convert", *words)[0] == 0
    assert "3 rows" in call("data", "show", few)[1]
    assert "looked at the first 2" in call("data", "show", few, "--limit", 2)[1]


def test_data_show_takes_a_dataset_of_a_job(call, job):
    code, text, _ = call("data", "show", job, "--dataset", "test")
    assert code == 0
    assert "test: 8 rows" in text


def test_data_show_counts_corrupt_rows_and_prints_the_reason(call, tmp_path):
    text = call("data", "show", parquet(tmp_path / "data", image=b"no picture"))[1]
    assert "4 corrupt rows" in text
    assert "k1: image: not an image in any known format" in text


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["show", "nowhere"], "nowhere: no such file"),
        (["show", "."], "no *.parquet files in this folder"),
        (["show", "JOB"], "has several datasets, expected --dataset labelled|unlabelled|test"),
        (["show", "JOB", "--dataset", "tset"], "no dataset 'tset'; did you mean 'test'?"),
        (
            ["show", "JOB", "--dataset", "test", "--save", "sheet.txt"],
            "expected the name of a pict",
        ),
        (["world", "--frames", "5", "--inline"], "reader.frames: got 5, expected 1, 2 or 3"),
        (["world", "--num-samples", "0", "--inline"], "num_samples: got 0, expected at least 1"),
        (["convert", "wrold", "--out", "x"], "unknown reader 'wrold'; did you mean 'world'?"),
        (["convert", "world", "frames", "--out", "x"], "'frames': expected key=value"),
        (["convert", "world", "framse=2", "--out", "x"], "framse: unknown key; did you mean 'fra"),
        (["convert", "parquet", "path=nowhere", "--out", "x"], "nowhere: no such file or folder"),
        (["convert", "world", "--out", "JOB"], "job.yaml: is a file, expected a folder"),
        (["convert", "world", "num_samples=2", "--inline", "--out", "."], "is never replaced"),
    ],
)
def test_errors_of_data_are_one_line(call, job, tmp_path, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = call("data", *[str(job) if word == "JOB" else word for word in words])
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert problem in stderr
    assert job.exists()


# ---- doctor -------------------------------------------------------------------------------


def test_doctor_prints_the_parts_of_a_job_and_its_needs(call, job):
    code, out, _ = call("doctor", job)
    assert code == 0
    assert "depth_normals: depth <- normals (normals)" in out
    assert "depth_normals: normals <- depth (depth)" in out
    assert "object store (/dev/shm)" in out
    assert "this job can run" in out


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("tasks.depth.gpus=64", "got 64 in all, expected at most"),
        ("tasks.depth.cpus=4096", "got 4096 in all, expected at most"),
        ("data.test.reader={name: parquet, path: /nowhere}", "/nowhere: no such file or folder"),
        ("consistency.depth_normals.relation=dn", "unknown relation 'dn'"),
        ("mediator.data=tset", "no dataset 'tset'"),
        ("checkpoint.path=nothing://x", "checkpoint.path: nothing://x: cannot be opened"),
        ("tasks.depth.task.loss=l5", "unknown loss 'l5'"),
    ],
)
def test_doctor_ends_with_2_where_a_job_cannot_work(call, job, setting, problem):
    code, _, stderr = call("doctor", job, "--set", setting)
    assert (code, stderr.count("\n")) == (2, 1)
    assert problem in stderr


def test_doctor_warns_of_an_evaluation_that_skips_a_task(call, job, tmp_path):
    file = parquet(tmp_path / "data") / "part-00000.parquet"
    pq.write_table(pq.read_table(file).drop(["normals"]), file)
    setting = f"data.test.reader={{name: parquet, path: {file.parent}}}"
    code, out, _ = call("doctor", job, "--set", setting)
    assert code == 0
    assert "! evaluation 'test' has no normals: it skips task 'normals'" in out
    assert "this job can run, with the warnings above" in out
    mediator = f"data.unlabelled.reader={{name: parquet, path: {file.parent}}}"
    code, out, _ = call("doctor", job, "--set", mediator, "--set", "evaluation.data.own=unlabelled")
    assert code == 0
    assert "! evaluation 'own' has no normals" in out


def jobs() -> list[Path]:
    files = sorted((ROOT / "jobs").rglob("*.yaml"))
    return [file for file in files if "tasks" in yaml.safe_load(file.read_text())]


@pytest.mark.parametrize("path", jobs(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_job_of_the_project_passes_the_doctor(call, path):
    job = load_job(path)
    paths = [Path(d.reader.arguments.get("path", ROOT)).expanduser() for d in job.data.values()]
    if not all(p.exists() for p in paths):
        pytest.skip("its data is not here")
    assert job.description
    small = [f"tasks.{name}.batch_size=2" for name in job.tasks]
    small += ["mediator.batch_size=2"] if job.mediator else []
    settings = [word for text in small for word in ("--set", text)]
    code, out, stderr = call("doctor", path, *settings)
    assert code == 0, stderr
    assert "this job can run" in out


# ---- submit -------------------------------------------------------------------------------


def test_the_cluster_runs_the_same_job_with_its_own_ray():
    command = entrypoint(
        Path("jobs/my job.yaml"), ["steps=3", "description=it's 5 > 4; rm -rf ~"], "~/runs/a b"
    )
    assert command == (
        "python -m taskray train 'jobs/my job.yaml' --set steps=3 "
        "--set 'description=it'\"'\"'s 5 > 4; rm -rf ~' --set runtime.address=auto "
        "--out ~/'runs/a b'"
    )
    assert entrypoint(Path("j.yaml"), [], "s3://x", "/opt/py").startswith("/opt/py -m")


def test_submit_sends_the_folder_of_the_project_and_never_a_home_folder(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    job = tmp_path / "jobs" / "job.yaml"
    job.touch()
    monkeypatch.chdir(tmp_path)
    assert working_folder(Path("jobs/job.yaml")) == tmp_path
    monkeypatch.chdir(tmp_path / "jobs")
    assert working_folder(job) == tmp_path / "jobs"
    (tmp_path / "other.yaml").touch()
    assert working_folder(Path("../other.yaml")) == tmp_path
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="this whole folder would be sent"):
        working_folder(job)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="this whole folder would be sent"):
        working_folder(job)
    excluded = submission.runtime_environment(tmp_path)["excludes"]
    assert {"runs", ".venv", ".git"} <= set(excluded)


def test_a_folder_that_is_too_large_for_ray_is_refused_with_its_largest_part(tmp_path):
    for name in ("data/a.bin", "runs/x/b.bin", ".venv/c.bin", "big/d.bin", "job.yaml"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(2000 if name == "big/d.bin" else 1000))
    check_size(tmp_path, most=4500)
    with pytest.raises(InputError, match="the largest part is 'big'"):
        check_size(tmp_path, most=2500)
    (tmp_path / ".rayignore").write_text("# data\nbig/\n*.yaml\n")
    check_size(tmp_path, most=2500)


class Client:
    """Stands for Ray's client: refuses a few times, then takes the job."""

    def __init__(self, *refusals: Any) -> None:
        self.refusals = list(refusals)
        self.taken: list[dict[str, Any]] = []

    def submit_job(self, **job: Any) -> str:
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        self.taken.append(job)
        return "job-1"

    def get_job_info(self, name: str) -> SimpleNamespace:
        status = SimpleNamespace(is_terminal=lambda: True, value="FAILED")
        return SimpleNamespace(status=status, driver_exit_code=2, message="x\ntaskray: bad key\n")

    async def tail_job_logs(self, name: str):
        yield "some log\n"
        if self.refusals:
            raise self.refusals.pop()


class Gone(Client):
    """As that one, where the cluster does not answer."""

    def get_job_info(self, name: str) -> SimpleNamespace:
        raise ConnectionResetError("gone")


def test_a_cluster_that_has_just_started_is_asked_again(tmp_path):
    waits: list[float] = []
    client = Client("500: No available agent to submit job", "No available agent to submit job")
    name = submission.submit(client, "run", tmp_path, sleep=waits.append)
    assert name == "job-1"
    assert len(waits) == 2
    assert client.taken[0]["entrypoint"] == "run"
    with pytest.raises(TaskrayError, match="did not take the job: disk full"):
        submission.submit(Client("Request failed: Traceback ...\ndisk full"), "run", tmp_path)
    with pytest.raises(TaskrayError, match="No available agent"):
        submission.submit(Client("No available agent"), "run", tmp_path, patience=0)


def test_following_a_job_ends_with_its_exit_code(capsys):
    with pytest.raises(TaskrayError, match="job job-1 failed: bad key") as error:
        submission.follow(Client(), "job-1")
    assert error.value.exit_code == 2
    assert capsys.readouterr().out == "some log\n"
    for broken in (aiohttp.ClientPayloadError("cut"), OSError("cut"), RuntimeError("cut")):
        with pytest.raises(TaskrayError, match="job job-1 failed: bad key"):
            submission.follow(Client(broken), "job-1")
        assert "cut); waiting for the job to end" in capsys.readouterr().out
    with pytest.raises(TaskrayError, match="no longer answers, and job job-1 may go on: gone"):
        submission.follow(Gone(), "job-1")
    assert submission.exit_code("SUCCEEDED", 0) == 0
    assert submission.exit_code("STOPPED", None) == 130
    assert submission.exit_code("FAILED", 137) == 1


@pytest.mark.parametrize(
    ("status", "mode", "token", "problem"),
    [
        (200, None, None, None),
        (401, None, None, "asks for a token; put it into RAY_AUTH_TOKEN"),
        (401, "disabled", "secret", "asks for a token, but RAY_AUTH_MODE=disabled here"),
        (401, None, "secret", None),
        (404, None, None, "expected Ray's dashboard, got HTTP status 404"),
    ],
)
def test_client_and_cluster_agree_on_tokens_or_the_error_gives_the_reason(
    monkeypatch, tmp_path, status, mode, token, problem
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(submission, "_status", lambda url: status)
    if problem:
        with pytest.raises(InputError, match=problem):
            submission.agree_on_token("http://x")
        return
    submission.agree_on_token("http://x")
    assert os.environ.get("RAY_AUTH_MODE") == ("token" if status == 401 else None)


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("127.0.0.1:9", None),
        ("127.0.0.1:9 x", None),  # http.client.InvalidURL
        ("127.0.0.1:9", http.client.BadStatusLine("SSH-2.0")),
    ],
)
def test_no_cluster_at_the_address(call, job, monkeypatch, address, error):
    if error:
        monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=error))
    code, _, stderr = call("submit", job, "--address", address)
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"--address http://{address}: no cluster answers: " in stderr
    assert error is None or "BadStatusLine: SSH-2.0" in stderr
