"""Every benchmark explains itself, and runs with ``--quick``. What it measures is not for tests."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "jobs" / "bench"
NAMES = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
AT_A_TIME = 3
SHARED = tuple(file.stem for file in FOLDER.glob("_*.py"))

Run = Future[subprocess.CompletedProcess[str]]


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks find each other's common part beside them, and leave no module behind."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in (*NAMES, *SHARED):
        if name not in before:
            sys.modules.pop(name, None)


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All benchmarks with ``--quick`` of this checkout, a few at a time: most of what they do is to
    wait for processes to start. They share one cache of converted datasets."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(FOLDER / f"{name}.py"), "--quick"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=environment,
            timeout=300,
        )

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(run, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_with_quick_and_prints_one_json_object(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name
    assert result["settings"]["quick"] is True
