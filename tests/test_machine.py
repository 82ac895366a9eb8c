"""A machine that is not as expected: a console without UTF-8 or with few columns, a full disk, a
folder that may not be read, a long TMPDIR."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from taskray.cli import main
from taskray.commands.streams import accept_every_character
from taskray.data.storage.convert import index_of
from taskray.data.storage.parquet import ParquetFolder
from taskray.errors import InputError, TaskrayError, TrainingError
from taskray.job.config import DataConfig, Plugin
from taskray.record.folder import METRICS, RunFolder, read_metrics
from taskray.record.result import TaskState
from taskray.report.console import print_table
from taskray.run.train import preferring_errors_of
from taskray.runtime import environment

# ---- the console


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "AbsRel v 0.1 +- 0.2 - 3deg d < 1.25^2 ?\n"),
        ("latin-1", "AbsRel v 0.1 ± 0.2 - 3° d < 1.25² ?\n"),
        ("utf-8", "AbsRel ↓ 0.1 ± 0.2 — 3° δ < 1.25² ?\n"),
    ],
)
def test_a_console_prints_stand_ins_for_what_it_lacks(monkeypatch, encoding, expected):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
    accept_every_character()
    # the last: a byte of a file name that is not UTF-8
    print("AbsRel ↓ 0.1 ± 0.2 — 3° δ < 1.25² \udcff", flush=True)
    assert printed.getvalue().decode(encoding) == expected


def test_a_command_sets_its_streams_up(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(printed, "ascii", write_through=True))
    assert main(["doctor", "jobs/größe.yaml"]) == 2
    assert printed.getvalue() == b"taskray: jobs/gr??e.yaml: no such file\n"


@pytest.mark.parametrize("width", [80, 50, 20, 3])
def test_no_part_of_a_table_is_cut_off_on_a_narrow_terminal(width):
    rows = [["image", "uint8[24, 32, 3]", "100.0 %", "RGB"], ["depth", "float32", "98.2 %", "m"]]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("column", "type", "valid", "unit"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width)
    print_table(console, table)
    printed = console.file.getvalue()
    for column in zip(("column", "type", "valid", "unit"), *rows, strict=True):
        assert set("".join(column)) <= set(printed)
    assert sum(map(str.isalnum, printed)) == sum(
        map(str.isalnum, "".join(["column", "type", "valid", "unit", *rows[0], *rows[1]]))
    )
    assert width < 20 or all(len(line) <= max(width, 28) for line in printed.splitlines())


# ---- a full disk


def test_a_line_that_does_not_fit_on_the_disk_is_named_and_leaves_no_part_of_it(
    tmp_path, monkeypatch
):
    folder = RunFolder(tmp_path, tensorboard=False)
    folder.event("first", 1.0)
    good = folder._file
    with Path("/dev/full").open("wb") as folder._file, pytest.raises(TaskrayError) as caught:
        folder.event("second", 2.0)
    assert str(caught.value) == f"{tmp_path / METRICS}: No space left on device"
    folder.close()  # does not fail again
    good.close()
    folder.event("third", 3.0)  # there is space again
    folder.close()
    assert [line["event"] for line in read_metrics(tmp_path)] == ["first", "third"]


def test_the_error_of_a_task_is_not_hidden_by_that_of_writing_the_result():
    full = TaskrayError("run/result.json: No space left on device")
    failed = TrainingError("depth", 10, "run/checkpoints/depth/step_10: No space left on device")
    states = {"normals": TaskState(), "depth": TaskState(error=failed)}
    with pytest.raises(TrainingError) as caught, preferring_errors_of(states):
        raise full
    assert caught.value is failed
    with pytest.raises(TaskrayError) as other, preferring_errors_of({"depth": TaskState()}):
        raise full
    assert other.value is full


# ---- what may not be read


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (PermissionError(13, "x", "a/b"), "taskray: a/b: Permission denied\n", 2),
        (OSError(28, "x", "a/b"), "taskray: a/b: No space left on device\n", 1),
    ],
)
def test_an_error_of_the_system_anywhere_in_a_command_is_one_line(
    monkeypatch, capsys, error, line, code
):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("taskray.job.config.load_job", fail)
    assert main(["doctor", "job.yaml"]) == code
    assert capsys.readouterr().err == line


class Locked(ParquetFolder):
    """A reader whose folder may not be entered."""

    def __init__(self) -> None:
        self.columns = ("image",)

    def index(self) -> list[dict[str, str]]:
        raise PermissionError(13, "x", "data/rgb")


def test_a_dataset_that_may_not_be_read_is_named_with_its_key():
    config = DataConfig(reader=Plugin(name="nyuv2"))
    with pytest.raises(InputError) as caught:
        index_of(Locked(), config, "rooms")
    assert str(caught.value) == "data.rooms.reader: data/rgb: Permission denied"


# ---- the folder of Ray's temporary files


def temporary(monkeypatch, **variables: str) -> str | None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return environment.temporary_folder()


def test_a_tmpdir_too_long_for_sockets_is_replaced_by_a_short_folder(monkeypatch, tmp_path):
    short = os.path.join("/tmp", f"ray-{os.getuid()}")
    assert temporary(monkeypatch) is None
    assert temporary(monkeypatch, TMPDIR="/tmp/a") is None
    assert temporary(monkeypatch, TMPDIR=f"/tmp/{60 * 'a'}") == short
    assert temporary(monkeypatch, TMPDIR=f"/tmp/{60 * 'a'}", RAY_TMPDIR="/tmp") is None
    with pytest.raises(InputError, match=r"^RAY_TMPDIR: /tmp/a+ is too long for Ray's sockets"):
        temporary(monkeypatch, RAY_TMPDIR=f"/tmp/{60 * 'a'}")


def test_a_tmpdir_that_cannot_be_written_to_is_replaced(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not path.startswith("/usr"))
    assert temporary(monkeypatch, TMPDIR="/usr") == os.path.join("/tmp", f"ray-{os.getuid()}")
