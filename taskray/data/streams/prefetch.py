"""Work done ahead by a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """``next`` was waiting, or was called, on a prefetcher that has been closed."""


class Prefetcher(Generic[T]):
    """Runs an iterator in a daemon thread, at most ``depth`` items ahead of its consumer.

    The thread starts at once. What the iterator raises, ``next`` raises, StopIteration at its
    end included.
    """

    def __init__(self, items: Callable[[], Iterator[T]], depth: int, name: str) -> None:
        self._items = items
        self._depth = depth
        self._ready: deque[T] = deque()
        self._end: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end or self._closed)
            if self._closed:
                raise Closed
            if not self._ready:
                assert self._end is not None
                raise self._end
            item = self._ready.popleft()
            self._changed.notify_all()
            return item

    def close(self, timeout: float = 5.0) -> None:
        """End the thread; waits for the item it is working on, up to ``timeout`` seconds."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        items: Iterator[T] | None = None
        try:
            items = self._items()
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                item = next(items)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                del item  # keep no more alive than ``depth`` items
        except BaseException as error:  # raised by the next call of `next`
            self._finish(error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _finish(self, end: BaseException) -> None:
        with self._changed:
            self._end = end
            self._changed.notify_all()
