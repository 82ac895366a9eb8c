"""``taskray submit``: runs a job on a cluster, through Ray's job submission.

The current folder (with the job file and the modules beside it) and this taskray package are sent
to the cluster; other packages (Ray, torch ...) must be installed there. Files named in
``.gitignore`` and ``.rayignore``, run folders and environments are not sent. Ray's limit is
512 MiB.

Tokens: a cluster may require one. taskray asks the cluster before Ray is imported, and sends the
token only if it is required: from ``RAY_AUTH_TOKEN``, the file ``RAY_AUTH_TOKEN_PATH`` or
``~/.ray/auth_token``.
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
"""Ray's limit on the size of a folder sent to a cluster."""


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

    With ``follow`` the log is printed until the job ends, and the job's exit code is returned.
    ``out`` is the run folder on the machine where the job's driver runs, ``python`` the command
    of the cluster's Python interpreter. Raises InputError for a wrong job or folder, where no
    cluster answers, and where it requires another token.
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
    print_plain(console, f"run folder: {out}, on the machine of the job's driver")
    if not follow:
        print_plain(console, f"log: ray job logs --address {url} --follow {name}")
        return 0
    try:
        return submission.follow(client, name)
    except KeyboardInterrupt:
        print_plain(console, f"the job still runs; to stop it: ray job stop --address {url} {name}")
        raise


def working_folder(job: Path) -> Path:
    """The folder that is sent: the current one if it contains the job file, else the job file's.

    Raises InputError for a home folder or a whole disk, which would be sent by mistake.
    """
    here, file = Path.cwd(), Path(os.path.abspath(job))  # without '..'
    folder = here if file.is_relative_to(here) else file.parent
    if folder in (Path.home(), Path(folder.anchor)):
        raise InputError(
            str(folder),
            "this whole folder would be sent to the cluster; move the job file into another "
            "folder and run the command there",
        )
    return folder


def entrypoint(job: Path, overrides: Sequence[str], out: str, python: str = "python") -> str:
    """The shell command that the cluster runs in the folder that was sent."""
    given = [*overrides, "runtime.address=auto"]
    options = [part for text in given for part in ("--set", text)]
    words = [python, "-m", "taskray", "train", str(job), *options]
    # outside the quotes, so that the cluster's shell expands it
    home, rest = ("~/", out[2:]) if out.startswith("~/") else ("", out)
    return f"{shlex.join(words)} --out {home}{shlex.quote(rest)}"


def check_size(folder: Path, most: int = MOST_BYTES) -> None:
    """Raise InputError for a folder that is larger than Ray's limit, before Ray packs it. The error
    names the largest file or folder in it."""
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
                str(folder),
                f"more than the {most >> 20} MiB that Ray sends to a cluster; the largest part is "
                f"{largest!r}: name it in .rayignore, and let the job read its data from a path "
                "on the cluster",
            )


def _ignore_patterns(folder: Path) -> list[str]:
    """The lines of the ignore files that are names or patterns of names; lines with a path are not
    used."""
    patterns = []
    for name in (".gitignore", ".rayignore"):
        file = folder / name
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        patterns += [line.strip().strip("/").removesuffix("/*") for line in lines]
    return [p for p in patterns if p and not p.startswith(("#", "!")) and "/" not in p]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
