"""``taskray submit``: the same job on a cluster, through Ray's job submission.

The current folder travels to the cluster (with the job file and the modules beside it), and so
does this taskray; the packages it needs (Ray, torch ...) must be installed there. What
``.gitignore`` and ``.rayignore`` name stays here, and so do run folders and environments. Ray takes
at most 512 MiB.

Tokens. A cluster may ask for one. We ask it whether it does before Ray is imported, and show ours
only then: from ``RAY_AUTH_TOKEN``, the file ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from taskray.errors import InputError, TaskrayError, one_line
from taskray.job.config import load_job
from taskray.report.say import say
from taskray.runtime import environment

LEFT_BEHIND = ("runs", ".venv", "venv", ".git", "__pycache__", "*.pyc", "*.egg-info",
               ".pytest_cache", ".mypy_cache", ".ruff_cache")  # fmt: skip
"""Names that never travel, wherever they stand."""
MOST_BYTES = 512 << 20
"""Ray's limit on what may travel."""
CHATTY = (
    "dashboard.modules.dashboard_sdk",
    "dashboard.modules.job.sdk",
    "_private.runtime_env.packaging",
)
"""Loggers of Ray that tell of every step of a submission."""
VERSION = "/api/version"
ANSWER_SECONDS = 10.0
START_SECONDS = 60.0
"""How long a cluster that has just been started may take until it can run jobs."""


def submit(
    job_path: str,
    address: str,
    overrides: Sequence[str] = (),
    *,
    follow: bool = False,
    out: str | None = None,
    python: str = "python",
    console: Console | None = None,
) -> int:
    """Submit a job to the cluster whose dashboard is at ``address``; returns an exit code.

    With ``follow`` the log is printed until the job ends, and its exit code is returned. ``out``
    is the run folder on the machine where the job's driver runs, and ``python`` its command for
    the interpreter that Ray runs with. Raises InputError where the job
    or the folder is wrong, where no cluster answers, or where it asks for another token.
    """
    console = console or Console()
    job = load_job(job_path, overrides)
    folder = working_folder(Path(job_path))
    check_size(folder)
    url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    agree_on_token(url)
    out = out or f"~/taskray-runs/{job.name}"
    file = Path(os.path.abspath(job_path)).relative_to(folder)
    command = entrypoint(file, overrides, out, python)
    client = _connect(url)
    name = _submit(client, command, folder)
    say(console, f"submitted {name} to {url}")
    say(console, f"run folder: {out}, where the job's driver runs")
    if not follow:
        say(console, f"log: ray job logs --address {url} --follow {name}")
        return 0
    try:
        return _follow(client, name)
    except KeyboardInterrupt:
        say(console, f"the job goes on; to end it: ray job stop --address {url} {name}")
        raise


def working_folder(job: Path) -> Path:
    """The folder that travels: the current one if the job lies in it, else the job's own.

    Raises InputError for a folder nobody means to send: a home folder, or a whole disk.
    """
    here, file = Path.cwd(), Path(os.path.abspath(job))  # without '..'
    folder = here if file.is_relative_to(here) else file.parent
    if folder in (Path.home(), Path(folder.anchor)):
        raise InputError(
            f"{folder}: this whole folder would be sent to the cluster; put the job into a folder "
            "of its own, and start from there"
        )
    return folder


def entrypoint(job: Path, overrides: Sequence[str], out: str, python: str = "python") -> str:
    """The shell command that the cluster runs in the folder that travelled."""
    given = [*overrides, "runtime.address=auto"]
    options = [part for text in given for part in ("--set", text)]
    words = [python, "-m", "taskray", "train", str(job), *options]
    home, rest = ("~/", out[2:]) if out.startswith("~/") else ("", out)  # its shell expands ~
    return f"{shlex.join(words)} --out {home}{shlex.quote(rest)}"


def runtime_environment(folder: Path) -> dict[str, Any]:
    """What the job finds on the cluster: the folder, and this taskray."""
    package = str(Path(__file__).parent.parent)
    return {
        "working_dir": str(folder),
        "py_modules": [package],
        "excludes": list(LEFT_BEHIND),
        "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
    }


def check_size(folder: Path, most: int = MOST_BYTES) -> None:
    """Refuse a folder that Ray would refuse, before it is packed: InputError names the largest
    part of it."""
    ignored = [*LEFT_BEHIND, *_ignore_patterns(folder)]
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _matches(name, ignored)]
        top = Path(place).relative_to(folder).parts[:1]
        for name in files:
            if not _matches(name, ignored):
                part = top[0] if top else name
                sizes[part] = sizes.get(part, 0) + os.lstat(os.path.join(place, name)).st_size
        if sum(sizes.values()) > most:
            largest = max(sizes, key=lambda part: sizes[part])
            raise InputError(
                f"{folder}: more than the {most >> 20} MiB that Ray sends to a cluster; "
                f"the largest part is {largest!r}: leave it out with a line in .rayignore, "
                "and let the job read its data from where the cluster has it"
            )


def _ignore_patterns(folder: Path) -> list[str]:
    """The simple lines of the ignore files: names and patterns for names, without a path."""
    patterns = []
    for name in (".gitignore", ".rayignore"):
        file = folder / name
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        patterns += [line.strip().strip("/").removesuffix("/*") for line in lines]
    return [p for p in patterns if p and not p.startswith(("#", "!")) and "/" not in p]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def agree_on_token(url: str) -> None:
    """Ask the cluster whether it wants a token, and let Ray show ours if it does.

    Must come before Ray is imported, which reads ``RAY_AUTH_MODE`` then. Raises InputError where
    nothing answers, or where a token is wanted and there is none, or must not be shown.
    """
    status = _status(url + VERSION)
    mode = os.environ.get(environment.MODE, "").lower()
    if status in (401, 403):
        if mode not in ("", "token"):
            raise InputError(
                f"--address {url}: the cluster asks for a token, but {environment.MODE}={mode} here"
            )
        if not environment.has_token():
            raise InputError(
                f"--address {url}: the cluster asks for a token; put it into {environment.TOKEN} "
                "or ~/.ray/auth_token (on the cluster: ray get-auth-token)"
            )
        os.environ[environment.MODE] = "token"
    elif status != 200:
        raise InputError(f"--address {url}: expected Ray's dashboard, got HTTP status {status}")


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or one_line(error)
        raise InputError(
            f"--address {url.removesuffix(VERSION)}: no cluster answers: {reason}"
        ) from None


def _connect(url: str) -> Any:
    # variables that would be obeyed instead of the address given
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    import ray.exceptions
    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:  # they turn themselves up when they are imported
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)

    try:
        return JobSubmissionClient(url)
    except ray.exceptions.AuthenticationError:
        raise InputError(
            f"--address {url}: the cluster does not take our token; put its own into "
            f"{environment.TOKEN} or ~/.ray/auth_token (on the cluster: ray get-auth-token)"
        ) from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"--address {url}: {one_line(error)}") from None


def _submit(
    client: Any,
    command: str,
    folder: Path,
    patience: float = START_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """The name of the submitted job. A cluster that has just been started has no agent yet that
    could run it: we ask again."""
    end = time.monotonic() + patience
    while True:
        try:
            name: str = client.submit_job(
                entrypoint=command, runtime_env=runtime_environment(folder)
            )
            return name
        except (RuntimeError, OSError) as error:
            if "No available agent" in str(error) and time.monotonic() < end:
                sleep(1.0)
                continue
            raise TaskrayError(f"the cluster did not take the job: {_reason(error)}") from None


def _reason(said: object) -> str:
    """The last line of what the cluster says, which may be a whole traceback."""
    lines = [line for line in str(said).replace("\\n", "\n").splitlines() if line.strip(' ".')]
    return lines[-1].strip().removeprefix("taskray: ") if lines else "it does not say why"


def _follow(client: Any, name: str) -> int:
    """Print the job's log until it ends; returns the exit code of its command."""
    import aiohttp  # with which Ray's client reads the log

    try:
        asyncio.run(_print_log(client, name))
    except (RuntimeError, OSError, aiohttp.ClientError) as error:  # the job may go on without us
        print(f"the log broke off ({one_line(error)}); waiting for the job to end", flush=True)
    try:
        while not (info := client.get_job_info(name)).status.is_terminal():
            time.sleep(1.0)
    except (RuntimeError, OSError) as error:
        raise TaskrayError(
            f"the cluster no longer answers, and job {name} may go on: {one_line(error)}"
        ) from None
    code = exit_code(str(info.status.value), info.driver_exit_code)
    if code:
        raise _Ended(f"job {name} {info.status.value.lower()}: {_reason(info.message or '')}", code)
    return 0


class _Ended(TaskrayError):
    """The job on the cluster ended with an exit code of its own."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code


def exit_code(status: str, code: int | None) -> int:
    """Our exit code for a job that has ended: that of its command, where it is one of ours."""
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return 130
    return code if code in (1, 2, 130) else 1


async def _print_log(client: Any, name: str) -> None:
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)
