"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

# Ray reads these when it is imported, and its workers inherit them. A token that an earlier
# cluster left in the home folder must not decide whether tests can connect.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except those that Ray raises about its own code."""
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning"):
        config.addinivalue_line("filterwarnings", rf"ignore::{kind}:ray\.")
    # A shell starts a background job with SIGINT ignored, and every process that tests start would
    # inherit that: none would end by Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share one Ray have the marker ``ray``; those that start their own set it."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[ModuleType]:
    """Ray on two CPUs, started once for all tests that ask for it. Workers can import tests and
    benchmarks."""
    import ray
    import ray.data

    with pytest.MonkeyPatch.context() as patch:
        for folder in (TESTS, TESTS.parent / "jobs" / "bench"):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 << 20,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real datasets that ``TASKRAY_DATA`` names; without it the test is skipped."""
    root = os.environ.get("TASKRAY_DATA")
    if not root:
        pytest.skip("TASKRAY_DATA names no folder with real datasets")
    return Path(root)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted datasets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "taskray"
