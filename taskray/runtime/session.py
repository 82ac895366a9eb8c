"""Connecting to Ray: a cluster's address, or a Ray of our own on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from taskray.errors import InputError, TaskrayError
from taskray.runtime import environment

CONNECT_SECONDS = 10.0

CALL_BYTES = 1 << 20
"""Up to this size arguments and answers travel with the call itself. Ray's own limit of 100 kB
sends a batch of small predictions through the object store twice: half as dear again."""


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
            ray.init(
                address="local",
                include_dashboard=False,
                _system_config={"max_direct_call_object_size": CALL_BYTES},
                **_quiet(options),
            )
        else:
            _knock(address)
            with _core_muted():
                ray.init(address=address, **_quiet(options))
    except (OSError, ValueError, ray.exceptions.AuthenticationError) as error:
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


def _knock(address: str) -> None:
    """Whether anything listens at ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            pass


@contextmanager
def _core_muted() -> Iterator[None]:
    """Ray's core repeats every refusal each second on file descriptor 2; the exception that it
    ends with says it once."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def _why_not(address: str | None, error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    if "authentication" in f"{error} {cause}".lower():
        return (
            f"the cluster at {address} asks for another token; put its own into "
            f"{environment.TOKEN} or ~/.ray/auth_token (on the cluster: ray get-auth-token)"
        )
    where = address or "a Ray of our own on this machine"
    return f"cannot connect to {where}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
