"""Ray's job submission: a client of a cluster, and what travels with a job.

Ray is imported late: :func:`agree_on_token` must come before.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskray.errors import InputError, TaskrayError, one_line
from taskray.runtime import environment

LEFT_BEHIND = ("runs", ".venv", "venv", ".git", "__pycache__", "*.pyc", "*.egg-info",
               ".pytest_cache", ".mypy_cache", ".ruff_cache")  # fmt: skip
"""Names that never travel, wherever they stand."""
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


def runtime_environment(folder: Path) -> dict[str, Any]:
    """What the job finds on the cluster: the folder, and this taskray."""
    package = str(Path(__file__).parent.parent)
    return {
        "working_dir": str(folder),
        "py_modules": [package],
        "excludes": list(LEFT_BEHIND),
        "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
    }


def folder_travelled() -> bool:
    """Whether this process is a submitted job: it starts in the folder that came with it, and so
    do Ray's workers. Ray must have been started."""
    import ray

    return "working_dir" in ray.get_runtime_context().runtime_env


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
                f"--address {url}",
                f"the cluster asks for a token, but {environment.MODE}={mode} here",
            )
        if not environment.has_token():
            raise InputError(
                f"--address {url}",
                f"the cluster asks for a token; put it into {environment.TOKEN} "
                "or ~/.ray/auth_token (on the cluster: ray get-auth-token)",
            )
        os.environ[environment.MODE] = "token"
    elif status != 200:
        raise InputError(f"--address {url}", f"expected Ray's dashboard, got HTTP status {status}")


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or one_line(error)
        raise InputError(
            f"--address {url.removesuffix(VERSION)}", f"no cluster answers: {reason}"
        ) from None


def connect(url: str) -> Any:
    """Ray's client of the cluster at ``url``; InputError where it does not let us in."""
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
            f"--address {url}",
            f"the cluster does not take our token; put its own into "
            f"{environment.TOKEN} or ~/.ray/auth_token (on the cluster: ray get-auth-token)",
        ) from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"--address {url}", one_line(error)) from None


def submit(
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
    """The last line of the cluster's message, which may be a whole traceback."""
    lines = [line for line in str(said).replace("\\n", "\n").splitlines() if line.strip(' ".')]
    return lines[-1].strip().removeprefix("taskray: ") if lines else "it does not say why"


def follow(client: Any, name: str) -> int:
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
