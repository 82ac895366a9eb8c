"""Connecting to Ray: a cluster's address, or a Ray of our own on this machine."""

from __future__ import annotations

import logging
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
    try:
        if address is None:
            environment.for_own_ray()
            # "local", or else a file that a killed driver left behind would be obeyed
            ray.init(address="local", include_dashboard=False, **_quiet(options))
        else:
            ray.init(address=address, **_quiet(options))
    except ray.exceptions.AuthenticationError as error:
        raise InputError(_no_token(address, error)) from None
    except (ConnectionError, ValueError, TimeoutError) as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ray.exceptions.AuthenticationError):
            raise InputError(_no_token(address, cause)) from None
        where = address or "a Ray of our own on this machine"
        raise InputError(
            f"runtime.address: cannot connect to {where}: {_first_line(error)}"
        ) from None
    except RuntimeError as error:
        raise TaskrayError(f"Ray did not start: {_first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _quiet(options: dict[str, Any]) -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR, **options}


def _no_token(address: str | None, error: Exception) -> str:
    where = f"the cluster at {address}" if address else "Ray"
    reason = _first_line(error).partition(". ")[0]
    return (
        f"runtime.address: {where} asks for another token ({reason}); put the token of the "
        "cluster into RAY_AUTH_TOKEN or ~/.ray/auth_token, with RAY_AUTH_MODE=token"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
