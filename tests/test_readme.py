"""The README is true: its example runs, and the files, commands and names in it exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from collectives import run, tiny_job

import taskray
from taskray.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_a_task_and_a_relation_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) <= 31
    (tmp_path / "my_tasks.py").write_text(code[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = dict(
        setting.split("=", 1) for setting in re.findall(r"--set '(\S+=\{.*\})'", README)
    )
    assert settings.keys() == {"tasks.edges", "consistency.edges"}
    task = yaml.safe_load(settings["tasks.edges"]) | {
        "dedicated": "labelled",
        "batch_size": 4,
        "model": {"name": "unet", "base": 8, "depth": 2},
    }
    job = tiny_job(
        "steps=20",
        f"tasks.edges={yaml.safe_dump(task, default_flow_style=True)}",
        f"consistency.edges={settings['consistency.edges']}",
    )
    result = run(job, tmp_path, inline=True, measured=True)
    assert result["status"] == "finished", result["error"]
    assert 0 <= result["tasks"]["edges"]["metrics"]["f1"] <= 1
    assert result["staleness"]["edges<-depth"]["hit_rate"] == 1
    assert result["staleness"]["depth<-edges"]["hit_rate"] == 1


def test_every_file_the_readme_names_exists():
    links = re.findall(r"\]\(([^)h][^)]*)\)", README)
    code = re.findall(r"`((?:taskray|jobs|tune_spaces)/[\w./]*)`", README)
    assert len(links) > 10
    assert len(code) > 20
    for name in [*links, *code]:
        assert (ROOT / name).exists(), name


def test_every_command_the_readme_names_exists():
    named = set(re.findall(r"`taskray (\w+)", README))
    assert named == set(COMMANDS)


def test_the_public_names_are_these():
    """A name that is added or removed here changes what other people's code may import."""
    assert taskray.__all__ == [
        "InputError", "Job", "Reader", "Relation", "Task", "TaskrayError", "TrainingError",
        "load_job", "train",
    ]  # fmt: skip
    imported = re.findall(r"^from taskray import (.*)$", README, re.MULTILINE)
    assert {name for line in imported for name in line.split(", ")} == {"Relation", "Task"}


@pytest.mark.parametrize("name", taskray.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(taskray, name)
    assert (value.__name__, value.__module__) == (name, taskray._HOMES[name])


def test_other_names_are_no_attributes_of_the_package():
    with pytest.raises(AttributeError, match="module 'taskray' has no attribute 'nothing'"):
        _ = taskray.nothing


def test_help_on_every_command_needs_neither_torch_nor_ray_nor_pydantic():
    code = (
        "import sys\n"
        "from taskray import cli\n"
        "for words in [[], *([name] for name in cli.COMMANDS)]:\n"
        "    try: cli.main([*words, '--help'])\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'ray', 'pydantic'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
