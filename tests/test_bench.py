"""Every benchmark explains itself, and runs with ``--quick``. What it measures is not for tests."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "jobs" / "bench"
NAMES = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
SHARED = tuple(file.stem for file in FOLDER.glob("_*.py"))


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks find each other's common part beside them, and leave no module behind."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in (*NAMES, *SHARED):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def benchmark_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """They share one cache of converted datasets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_explains_itself_and_its_quick_settings(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as leaving:
        module.main(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "--quick" in shown
    assert module.__doc__.splitlines()[0] in shown
    for setting in module.QUICK:
        assert f"--{setting.replace('_', '-')}" in shown


@pytest.mark.usefixtures("_importable", "ray_session", "benchmark_datasets")
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_with_quick_and_prints_one_json_object(name, capsys):
    importlib.import_module(name).main(["--quick"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == name
    assert result["settings"]["quick"] is True
