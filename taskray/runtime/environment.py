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
