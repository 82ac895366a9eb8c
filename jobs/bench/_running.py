"""A collective that can be paused, and what the kernel reports of its processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import PATIENCE
from rich.console import Console

from taskray.job.config import Job
from taskray.loop.meters import Totals
from taskray.loop.report import ChunkReport
from taskray.record.folder import RunFolder
from taskray.report.live import Live
from taskray.run.recorder import Recorder
from taskray.run.train import make_collective


@dataclass(frozen=True)
class Stamp:
    """A task has made so many steps at this moment (``time.monotonic``, one clock for all)."""

    at: float
    step: int
    totals: Totals
    """What the task has counted so far."""
    busy: float = 0.0
    """Seconds that its training thread has been running or ready to run (:func:`busy_seconds`)."""
    values: Mapping[str, float] = field(default_factory=dict)
    """What it reported of the chunk that ends here."""


def rate(stamps: Sequence[Stamp], since: float, until: float) -> float:
    """Steps per second between the first and the last stamp in a window."""
    first, last = ends(stamps, since, until)
    return (last.step - first.step) / (last.at - first.at)


def ends(stamps: Sequence[Stamp], since: float, until: float) -> tuple[Stamp, Stamp]:
    """The first and the last stamp in a window of time."""
    inside = [stamp for stamp in stamps if since <= stamp.at <= until]
    if len(inside) < 2:
        window = f"a window of {until - since:.1f} s"
        raise SystemExit(f"{len(inside)} reports in {window}: make it wider, or the run longer")
    return inside[0], inside[-1]


class _Ended(Exception):
    """The benchmark has seen enough."""


class PausingRecorder(Recorder):
    """What looks on in a real run (files, TensorBoard, table), with time stamps and a gate.

    While the gate is closed the driver waits here, so every task ends its chunk and stays idle
    until the gate opens.
    """

    def __init__(self, files: RunFolder, live: Live) -> None:
        super().__init__(files, live)
        self.stamps: dict[str, list[Stamp]] = {}
        self.pids: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.standing = threading.Event()
        self.ended = False

    def report(self, report: ChunkReport, restarts: int) -> None:
        now, busy = time.monotonic(), busy_seconds(report.pid)
        stamp = Stamp(now, report.step, report.totals, busy, report.values)
        self.stamps.setdefault(report.task, []).append(stamp)
        self.pids[report.task] = report.pid
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

    def start_together(
        self, data: dict[str, Any], prepare: Callable[[Any], Any] = lambda actor: None
    ) -> None:
        """Start, and hold the task that is ready first until all are. ``prepare`` is called in
        each task's process, with its actor."""
        self.recorder.gate.clear()
        self.start(data)
        self._wait_for_halt()
        self.ask(prepare)  # it queues behind the setup
        self.resume()

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
        self._wait_for_halt()
        chunks = [s[-1].at - s[-2].at for s in self.stamps.values() if len(s) > 1]
        time.sleep(1.2 * max(chunks, default=0.0) + 0.2)

    def _wait_for_halt(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.recorder.standing.wait(1.0):
            self.check()
            if time.monotonic() > until:
                raise SystemExit(f"{self.job.name}: does not come to a halt")

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

    def ask(self, what: Callable[[Any], Any]) -> dict[str, Any]:
        """What a function returns for each task actor; while they stand still, at once."""
        import ray

        calls = {n: a.__ray_call__.remote(what) for n, a in self.collective.roster.actors.items()}
        return {name: ray.get(call, timeout=PATIENCE) for name, call in calls.items()}

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


def cpu_of(pids: Iterable[int]) -> float:
    """CPU seconds used so far by these processes."""
    return sum(cpu_seconds(pid) for pid in pids)


def others_cpu(trainers: Iterable[int]) -> float:
    """CPU seconds used so far by this process and its children (Ray's own included) except the
    processes that train."""
    return cpu_of(set(descendants(os.getpid())) - set(trainers))


def memory(pid: int) -> dict[str, float]:
    """Resident memory of a process in MB: its own (``anonymous``), and of the object store."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    lines = (line.split() for line in status)
    kilobytes = {line[0]: float(line[1]) for line in lines if line[-1] == "kB"}
    return {"anonymous": kilobytes["RssAnon:"] / 1000, "shared": kilobytes["RssShmem:"] / 1000}
