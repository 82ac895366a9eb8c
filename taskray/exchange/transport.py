"""How the bytes of a prediction travel: written once, read by every peer without a copy.

    producer                      cache                           consumer
    publish(arrays) ──token──▶ accept(token)
       │                       hand_out(token, host) ──token──▶ fetch(token) ──▶ arrays
       │                       release(token)                      ▲
       └─ one copy ─▶ /dev/shm/taskray-<run id>.<random>/<name> ───┘ mapped, read-only

Only the token goes through the actor calls. A token is ``InFile`` (shared memory: one machine),
``InStore`` (the object store: between machines) or ``ByValue`` (small predictions, inline runs,
and whatever the other two cannot take: no failure of the transport reaches a training loop).

A file outlives the process that wrote it. Released by the cache, it keeps its name for a grace
period, then moves to ``free/``. There a producer takes it, renames it and overwrites it: pages
that exist already are written ten times as fast as new ones. A name is never used twice, and a
reader holds a shared ``flock`` while its arrays live, so no byte that is read is overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]

SHARED_MEMORY = Path("/dev/shm")

SMALL = 32 << 10
"""Bytes below which a prediction travels by value. Ray carries 100 kB inside a call, for about
0.1 ms more than a token (beyond that 1.5 ms more), and a call may carry several predictions."""

GRACE = 2.0
"""Seconds for which a released prediction can still be fetched."""

IDLE = 10.0
"""Seconds after which a free file is removed, and a file that is not used is unmapped."""

MAX_MAPPED = 256
"""Files that a process keeps mapped; each takes one file descriptor."""


class Lost(Exception):
    """The prediction of this token is gone: released, or its folder was removed."""


@dataclass(frozen=True)
class ByValue:
    """A token that carries its arrays."""

    arrays: dict[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Part(NamedTuple):
    """Where one array is in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def of(self, memory: np.ndarray) -> np.ndarray:
        return memory[self.begin : self.end].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class InFile:
    """A token of a file in a folder of shared memory."""

    host: str
    name: str
    parts: tuple[Part, ...]
    num_bytes: int


@dataclass(frozen=True)
class InStore:
    """A token of an object in the object store."""

    ref: Any
    num_bytes: int


Token = ByValue | InFile | InStore


class Mappings:
    """Files that this process has mapped, kept for the next use: to map 16 MB again costs more
    than to copy them."""

    def __init__(self, protection: int, clock: Callable[[], float]) -> None:
        self.protection, self.clock = protection, clock
        self._kept: dict[int, tuple[float, np.ndarray]] = {}  # by inode, last used last
        self._lock = threading.Lock()

    def of(self, fd: int, path: str, size: int) -> np.ndarray:
        """The bytes of an open file. A kept mapping keeps the inode, so its number is unique."""
        inode, now = os.fstat(fd).st_ino, self.clock()
        with self._lock:
            _, memory = self._kept.pop(inode, (now, None))
            if memory is None:
                memory = self._map(path, size)
            self._kept[inode] = (now, memory)
            while len(self._kept) > MAX_MAPPED or self._oldest() < now - IDLE:
                del self._kept[next(iter(self._kept))]
        return memory

    def _map(self, path: str, size: int) -> np.ndarray:
        # Not ``fd``: the mapping keeps a copy of its descriptor, and so of the lock on it.
        fd = os.open(path, os.O_RDWR if self.protection & mmap.PROT_WRITE else os.O_RDONLY)
        try:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            return np.frombuffer(mmap.mmap(fd, size, flags=flags, prot=self.protection), np.uint8)
        finally:
            os.close(fd)

    def _oldest(self) -> float:
        return next(iter(self._kept.values()))[0]


class Lease:
    """The memory of a file that is being read: base of its arrays, locked until they are gone."""

    def __init__(self, fd: int, memory: np.ndarray) -> None:
        self.memory = memory
        weakref.finalize(self, os.close, fd)
        address = memory.__array_interface__["data"][0]
        self.__array_interface__ = {
            "version": 3,
            "shape": memory.shape,
            "typestr": "|u1",
            "data": (address, True),  # read-only
        }


class Folder:
    """A run's folder of shared memory, as one process uses it. Its path contains random digits,
    so a process on which it exists shares memory with the process that made it.

    The shared lock on the folder shows ``remove_leftovers`` that the run lives. OSError: the
    folder is not on this machine, or may not be used.
    """

    def __init__(self, path: Path, reserve: int, clock: Callable[[], float]) -> None:
        self.path, self.reserve = path, reserve
        self._reading, self._writing = (Mappings(p, clock) for p in (mmap.PROT_READ, _READ_WRITE))
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        try:
            (path / "free").mkdir(0o700, exist_ok=True)
        except OSError:  # removed before it was locked
            os.close(self._fd)
            raise

    def write(self, arrays: Arrays) -> InFile:
        """OSError where there is no room."""
        parts, size = _lay_out(arrays)
        name = secrets.token_hex(8)
        fd = self._take_free(size, name)
        if fd is None:
            self._write_new(self.path / name, parts, arrays, size)
        else:
            try:
                memory = self._writing.of(fd, f'{self.path}/{name}', size)
                for part in parts:
                    np.copyto(part.of(memory), arrays[part.name])
            finally:
                os.close(fd)
        return InFile(str(self.path), name, parts, size)

    def read(self, token: InFile) -> dict[str, np.ndarray]:
        """Read-only arrays. Raises Lost."""
        path = f"{self.path}/{token.name}"
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Lost(str(error)) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.stat(path)  # renamed before it was locked: these may be the bytes of another one
            lease = Lease(fd, self._reading.of(fd, path, token.num_bytes))
        except OSError as error:
            os.close(fd)
            raise Lost(str(error)) from None
        memory = np.asarray(lease)
        return {part.name: part.of(memory) for part in token.parts}

    def free(self, token: InFile, number: int) -> Path:
        """Let producers overwrite a file; a later one has a higher ``number``."""
        path = self.path / "free" / f"{token.num_bytes}.{number:012d}"
        with suppress(OSError):
            os.rename(self.path / token.name, path)
        return path

    def close(self) -> None:
        os.close(self._fd)

    def _take_free(self, size: int, name: str) -> int | None:
        """A free file of this size under a new name, open and locked; the last one freed, because
        its bytes may still be in the processor's cache."""
        free = self.path / "free"
        for old in sorted((f for f in os.listdir(free) if f.startswith(f"{size}.")), reverse=True):
            with suppress(FileNotFoundError):  # another producer was faster
                os.rename(free / old, self.path / name)
                fd = os.open(self.path / name, os.O_RDWR)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return fd
                except BlockingIOError:  # it is still read, by a reader that keeps the bytes
                    os.close(fd)
                    os.unlink(self.path / name)
        return None

    def _write_new(self, path: Path, parts: tuple[Part, ...], arrays: Arrays, size: int) -> None:
        room = os.statvfs(self.path)
        if room.f_bavail * room.f_frsize < size + self.reserve:
            raise OSError(errno.ENOSPC, f"no room for {size} bytes in {self.path}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # A full file system is an error here; in mapped memory it would end the process.
            for part in parts:
                rest = np.ascontiguousarray(arrays[part.name]).reshape(-1).view(np.uint8)
                begin = part.begin
                while rest.size:
                    written = os.pwrite(fd, rest.data, begin)
                    rest, begin = rest[written:], begin + written
            os.ftruncate(fd, size)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)


class Transport:
    """The side of a task: ``publish`` and ``fetch``.

    ``get`` fetches an object by its reference. ``reserve``: bytes of shared memory to leave free
    for other uses (Ray's object store is there, too).
    """

    def __init__(
        self,
        get: Callable[[Any], Arrays] | None = None,
        reserve: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.get, self.reserve, self.clock = get, reserve, clock
        self.folder: Folder | None = None
        self._logged = False

    @property
    def host(self) -> str:
        """The folder that this process shares with the cache; empty where it shares none."""
        return str(self.folder.path) if self.folder else ""

    def join(self, host: str) -> None:
        """Share the cache's folder, if it is on this machine. Call again after the cache restarts:
        it has a new folder."""
        self.close()
        if host:
            with suppress(OSError):
                self.folder = Folder(Path(host), self.reserve, self.clock)

    def publish(self, arrays: Arrays) -> Token:
        """Raises nothing: what cannot be shared travels by value."""
        token = ByValue(dict(arrays))
        if self.folder is None or token.num_bytes < SMALL:
            return token
        try:
            return self.folder.write(arrays)
        except OSError as error:
            self._log(error)
            return token

    def fetch(self, token: Token) -> dict[str, np.ndarray]:
        """Read-only arrays, which stay as they are while they are referenced. Raises Lost."""
        if isinstance(token, ByValue):
            return token.arrays
        if isinstance(token, InFile):
            if self.folder is None or token.host != self.host:
                raise Lost(f"{token.host} is not on this machine, or was removed")
            return self.folder.read(token)
        if self.get is None:
            raise Lost("there is no object store")
        try:
            return dict(self.get(token.ref))
        except Exception as error:
            raise Lost(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        folder, self.folder = self.folder, None
        if folder is not None:
            folder.close()

    def _log(self, error: OSError) -> None:
        if not self._logged:
            log.warning("predictions travel by value, which is slower: %s", error)
        self._logged = True


class CacheTransport(Transport):
    """The side of the cache, which decides how long a prediction can be fetched. One call at a
    time. ``put`` takes arrays to the object store; a reference to them is returned."""

    def __init__(
        self,
        put: Callable[[Arrays], Any] | None = None,
        get: Callable[[Any], Arrays] | None = None,
        reserve: int = 0,
        max_released: int = 1 << 28,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(get, reserve, clock)
        self.put, self.max_released = put, max_released
        self.released_bytes = 0
        """In files that can still be fetched although they were released."""
        self._released: deque[tuple[float, InFile]] = deque()
        self._free: deque[tuple[float, Path]] = deque()
        self._freed = 0
        self._stored: dict[str, Token] = {}  # for readers on other machines, by name of the file

    def create(self, run_id: str, root: Path = SHARED_MEMORY) -> None:
        """Make this run's folder; ``run_id`` is unique. What an earlier cache of the run has left
        is removed: its index is gone."""
        try:
            for path in root.glob("taskray-*"):
                if path.name.rpartition(".")[0] == f"taskray-{run_id}":
                    shutil.rmtree(path, ignore_errors=True)
            path = root / f"taskray-{run_id}.{secrets.token_hex(8)}"
            path.mkdir(0o700)
            self.folder = Folder(path, self.reserve, self.clock)
        except OSError as error:
            self._log(error)

    def accept(self, token: Token) -> Token:
        """Take a published prediction over: the token to keep. Raises Lost."""
        self._clean_up()
        if isinstance(token, InFile):
            if token.host != self.host or not os.path.exists(f"{token.host}/{token.name}"):
                raise Lost(f"{token.host}/{token.name} is gone")
            return token
        if isinstance(token, InStore):
            return token
        shared = self.publish(token.arrays)
        if isinstance(shared, InFile):
            return shared
        if self.put is not None and token.num_bytes >= SMALL:
            return InStore(self.put(token.arrays), token.num_bytes)
        copies = {name: array.copy() for name, array in token.arrays.items()}
        for copy in copies.values():
            copy.flags.writeable = False
        return ByValue(copies)

    def hand_out(self, token: Token, host: str) -> Token:
        """What a reader that shares the folder ``host`` (its ``Transport.host``) can fetch. Put
        into the object store once, when the first reader on another machine asks. Raises Lost."""
        if not isinstance(token, InFile) or host == token.host:
            return token
        if token.name not in self._stored:
            arrays = self.fetch(token)
            if self.put is None:
                return ByValue(arrays)
            self._stored[token.name] = InStore(self.put(arrays), token.num_bytes)
        return self._stored[token.name]

    def release(self, token: Token) -> None:
        """The prediction was replaced, evicted or refused."""
        if isinstance(token, InFile):
            self._released.append((self.clock(), token))
            self.released_bytes += token.num_bytes
        self._clean_up()

    def close(self) -> None:
        """Remove the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder.path, ignore_errors=True)
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
                self._freed += 1
                self._free.append((now, self.folder.free(token, self._freed)))
        while self._free and self._free[0][0] <= now - IDLE:
            self._free.popleft()[1].unlink(missing_ok=True)


def remove_leftovers(root: Path = SHARED_MEMORY) -> None:
    """Remove this user's folders of runs of which no process lives."""
    for path in root.glob("taskray-*"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_uid == os.getuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the run lives
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def _lay_out(arrays: Arrays) -> tuple[tuple[Part, ...], int]:
    """Where each array begins and ends, at multiples of 64 bytes, and the file's size in whole
    pages. Each page has bytes of an array, so no page is allocated while mapped."""
    parts: list[Part] = []
    end = 0
    for name, array in arrays.items():
        begin = -(-end // 64) * 64
        end = begin + array.nbytes
        parts.append(Part(name, array.dtype.str, array.shape, begin, end))
    return tuple(parts), -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
