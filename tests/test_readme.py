"""What the README says is true: its example runs, its files and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from collectives import run, tiny_job

import taskray
from taskray.cli import parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_an_own_task_and_relation_runs(tmp_path, monkeypatch):
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
    result = run(job, tmp_path, inline=True)
    assert result["status"] == "finished", result["error"]
    assert 0 <= result["tasks"]["edges"]["metrics"]["f1"] <= 1
    assert result["staleness"]["edges<-depth"]["hit_rate"] == 1
    assert result["staleness"]["depth<-edges"]["hit_rate"] == 1


def test_every_file_the_readme_names_exists():
    links = re.findall(r"\]\(([^)h][^)]*)\)", README)
    tour = README.split("## Where is what")[1].split("## ")[0]
    code = re.findall(r"`((?:taskray|jobs|tune_spaces)/[\w./]*)`", tour)
    for name in [*links, *code]:
        assert (ROOT / name).exists(), name


def test_every_command_the_readme_names_exists():
    named = set(re.findall(r"`taskray (\w+)", README))
    commands = next(a for a in parser()._actions if a.choices and a.metavar == "COMMAND").choices
    assert named == set(commands)


def test_the_public_names_are_these():
    assert taskray.__all__ == sorted(taskray.__all__)
    for name in taskray.__all__:
        assert getattr(taskray, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = taskray.nothing


def test_help_needs_neither_torch_nor_ray():
    code = (
        "import sys, taskray.cli\n"
        "try: taskray.cli.main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'ray'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
