"""Connecting to Ray: to a cluster's address, or to a local Ray started for this process."""

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

from taskray.errors import InputError, TaskrayError, one_line
from taskray.runtime import environment

CONNECT_SECONDS = 10.0

CALL_BYTES = 1 << 20
"""Arguments and results up to this size are sent with the call itself. Ray's default of 100 kB
sends a batch of small predictions through the object store twice, which costs half as much more."""


@contextmanager
def session(address: str | None = None, **options: Any) -> Iterator[None]:
    """Ray inside the block. If this process is already connected, that Ray is used and kept.

    Raises InputError if no cluster answers at the address, or if authentication fails.
    """
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            environment.for_own_ray()
            # "local": without it Ray would use the address in a file that a killed driver left
            ray.init(
                address="local",
                _temp_dir=environment.temporary_folder(),
                include_dashboard=False,
                _system_config={"max_direct_call_object_size": CALL_BYTES},
                **_quiet(options),
            )
        else:
            _check_address(address)
            with _core_muted():
                ray.init(address=address, **_quiet(options))
    except (OSError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise InputError("runtime.address", _reason(address, error)) from None
    except RuntimeError as error:
        raise TaskrayError(f"Ray did not start: {one_line(error)}") from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init replaced it
    try:
        yield
    finally:
        ray.shutdown()


def _quiet(options: dict[str, Any]) -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR, **options}


def _check_address(address: str) -> None:
    """Raise OSError if nothing listens at ``host:port``: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            pass


@contextmanager
def _core_muted() -> Iterator[None]:
    """Close stderr to Ray's core, which repeats a failure every second on file descriptor 2; the
    exception at the end contains it."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def _reason(address: str | None, error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    if "authentication" in f"{error} {cause}".lower():
        return (
            f"the cluster at {address} expects another token; put the cluster's token into "
            f"{environment.TOKEN} or ~/.ray/auth_token (on the cluster: ray get-auth-token)"
        )
    return f"cannot connect to {address or 'a local Ray'}: {one_line(error)}"
