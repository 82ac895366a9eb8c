"""Files that a crash cannot leave half written, folders for one process, and one-line errors."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from taskray.errors import (
    LONGEST,
    InputError,
    TaskrayError,
    TrainingError,
    naming_system_errors,
    one_line,
    system_error,
)
from taskray.files import (
    LOCK,
    atomic_write,
    lock_folder,
    plain,
    read_json,
    read_text,
    remove_temporaries,
    write_json,
    write_text,
)


class Crash(Exception):
    """The writer dies in the middle."""


def half_a_file(path: Path) -> None:
    path.write_text("hal")
    raise Crash


def half_a_folder(path: Path) -> None:
    path.mkdir()
    half_a_file(path / "part")


# ---- atomic write


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = write_text(tmp_path / "new" / "a.txt", "old")
    with pytest.raises(Crash):
        atomic_write(file, half_a_file)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_write_of_a_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    atomic_write(folder, lambda path: (path.mkdir(), (path / "part").write_text("old")))
    with pytest.raises(Crash):
        atomic_write(folder, half_a_folder)
    assert (folder / "part").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_replaces_a_folder_with_content(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("first", "second"):
        atomic_write(folder, lambda path, n=name: (path.mkdir(), (path / n).touch()))
    assert [path.name for path in folder.iterdir()] == ["second"]


def test_what_a_killed_writer_left_is_removed_with_its_own_name_alone(tmp_path: Path) -> None:
    for name in (".data.123.tmp", ".other.123.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".data.124.tmp").touch()
    remove_temporaries(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == [".other.123.tmp"]


# ---- lock


def test_a_locked_folder_is_refused_or_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, order = tmp_path / "run", []

    def wait() -> None:
        with lock_folder(folder, "a run folder", wait=True):
            order.append("waiter")

    with ThreadPoolExecutor(1) as pool:
        with lock_folder(folder, "a run folder"):
            with (
                pytest.raises(InputError, match=f"^{folder}: another taskray process is working"),
                lock_folder(folder, "a run folder"),
            ):
                pass
            waiter = pool.submit(wait)
            while not capsys.readouterr().err and not waiter.done():
                time.sleep(0.01)
            order.append("holder")
        waiter.result(60)
    assert order == ["holder", "waiter"]


def test_two_names_are_two_locks_of_one_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "a folder"), lock_folder(tmp_path, "a folder", name=".other"):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, ".other"}


def test_a_folder_that_cannot_be_made_is_named_with_its_purpose(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file/run: cannot be a run folder: Not a directory"),
        lock_folder(tmp_path / "file" / "run", "a run folder"),
    ):
        pass


# ---- JSON and text


def test_json_is_strict_and_comes_back(tmp_path: Path) -> None:
    value = {"a": math.nan, 1: (np.float32(0.5), np.arange(2)), "ü": {"x": -math.inf}}
    assert plain(value) == {"a": None, "1": [0.5, [0, 1]], "ü": {"x": None}}
    file = write_json(tmp_path / "a.json", value)
    assert "ü" in file.read_text(encoding="utf-8")
    assert read_json(file) == json.loads(file.read_text(encoding="utf-8")) == plain(value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        (b"\xff", "not a text file in UTF-8"),
        (b"{", "malformed JSON: "),
        (b"[1]", "got list, expected a JSON object"),
    ],
)
def test_a_wrong_file_is_named_with_the_reason(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(file)
    assert caught.value.key == str(file)
    assert caught.value.text.startswith(problem)


def test_a_folder_is_not_a_text_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


# ---- errors


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("tasks.depth.lr", "got 'fast', expected a number"),
         "tasks.depth.lr: got 'fast', expected a number"),
        (TrainingError("depth", 7, "the loss\n is not finite"),
         "task 'depth' failed at step 7: the loss is not finite"),
    ],
)  # fmt: skip
def test_our_errors_survive_the_way_between_processes(error: TaskrayError, text: str) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error) == one_line(copy) == text
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(type(error)) as caught:
        pool.apply(_raise, (error,))
    assert vars(caught.value) == vars(error)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("depth"), "KeyError: 'depth'"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (ValueError(), "ValueError"),
    ],
)
def test_any_error_becomes_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_long_texts_of_other_libraries_are_cut_and_ours_are_not() -> None:
    text = "word " * LONGEST
    assert len(one_line(OSError(text))) <= LONGEST
    assert one_line(OSError(text)).endswith("word ...")
    assert one_line(InputError("key", text.strip())) == f"key: {text.strip()}"


# ---- a full disk, and what may not be read or written


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.txt", "old")

    def fill(path: Path) -> None:
        path.touch()
        Path("/dev/full").write_text("new")

    with pytest.raises(TaskrayError) as caught:
        atomic_write(file, fill)
    assert (str(caught.value), caught.value.exit_code) == (f"{file}: No space left on device", 1)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("number", "name", "key", "line", "code"),
    [
        (errno.EACCES, "data/rgb", "data.x.reader",
         "data.x.reader: data/rgb: Permission denied", 2),
        (errno.EACCES, "/cache/a/b", "/cache/a", "/cache/a/b: Permission denied", 2),
        (errno.EPERM, None, "/run", "/run: Operation not permitted", 2),
        (errno.EROFS, "data/rgb", None, "data/rgb: Read-only file system", 2),
        (errno.ENOSPC, "/run/.a.1.tmp", "/run/a", "/run/a: No space left on device", 1),
        (errno.EDQUOT, None, None, "Disk quota exceeded", 1),
    ],
)  # fmt: skip
def test_an_error_of_the_system_is_one_line_with_its_key(
    number: int, name: str | None, key: str | None, line: str, code: int
) -> None:
    error = system_error(OSError(number, "text", name), key)
    assert error is not None
    assert (str(error), error.exit_code) == (line, code)
    assert isinstance(error, InputError) == (code == 2)


def test_other_errors_of_the_system_stay_what_they_are() -> None:
    assert system_error(FileNotFoundError(errno.ENOENT, "text", "a"), "key") is None
    with pytest.raises(FileNotFoundError), naming_system_errors("key"):
        raise FileNotFoundError(errno.ENOENT, "text", "a")


def test_only_what_dead_processes_left_is_removed_if_asked(tmp_path: Path) -> None:
    own = f".step_2.{os.getpid()}.tmp"
    for name in (".step_1.4194305.tmp", own):  # no process has a number above 4194304
        (tmp_path / name).mkdir()
    remove_temporaries(tmp_path / "step_*", dead=True)
    assert [path.name for path in tmp_path.iterdir()] == [own]


def test_a_file_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", {"path": "rooms\udcff"})
    assert read_json(file) == {"path": "rooms\udcff"}
