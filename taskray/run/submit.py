"""``taskray submit``: the same job on a cluster, through Ray's job submission.

The current folder travels to the cluster (with the job file and the modules beside it), and so
does this taskray; the packages it needs (Ray, torch ...) must be installed there. What
``.gitignore`` and ``.rayignore`` name stays here, and so do run folders and environments. Ray takes
at most 512 MiB.

Tokens. A cluster may ask for one. We ask it whether it does before Ray is imported, and show ours
only then: from ``RAY_AUTH_TOKEN``, the file ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from taskray.errors import InputError
from taskray.job.config import load_job
from taskray.report.console import print_plain
from taskray.runtime import submission
from taskray.runtime.submission import LEFT_BEHIND

MOST_BYTES = 512 << 20
"""Ray's limit on what may travel."""


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
    submission.agree_on_token(url)
    out = out or f"~/taskray-runs/{job.name}"
    file = Path(os.path.abspath(job_path)).relative_to(folder)
    command = entrypoint(file, overrides, out, python)
    client = submission.connect(url)
    name = submission.submit(client, command, folder)
    print_plain(console, f"submitted {name} to {url}")
    print_plain(console, f"run folder: {out}, where the job's driver runs")
    if not follow:
        print_plain(console, f"log: ray job logs --address {url} --follow {name}")
        return 0
    try:
        return submission.follow(client, name)
    except KeyboardInterrupt:
        print_plain(console, f"the job goes on; to end it: ray job stop --address {url} {name}")
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
