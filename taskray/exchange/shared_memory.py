"""Files in shared memory: written by one process, mapped by the others on the same machine.

The life of a file in ``/dev/shm/taskray-<run id>.<random>/``:

    write ──▶ <name> ──free──▶ free/<size>.<number> ──write──▶ <another name> ─▶ …
                │ read
                ▼
              arrays, mapped read-only

A file outlives the process that wrote it. Free files are overwritten because existing pages are
written ten times as fast as new ones. A name is never used twice, and a reader holds a shared
``flock`` while its arrays live: a writer never overwrites bytes that a reader may still see.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path("/dev/shm")

IDLE = 10.0
"""Seconds after which a mapping that is not used is dropped."""

MAX_MAPPED = 256
"""Files that a process keeps mapped for reading, and for writing; each takes a descriptor."""


class Lost(Exception):
    """The prediction is gone: it was released some time ago, or its folder was removed."""


class Part(NamedTuple):
    """Where an array is in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, memory: np.ndarray) -> np.ndarray:
        return memory[self.begin : self.end].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class InFile:
    """The token of a file: what a process on the same machine needs to read it."""

    host: str
    name: str
    parts: tuple[Part, ...]
    num_bytes: int


class Mappings:
    """The files that this process has mapped, kept for the next use: mapping 16 MB costs more than
    copying them."""

    def __init__(self, protection: int, clock: Callable[[], float]) -> None:
        self.protection, self.clock = protection, clock
        self._kept: dict[int, tuple[float, np.ndarray]] = {}  # by inode; the last used is last
        self._lock = threading.Lock()

    def of(self, file: int, path: str, size: int) -> np.ndarray:
        """The bytes of an open file. A kept mapping keeps the inode, so its number is unique."""
        inode, now = os.fstat(file).st_ino, self.clock()
        with self._lock:
            _, memory = self._kept.pop(inode, (now, None))
            self._kept[inode] = (now, self._map(path, size) if memory is None else memory)
            while len(self._kept) > MAX_MAPPED or next(iter(self._kept.values()))[0] < now - IDLE:
                del self._kept[next(iter(self._kept))]
            return self._kept[inode][1]

    def _map(self, path: str, size: int) -> np.ndarray:
        # The mapping keeps a copy of its descriptor, with any lock on it: open the file once more.
        file = os.open(path, os.O_RDWR if self.protection & mmap.PROT_WRITE else os.O_RDONLY)
        try:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            return np.frombuffer(mmap.mmap(file, size, flags, self.protection), np.uint8)
        finally:
            os.close(file)


class Lease:
    """The bytes of a locked file, as the base of its arrays. The lock ends with the last array."""

    def __init__(self, file: int, memory: np.ndarray) -> None:
        self.memory = memory
        read_only = (memory.__array_interface__["data"][0], True)
        self.__array_interface__ = {**memory.__array_interface__, "data": read_only}
        weakref.finalize(self, os.close, file)


class Folder:
    """The folder of a run, as one process uses it; safe for threads.

    Its path contains random digits, so a process that finds it shares memory with the cache. This
    distinguishes machines, and containers on one machine. Every process of the run holds a shared
    lock on the folder, so ``remove_leftovers`` keeps it. Raises OSError if the folder does not
    exist or cannot be used.
    """

    def __init__(self, path: Path, reserve: int, clock: Callable[[], float]) -> None:
        self.path, self.reserve = path, reserve
        self._reading = Mappings(mmap.PROT_READ, clock)
        self._writing = Mappings(mmap.PROT_READ | mmap.PROT_WRITE, clock)
        self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        try:
            (path / "free").mkdir(0o700, exist_ok=True)
        except OSError:  # the folder was removed before it was locked
            os.close(self._lock)
            raise

    @classmethod
    def create(cls, run_id: str, root: Path, reserve: int, clock: Callable[[], float]) -> Folder:
        """A new folder of this run; the older ones are removed."""
        for path in root.glob("taskray-*"):
            if path.name.rpartition(".")[0] == f"taskray-{run_id}":
                shutil.rmtree(path, ignore_errors=True)
        path = root / f"taskray-{run_id}.{secrets.token_hex(8)}"
        path.mkdir(0o700)
        try:
            return cls(path, reserve, clock)
        except FileNotFoundError:  # another run took it for a leftover before it was locked
            return cls.create(run_id, root, reserve, clock)

    def write(self, arrays: Mapping[str, np.ndarray]) -> InFile:
        """Write arrays into a free file or a new one. Raises OSError if there is no room."""
        parts, size = _lay_out(arrays)
        token = InFile(str(self.path), secrets.token_hex(8), parts, size)
        path = self._path(token)
        try:
            file = self._take_free(size, path)
            if file is None:
                self._write_new(path, parts, arrays, size)
                return token
            try:
                memory = self._writing.of(file, path, size)
                for part in parts:
                    np.copyto(part.view(memory), arrays[part.name])
            finally:
                os.close(file)
        except OSError:
            with suppress(OSError):
                os.unlink(path)
            raise
        return token

    def read(self, token: InFile) -> dict[str, np.ndarray]:
        """The arrays, read-only. Raises Lost."""
        path = self._path(token)
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                os.stat(path)  # fails if the file was freed before the lock: it may be overwritten
                memory = np.asarray(Lease(file, self._reading.of(file, path, token.num_bytes)))
            except OSError:
                os.close(file)
                raise
        except OSError as error:
            raise Lost(str(error)) from error
        return {part.name: part.view(memory) for part in token.parts}

    def contains(self, token: InFile) -> bool:
        return token.host == str(self.path) and os.path.exists(self._path(token))

    def free(self, token: InFile, number: int) -> Path:
        """The file can be overwritten, and not be read any more. Writers take the free file with
        the highest ``number`` first. Returns the path of the file until it is taken."""
        path = self.path / "free" / f"{token.num_bytes}.{number:012d}"
        with suppress(OSError):
            os.rename(self._path(token), path)
        return path

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        os.close(self._lock)

    def _path(self, token: InFile) -> str:
        return f"{self.path}/{token.name}"

    def _take_free(self, size: int, path: str) -> int | None:
        """Move a free file of this size to ``path``, and return it open and locked. Takes the file
        that was freed last, because it may still be in the processor's cache."""
        names = [name for name in os.listdir(self.path / "free") if name.startswith(f"{size}.")]
        for name in sorted(names, reverse=True):
            try:
                os.rename(self.path / "free" / name, path)
            except FileNotFoundError:  # another process has taken it
                continue
            file = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:  # still read: the reader keeps the bytes of a removed file
                os.close(file)
                os.unlink(path)
        return None

    def _write_new(
        self, path: str, parts: tuple[Part, ...], arrays: Mapping[str, np.ndarray], size: int
    ) -> None:
        room = os.statvfs(self.path)
        if room.f_bavail * room.f_frsize < size + self.reserve:
            raise OSError(errno.ENOSPC, f"no room for {size} bytes in {self.path}")
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Not through a mapping: on a full file system that ends the process with SIGBUS.
            for part in parts:
                rest = np.ascontiguousarray(arrays[part.name]).reshape(-1).view(np.uint8)
                while rest.size:
                    rest = rest[os.pwrite(file, rest.data, part.end - rest.size) :]
            os.ftruncate(file, size)
        finally:
            os.close(file)


def remove_leftovers(root: Path = ROOT) -> None:
    """Remove this user's folders that no living process uses: killed runs left them."""
    for path in root.glob("taskray-*"):
        with suppress(OSError):
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(folder).st_uid == os.getuid():
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: the run lives
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(folder)


def _lay_out(arrays: Mapping[str, np.ndarray]) -> tuple[tuple[Part, ...], int]:
    """Where each array begins (at a multiple of 64 bytes) and ends, and the size in whole pages.
    No page is without bytes of an array, so all of them exist once the arrays are written."""
    parts: list[Part] = []
    end = 0
    for name, array in arrays.items():
        begin = -(-end // 64) * 64
        end = begin + array.nbytes
        parts.append(Part(name, array.dtype.str, array.shape, begin, end))
    return tuple(parts), -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
