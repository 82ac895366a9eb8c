"""How the bytes of a prediction travel: written once, and read by every peer without a copy.

    producer                        cache                              consumer
    publish(arrays) ── token ──▶ accept(token)
       │                         hand_out(token, host) ── token ──▶ fetch(token) ──▶ arrays
       │                         release(token)                         ▲
       └─── one copy ───▶ a file in shared memory ──── mapped ──────────┘

Actor calls carry tokens alone. A token is ``InFile`` on one machine, ``InStore`` (the object store)
between machines, and ``ByValue`` for small predictions, for inline runs, and where shared memory
is full or does not exist.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taskray.exchange.shared_memory import IDLE, ROOT, Folder, InFile, Lost

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]

SMALL = 32 << 10
"""Bytes below which a prediction travels by value. Ray carries 100 kB inside a call, which costs
0.1 ms more than a token; above that it costs 1.5 ms more. A call may carry several predictions."""

GRACE = 2.0
"""Seconds for which a released prediction can still be fetched: its token may be on its way."""


@dataclass(frozen=True)
class ByValue:
    """A token that carries its arrays."""

    arrays: dict[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class InStore:
    """The token of an object in the object store."""

    ref: Any
    num_bytes: int


Token = ByValue | InFile | InStore


class Transport:
    """The side of a task: ``publish`` and ``fetch``.

    ``get`` returns the object of a reference. ``reserve`` is the number of bytes of shared memory
    to leave free. Ray's object store is there too, and allocates its pages only when it uses them.
    """

    def __init__(
        self,
        get: Callable[[Any], Arrays] | None = None,
        reserve: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.get, self.reserve, self.clock = get, reserve, clock
        self.folder: Folder | None = None
        self._has_warned = False

    @property
    def host(self) -> str:
        """Names the shared memory that this process uses; empty where it uses none."""
        return str(self.folder.path) if self.folder else ""

    def join(self, host: str) -> None:
        """Use the shared memory of the cache, if it is on this machine. ``host`` is that of the
        cache; it changes when the cache restarts."""
        self.close()
        if host:
            with suppress(OSError):
                self.folder = Folder(Path(host), self.reserve, self.clock)

    def publish(self, arrays: Arrays) -> Token:
        """Write a prediction for its readers. Raises nothing: what cannot be shared travels by
        value."""
        folder, token = self.folder, ByValue(dict(arrays))
        if folder is None or token.num_bytes < SMALL:
            return token
        try:
            return folder.write(arrays)
        except OSError as error:
            self._warn(error)
            return token

    def fetch(self, token: Token) -> dict[str, np.ndarray]:
        """The arrays, read-only and unchanged while they are referenced. Raises Lost.

        Copy an array before writing: a tensor made of it can be written to, which ends the
        process with SIGSEGV.
        """
        if isinstance(token, InFile):
            folder = self.folder
            if folder is None or token.host != str(folder.path):
                raise Lost(f"{token.host} is not the shared memory of this process")
            return folder.read(token)
        arrays: Arrays
        if isinstance(token, ByValue):
            arrays = token.arrays
        elif self.get is None:
            raise Lost("there is no object store")
        else:
            try:
                arrays = self.get(token.ref)
            except Exception as error:
                raise Lost(f"{type(error).__name__}: {error}") from error
        views = {name: array.view() for name, array in arrays.items()}
        for view in views.values():
            view.flags.writeable = False
        return views

    def close(self) -> None:
        folder, self.folder = self.folder, None
        if folder is not None:
            folder.close()

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            log.warning("no shared memory, so predictions are copied more often: %s", error)
        self._has_warned = True


class CacheTransport(Transport):
    """The side of the cache, which decides how long a prediction can be fetched. One thread.

    ``put`` moves arrays to the object store and returns a reference. Of released predictions at
    most ``max_released`` bytes can still be fetched, and only for ``GRACE`` seconds.
    """

    def __init__(
        self,
        put: Callable[[Arrays], Any] | None = None,
        get: Callable[[Any], Arrays] | None = None,
        reserve: int = 0,
        clock: Callable[[], float] = time.monotonic,
        max_released: int = 1 << 28,
    ) -> None:
        super().__init__(get, reserve, clock)
        self.put, self.max_released = put, max_released
        self.released_bytes = 0
        """Bytes of released predictions that can still be fetched."""
        self._released: deque[tuple[float, InFile]] = deque()
        self._free: deque[tuple[float, Path]] = deque()
        self._num_freed = 0
        self._stored: dict[str, InStore] = {}  # for other machines, by the file's name

    def create(self, run_id: str, root: Path = ROOT) -> None:
        """Make shared memory for a run; ``run_id`` is unique. What an earlier cache of the run
        had there is removed, because its index is gone."""
        try:
            self.folder = Folder.create(run_id, root, self.reserve, self.clock)
        except OSError as error:
            self._warn(error)

    def accept(self, token: Token) -> Token:
        """Take a published prediction over. Returns the token to keep. Raises Lost."""
        self._clean_up()
        if isinstance(token, InFile) and not (self.folder and self.folder.contains(token)):
            raise Lost(f"{token.host}/{token.name} is not in the shared memory of the cache")
        if not isinstance(token, ByValue):
            return token
        shared = self.publish(token.arrays)
        if isinstance(shared, InFile):
            return shared
        if self.put is not None and token.num_bytes >= SMALL:
            return InStore(self.put(token.arrays), token.num_bytes)
        # Arrays that came with a call may be in memory that belongs to the caller.
        return ByValue({name: array.copy() for name, array in token.arrays.items()})

    def hand_out(self, token: Token, host: str) -> Token:
        """What a reader with this ``host`` can fetch. A file is put into the object store once,
        when the first reader on another machine asks for it. Raises Lost."""
        if not isinstance(token, InFile) or host == token.host:
            return token
        if token.name not in self._stored:
            arrays = self.fetch(token)
            if self.put is None:
                return ByValue(arrays)
            self._stored[token.name] = InStore(self.put(arrays), token.num_bytes)
        return self._stored[token.name]

    def has(self, token: Token) -> bool:
        """Whether the bytes of a kept prediction are still there."""
        return not isinstance(token, InFile) or (Path(token.host) / token.name).exists()

    def release(self, token: Token) -> None:
        """The prediction was replaced, evicted or refused."""
        if isinstance(token, InFile):
            self._released.append((self.clock(), token))
            self.released_bytes += token.num_bytes
        self._clean_up()

    def close(self) -> None:
        """Remove the shared memory."""
        if self.folder is not None:
            self.folder.remove()
        super().close()

    def _clean_up(self) -> None:
        now = self.clock()
        while self._released and (
            self.released_bytes > self.max_released or self._released[0][0] <= now - GRACE
        ):
            _, token = self._released.popleft()
            self.released_bytes -= token.num_bytes
            self._stored.pop(token.name, None)
            if self.folder is not None:
                self._num_freed += 1
                self._free.append((now, self.folder.free(token, self._num_freed)))
        while self._free and self._free[0][0] <= now - IDLE:
            self._free.popleft()[1].unlink(missing_ok=True)
