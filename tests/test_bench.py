"""The benchmarks load and explain themselves. What they measure is not for tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "jobs" / "bench"
NAMES = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def _loaded_as_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks find each other's common part beside them, and leave no module behind."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in (*NAMES, "_bare", "_common", "_running"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_explains_itself(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as leaving:
        module.main(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "--quick" in shown
    assert module.__doc__.splitlines()[0] in shown


@pytest.mark.parametrize("name", NAMES)
def test_quick_settings_are_settings_of_the_benchmark(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    for setting in module.QUICK:
        assert f"--{setting.replace('_', '-')}" in shown
