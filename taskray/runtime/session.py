"""Connecting to Ray: a cluster's address, or a Ray of our own on this machine."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from taskray.errors import InputError, TaskrayError
from taskray.runtime import environment


@contextmanager
def session(address: str | None = None, **options: Any) -> Iterator[None]:
    """Ray for the length of the block. A Ray that is already there is used and left running.

    Raises InputError where no cluster answers at the address, or where one of the two asks for a
    token and the other has none.
    """
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            environment.for_own_ray()
            # "local", or else a file that a killed driver left behind would be obeyed
            ray.init(address="local", include_dashboard=False, **_quiet(options))
        else:
            environment.for_cluster()
            ray.init(address=address, **_quiet(options))
    except (ConnectionError, ValueError, TimeoutError, ray.exceptions.AuthenticationError) as error:
        raise InputError(f"runtime.address: {_why_not(address, error)}") from None
    except RuntimeError as error:
        raise TaskrayError(f"Ray did not start: {_first_line(error)}") from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has put its own in its place
    try:
        yield
    finally:
        ray.shutdown()


def _quiet(options: dict[str, Any]) -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR, **options}


def _why_not(address: str | None, error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    if "authentication token" in f"{error} {cause}":
        return (
            f"the cluster at {address} asks for another token; put its own into "
            f"{environment.TOKEN} or ~/.ray/auth_token (on the cluster: ray get-auth-token)"
        )
    where = address or "a Ray of our own on this machine"
    return f"cannot connect to {where}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
