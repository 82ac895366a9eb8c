"""The ``taskray`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import taskray
from taskray.errors import TaskrayError, one_line
from taskray.job.config import load_job
from taskray.report.say import say

DONE, FAILED, INTERRUPTED = 0, 1, 130
EXIT_CODES = (
    "exit codes: 0 done; 2 what was given is wrong (one line); 1 the run failed (which task, which "
    "step, why, and where the log is); 130 stopped by Ctrl-C, after the checkpoints were written"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's stop is Ctrl-C
    try:
        code: int = parsed.run(parsed)
        return code
    except TaskrayError as error:
        print(f"taskray: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("taskray: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: head, less
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        print(f"taskray: unexpected: {one_line(error)} (log: {_keep_traceback()})", file=sys.stderr)
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signal_number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _keep_traceback() -> str:
    """Write the traceback of the present exception to a file; returns its name."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="taskray-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exc(file=file)
    return file.name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="taskray", description="Collective training of vision tasks on Ray.", epilog=EXIT_CODES
    )
    top.add_argument("--version", action="version", version=f"taskray {taskray.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, add, run, help in (
        ("train", _train, run_train, "one collective run of a job"),
        ("evaluate", _evaluate, run_evaluate, "evaluate the checkpoints of a run"),
        ("study", _study, run_study, "run a table: variants x seeds"),
        ("tune", _tune, run_tune, "search a space of jobs with Ray Tune"),
        ("submit", _submit, run_submit, "run a job on a cluster, through Ray's job submission"),
        ("report", _report, run_report, "write report.html of a run or study"),
        ("data", _data, run_data, "build, look at or convert datasets"),
        ("doctor", _doctor, run_doctor, "check a job and this machine before anything is placed"),
    ):
        sub = commands.add_parser(name, help=help, description=help, epilog=EXIT_CODES)
        sub.set_defaults(run=run)
        add(sub)
    return top


def _train(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("job", metavar="JOB.yaml", help="a job file")
    _overrides(sub)
    sub.add_argument("--out", type=Path, help="run folder (default: runs/<name of the job>)")
    sub.add_argument(
        "--resume", choices=("auto", "never"), default="auto",
        help="auto: go on from the run's checkpoints; never: delete them and start over",
    )  # fmt: skip
    sub.add_argument("--inline", action="store_true", help="the same loop in one process, no Ray")


def _evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    _overrides(sub)


def _study(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("study", type=Path, metavar="STUDY.yaml", help="a study file")
    sub.add_argument("--out", type=Path, help="study folder (default: runs/<name of the study>)")
    sub.add_argument("--seeds", type=int, help="how many seeds, instead of the study's own")
    _recording(sub)
    _overrides(sub)


def _tune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("space", type=Path, metavar="SPACE.yaml", help="a space file")
    sub.add_argument("--job", type=Path, metavar="JOB.yaml", help="instead of the space's own")
    sub.add_argument("--out", type=Path, help="folder (default: runs/<name of the space>)")
    sub.add_argument("--samples", type=int, help="how many trials, instead of the space's own")
    _recording(sub)
    _overrides(sub)


def _submit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("job", metavar="JOB.yaml", help="a job file")
    sub.add_argument("--address", required=True, help="of the cluster's dashboard, http://...")
    sub.add_argument("--follow", action="store_true", help="print the job's log until it ends")
    sub.add_argument(
        "--out", metavar="DIR", help="run folder on the cluster (default: ~/taskray-runs/<name>)"
    )
    sub.add_argument(
        "--python", default="python", metavar="COMMAND",
        help="the interpreter that the cluster's Ray runs with, if it is not 'python' there",
    )  # fmt: skip
    _overrides(sub)


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="RUN_OR_STUDY", help="the folder of either")
    sub.add_argument("--baseline", type=Path, help="a run to compare a run with")


def _data(sub: argparse.ArgumentParser) -> None:
    from taskray.commands.data import add_arguments

    add_arguments(sub)


def _doctor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("job", metavar="JOB.yaml", help="a job file")
    _overrides(sub)


def _overrides(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set", action="append", default=[], metavar="a.b=v", dest="overrides",
        help="override a dotted path of the job; may be given often",
    )  # fmt: skip


def _recording(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--record", type=Path, metavar="DIR",
        help="also write what was found to DIR/<name>.md and .json, with commit and hardware",
    )  # fmt: skip


def run_train(arguments: argparse.Namespace) -> int:
    """``taskray train``."""
    job = load_job(arguments.job, arguments.overrides)  # before the slow imports
    from taskray.record.folder import ERRORS
    from taskray.report.compare import comparison_table
    from taskray.report.render import to_rich
    from taskray.run.train import train

    folder = arguments.out or Path("runs") / job.name
    console = Console()
    try:
        result = train(
            job, folder, resume=arguments.resume, inline=arguments.inline, console=console
        )
    except KeyboardInterrupt:
        how = "the same command" if arguments.resume == "auto" else "--resume auto"
        print(f"taskray: interrupted; {how} goes on from {folder}", file=sys.stderr)
        return INTERRUPTED
    console.print(to_rich(comparison_table({job.name: result})))
    say(console, f"run folder: {folder}   report: {folder / 'report.html'}")
    if result["error"]:
        print(f"taskray: {result['error']} (log: {folder / ERRORS})", file=sys.stderr)
        return FAILED
    return DONE


def run_evaluate(arguments: argparse.Namespace) -> int:
    """``taskray evaluate``."""
    from taskray.report.compare import comparison_table
    from taskray.report.render import to_rich
    from taskray.run.evaluate import evaluate_run

    console = Console()
    result = evaluate_run(arguments.folder, arguments.overrides, console)
    console.print(to_rich(comparison_table({result["name"]: result})))
    return DONE


def run_study(arguments: argparse.Namespace) -> int:
    """``taskray study``."""
    from taskray.tuning.study import study

    return study(
        arguments.study,
        arguments.out,
        arguments.seeds,
        arguments.overrides,
        Console(),
        arguments.record,
    )


def run_tune(arguments: argparse.Namespace) -> int:
    """``taskray tune``."""
    from taskray.tuning.tune import tune

    return tune(
        arguments.space,
        arguments.job,
        arguments.out,
        arguments.samples,
        arguments.overrides,
        Console(),
        arguments.record,
    )


def run_submit(arguments: argparse.Namespace) -> int:
    """``taskray submit``."""
    from taskray.run.submit import submit

    return submit(
        arguments.job,
        arguments.address,
        arguments.overrides,
        follow=arguments.follow,
        out=arguments.out,
        python=arguments.python,
        console=Console(),
    )


def run_report(arguments: argparse.Namespace) -> int:
    """``taskray report``."""
    from taskray.record.folder import read_result
    from taskray.report.compare import comparison_table
    from taskray.report.history import Run
    from taskray.report.html import write_report
    from taskray.report.render import to_rich
    from taskray.report.sections import labels

    path = write_report(arguments.folder, arguments.baseline)
    console = Console()
    if arguments.baseline:
        folders = (arguments.baseline, arguments.folder)
        names = tuple(folder.resolve().name for folder in folders)
        if len(set(names)) < 2:  # two runs of a study: .../alone/seed_0, .../collective/seed_0
            names = labels(Run(arguments.folder), Run(arguments.baseline))
        results = [read_result(folder) or {} for folder in folders]
        console.print(to_rich(comparison_table(dict(zip(names, results, strict=True)))))
    say(console, f"report: {path}")
    return DONE


def run_data(arguments: argparse.Namespace) -> int:
    """``taskray data``."""
    from taskray.commands.data import run

    return run(arguments)


def run_doctor(arguments: argparse.Namespace) -> int:
    """``taskray doctor``."""
    job = load_job(arguments.job, arguments.overrides)  # before the slow imports
    from taskray.run.doctor import doctor

    return doctor(job, Console())


if __name__ == "__main__":
    sys.exit(main())
