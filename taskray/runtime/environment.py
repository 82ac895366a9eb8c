"""What Ray reads from the environment, decided before Ray starts. Does not import Ray.

A Ray of our own on this machine listens on every network interface, and a connection to it can run
code. So it asks for a token, which this process makes up and only its children know.
Nothing is written to the home folder, and a token left there by a cluster is not used.

A cluster has its own rule, and client and cluster must agree: with ``RAY_AUTH_MODE`` unset, Ray
shows a token where it finds one. ``RAY_AUTH_MODE`` set by a person always decides.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from taskray.errors import InputError

SHORT_FOLDER = "/tmp"
SOCKET = f"session_2026-01-01_00-00-00_000000_{1 << 22}/sockets/plasma_store"
"""The longest name of a socket in Ray's temporary folder: with a process number of this machine."""
SOCKET_BYTES = 107
"""The longest path of a socket on Linux."""

MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def for_own_ray() -> None:
    """A Ray of our own is about to start in this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if MODE not in os.environ and TOKEN_FILE not in os.environ:
        # Ray turns tokens on by itself where the mode is unset, and takes this one
        os.environ.setdefault(TOKEN, secrets.token_hex(32))


def has_token() -> bool:
    """Whether Ray would find a token to show to a cluster."""
    if os.environ.get(TOKEN):
        return True
    file = Path(os.environ.get(TOKEN_FILE) or "~/.ray/auth_token").expanduser()
    return file.is_file()


def temporary_folder() -> str | None:
    """The folder for the temporary files of a Ray of our own; None: Ray's own choice fits.

    Ray puts sockets into ``RAY_TMPDIR``, else ``TMPDIR``, else ``/tmp``, and the path of a socket
    has at most 107 bytes. A batch system's ``TMPDIR`` is often longer, or cannot be written to:
    then it is ``/tmp``. Raises InputError where a folder that ``RAY_TMPDIR`` names has the same
    fault, or ``/tmp`` cannot be written to.
    """
    variable = next((v for v in ("RAY_TMPDIR", "TMPDIR") if v in os.environ), None)
    folder = os.environ[variable] if variable else SHORT_FOLDER
    problem = _problem_of(folder)
    if problem is None:
        return None
    if variable != "TMPDIR" or _problem_of(SHORT_FOLDER) is not None:
        raise InputError(
            variable or SHORT_FOLDER,
            f"{folder} {problem}; set RAY_TMPDIR to a short folder that Ray can write to",
        )
    return os.path.join(SHORT_FOLDER, f"ray-{os.getuid()}")  # "ray" may be another user's


def _problem_of(folder: str) -> str | None:
    """Why Ray cannot have its temporary files in a folder; None if it can."""
    place = os.path.join(folder, "ray", SOCKET)
    if len(os.fsencode(place)) > SOCKET_BYTES:
        return f"is too long for Ray's sockets ({SOCKET_BYTES} bytes with all that Ray adds)"
    inside = os.path.join(folder, "ray")
    there = inside if os.path.isdir(inside) else folder
    if os.path.isdir(there) and not os.access(there, os.W_OK | os.X_OK):
        return "cannot be written to"
    return None
