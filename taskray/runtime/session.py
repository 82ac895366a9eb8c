"""Connecting to Ray: a cluster's address, or a Ray of our own on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Read by Ray when it is imported. Our own Ray on this machine listens on the loopback alone and
# needs no token; with a cluster, client and cluster must agree, so its user decides.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray  # noqa: E402

from taskray.errors import InputError, TaskrayError  # noqa: E402


@contextmanager
def session(address: str | None = None, **options: Any) -> Iterator[None]:
    """Ray for the length of the block. A Ray that is already there is used and left running.

    Raises InputError where no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    try:
        if address is None:
            # "local", or else a file that a killed driver left behind would be obeyed
            ray.init(address="local", include_dashboard=False, **_quiet(options))
        else:
            ray.init(address=address, **_quiet(options))
    except (ConnectionError, ValueError, TimeoutError) as error:
        where = address or "a Ray of our own on this machine"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"runtime.address: cannot connect to {where}: {reason}") from None
    except RuntimeError as error:
        raise TaskrayError(f"Ray did not start: {str(error).strip().splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _quiet(options: dict[str, Any]) -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR, **options}
