"""What the benchmarks share: the job they measure, a collective that can be paused, and clocks.

Every benchmark prints progress on stderr and one JSON object on the last line of stdout. They
measure alone on a machine or not at all: ``load_at_start`` stands in every result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from taskray.config import Job, load_job
from taskray.data.source import Handle, RayHandle, load_in_process
from taskray.loop.assembly import build_tasks, columns_of_datasets
from taskray.report.live import Live
from taskray.report.run_folder import RunFolder
from taskray.train import Recorder, hardware, make_collective, prepare_datasets

MAIN_JOB = Path(__file__).resolve().parents[1] / "depth_normals.yaml"
PATIENCE = 300.0
"""Seconds after which something that was waited for is taken to have failed."""
SMALL_MODEL = "{name: unet, base: 8, depth: 2}"


# ---- a benchmark as a program -----------------------------------------------------------------


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark: its docstring as help, and ``--quick``."""
    result = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--quick", action="store_true", help="tiny sizes: proves that it runs, measures nothing"
    )
    return result


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def finish(name: str, result: Mapping[str, Any], settings: argparse.Namespace) -> None:
    """Print the result as one JSON object, on one line."""
    whole = {
        "benchmark": name,
        **result,
        "settings": {k: v for k, v in vars(settings).items() if k != "load"},
        "hardware": hardware(),
        "load_at_start": round(settings.load, 2),
    }
    print(json.dumps(rounded(whole)), flush=True)


def parse(
    arguments: argparse.ArgumentParser, given: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """The settings; with ``--quick`` those of ``quick`` that were not given."""
    if "--quick" in (sys.argv[1:] if given is None else given):
        arguments.set_defaults(**quick)
    settings = arguments.parse_args(given)
    settings.load = os.getloadavg()[0]
    return settings


def numbers(text: str) -> list[int]:
    """``2,3,6`` as an argument."""
    return [int(part) for part in text.split(",")]


def rounded(value: Any) -> Any:
    """Floats to four significant digits, everywhere."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {str(k): rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def median(values: Iterable[float]) -> float:
    """The median; NaN of nothing."""
    values = list(values)
    return statistics.median(values) if values else float("nan")


# ---- the job ----------------------------------------------------------------------------------


def main_job(*overrides: str) -> Job:
    """The main job, ``jobs/depth_normals.yaml``, with overrides."""
    return load_job(MAIN_JOB, overrides)


def small_job(*overrides: str, frames: int = 256) -> Job:
    """The main job with a small network on so many small frames of each dataset: a step takes
    milliseconds."""
    small = [f"tasks.{task}.model={SMALL_MODEL}" for task in ("depth", "normals")]
    for name in ("sim_train", "real_video"):
        sizes = {"height": 32, "width": 48, "num_samples": frames}
        small += [f"data.{name}.reader.{key}={value}" for key, value in sizes.items()]
    return main_job(*small, *overrides)


def with_threads(job: Job, threads: int = 1) -> Job:
    """The same job with so many computing threads in each task."""
    tasks = {n: t.model_copy(update={"threads": threads}) for n, t in job.tasks.items()}
    return job.model_copy(update={"tasks": tasks})


def shared_data(job: Job) -> dict[str, Handle]:
    """The datasets that the job trains on, decoded in the object store as a run has them, without
    the seconds that a Ray Data plan takes. Needs Ray."""
    import ray

    return {
        name: RayHandle(handle.info, [ray.put(block) for block in handle.blocks])
        for name, handle in local_data(job).items()
    }


def local_data(job: Job) -> dict[str, Any]:
    """The datasets that the job trains on, decoded in this process."""
    paths = prepare_datasets(job, use_ray=False, console=Console(quiet=True))
    columns = columns_of_datasets(job, build_tasks(job))
    return {
        name: load_in_process(paths[name], job.data[name], wanted, name=name)
        for name, wanted in columns.items()
    }


# ---- a collective that can be paused ----------------------------------------------------------


@dataclass(frozen=True)
class Stamp:
    """A task has made so many steps at this moment (``time.monotonic``, one clock for all)."""

    at: float
    step: int
    totals: Mapping[str, Any]
    """What the task has counted so far; see ``loop.meters.Totals``."""
    busy: float = 0.0
    """Seconds that its training thread has been running or ready to run (:func:`busy_seconds`)."""


def rate(stamps: Sequence[Stamp], since: float, until: float) -> float:
    """Steps per second between the first and the last stamp in a window."""
    first, last = ends(stamps, since, until)
    return (last.step - first.step) / (last.at - first.at)


def ends(stamps: Sequence[Stamp], since: float, until: float) -> tuple[Stamp, Stamp]:
    """The first and the last stamp in a window of time."""
    inside = [stamp for stamp in stamps if since <= stamp.at <= until]
    if len(inside) < 2:
        raise SystemExit(
            f"only {len(inside)} reports in a window of {until - since:.1f} s: widen it"
        )
    return inside[0], inside[-1]


class _Ended(Exception):
    """The benchmark has seen enough."""


class PausingRecorder(Recorder):
    """What looks on in a real run (files, TensorBoard, table), with time stamps and a gate.

    While the gate is shut the driver stands still in here, so every task ends its chunk and
    stays idle until the gate opens.
    """

    def __init__(self, files: RunFolder, live: Live) -> None:
        super().__init__(files, live)
        self.stamps: dict[str, list[Stamp]] = {}
        self.pids: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.standing = threading.Event()
        self.ended = False

    def report(self, report: dict[str, Any], restarts: int) -> None:
        busy = busy_seconds(report["pid"])
        stamp = Stamp(time.monotonic(), report["step"], report["totals"], busy)
        self.stamps.setdefault(report["task"], []).append(stamp)
        self.pids[report["task"]] = report["pid"]
        super().report(report, restarts)
        if not self.gate.is_set():
            self.standing.set()
            self.gate.wait()
            self.standing.clear()
        if self.ended:
            raise _Ended


class Running:
    """A collective that trains in a thread of its own until it is closed.

    ``data`` maps names to opened datasets. Leaving the block ends its processes.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        console = Console(quiet=True)
        self.files = RunFolder(folder)
        live = Live({n: job.steps_of(n) for n in job.tasks}, job.name, console)
        self.recorder = PausingRecorder(self.files, live)
        self.collective = make_collective(job, str(folder / "checkpoints"), self.recorder, False)
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def stamps(self) -> dict[str, list[Stamp]]:
        return self.recorder.stamps

    def start(self, data: dict[str, Any]) -> None:
        self._thread = threading.Thread(target=self._train, args=(data,), daemon=True)
        self._thread.start()

    def _train(self, data: dict[str, Any]) -> None:
        try:
            self.collective.train(data)
        except _Ended:
            return
        except BaseException as error:
            self.failure = error

    def wait_for_reports(self, count: int) -> None:
        """Until every task has reported so often."""
        until = time.monotonic() + PATIENCE
        while min((len(self.stamps.get(n, ())) for n in self.job.tasks), default=0) < count:
            self.check()
            if time.monotonic() > until:
                raise SystemExit(f"{self.job.name}: no reports within {PATIENCE:g} s")
            time.sleep(0.05)

    def wait_until_done(self) -> None:
        """Until every task has made its last step."""
        assert self._thread is not None
        self._thread.join()
        self.check()

    def check(self) -> None:
        """Stop the benchmark where the collective has failed."""
        errors = [str(s.error) for s in self.collective.states.values() if s.error is not None]
        if self.failure or errors:
            raise SystemExit(f"{self.job.name}: {self.failure or errors[0]}")

    def pause(self) -> None:
        """Let every task end its chunk and stand still."""
        self.recorder.gate.clear()
        if not self.recorder.standing.wait(PATIENCE):
            self.check()
            raise SystemExit(f"{self.job.name}: does not come to a halt")
        chunks = [s[-1].at - s[-2].at for s in self.stamps.values() if len(s) > 1]
        time.sleep(1.2 * max(chunks, default=0.0) + 0.2)

    def resume(self) -> None:
        self.recorder.gate.set()

    def run_for(self, seconds: float, lead: float) -> tuple[float, float]:
        """Train for a window of time, longer where a task has not reported three times in it, and
        pause. Returns when it began (``lead`` seconds after the start) and ended."""
        self.resume()
        begin = time.monotonic() + lead
        until = begin + PATIENCE
        time.sleep(seconds)
        while min(sum(s.at >= begin for s in ss) for ss in self.stamps.values()) < 3:
            self.check()
            if time.monotonic() > until:
                raise SystemExit(f"{self.job.name}: too slow for a window of {seconds:g} s")
            time.sleep(0.05)
        end = time.monotonic()
        self.pause()
        return begin, end

    def close(self) -> None:
        self.recorder.ended = True
        self.recorder.gate.set()
        if self._thread is not None:
            self._thread.join(5.0)
        self.collective.close()
        if self._thread is not None:
            self._thread.join(30.0)
        self.files.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def own_ray(**options: Any) -> Iterator[Path]:
    """A Ray of our own, connected to as ``taskray train`` does; gives a temporary folder."""
    from taskray.runtime.session import session

    with tempfile.TemporaryDirectory(prefix="taskray-bench-") as folder, session(**options):
        yield Path(folder)


# ---- the kernel's view ------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, all its threads together; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds(pid: int) -> float:
    """Seconds that the main thread of a process has run or was ready to: the rest of its time it
    was blocked. NaN where the kernel does not tell."""
    try:
        running, ready, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return float("nan")
    return (int(running) + int(ready)) / 1e9


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def others_cpu(trainers: Iterable[int]) -> float:
    """CPU seconds used so far by this process and its children (Ray's own included) except the
    processes that train."""
    left_out = set(trainers)
    return sum(cpu_seconds(pid) for pid in descendants(os.getpid()) if pid not in left_out)


def memory(pid: int) -> dict[str, float]:
    """Resident memory of a process in MB: its own (``anonymous``), and of the object store."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    lines = (line.split() for line in status)
    kilobytes = {line[0]: float(line[1]) for line in lines if line[-1] == "kB"}
    return {"anonymous": kilobytes["RssAnon:"] / 1000, "shared": kilobytes["RssShmem:"] / 1000}
