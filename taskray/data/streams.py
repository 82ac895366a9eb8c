"""Streams: a source, batched for training without end, assembled ahead, resumable.

``DedicatedStream`` serves one task its labelled samples, shuffled; ``MediatorStream`` serves all
tasks the same numbered batches. Both skip rows that cannot be read and count them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from taskray.data.batch import Batch
from taskray.data.codec import ERROR, KEY
from taskray.data.prefetch import Prefetcher
from taskray.data.reader import Sample
from taskray.data.source import DatasetInfo, MemorySource, Source, StreamSource
from taskray.data.visiting import Visit, VisitingOrder
from taskray.errors import InputError
from taskray.schema import quantity_of

AHEAD = 2
"""Batches assembled before they are asked for."""
SHUFFLE_BATCHES = 32
"""A streamed dataset is shuffled within a buffer of so many batches."""

State = dict[str, Any]


class DedicatedStream:
    """A task's own labelled samples, every pass in another order.

    Pass p over a source in memory is the permutation ``default_rng([seed, p])``; over a streamed
    one, a shuffle within a buffer, by the same seeds. Passes follow each other without a gap, so
    every batch is full. Loading a state is exact; a streamed source gets there by reading up to
    it.

    ``columns`` are those of the batches; each must be in the source. Raises InputError, from
    ``next``, when more rows than the dataset allows cannot be read.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, columns: Sequence[str]) -> None:
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._columns = _checked_columns(source.info, columns)
        self._corrupt = _CorruptRows(source.info)
        self._state: State = {"pass": 0, "position": 0}
        self._ahead = _Ahead(source, self._batches)

    def next(self) -> Batch:
        """The next batch; waits only if assembling has fallen behind."""
        self._state, batch = self._ahead.next(self._state)
        return batch

    def state_dict(self) -> State:
        """The pass and the rows of it already given, read or not."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ahead.stop()
        self._state = dict(state)

    def corrupt_rows(self) -> int:
        """Rows skipped because they could not be read, each counted once."""
        return len(self._corrupt)

    def close(self) -> None:
        """End the background threads."""
        self._ahead.stop()

    def _batches(self, state: State) -> Iterator[tuple[State, Batch]]:
        rows: list[Sample] = []
        for pass_, position, row in self._rows(state["pass"], state["position"]):
            if self._corrupt.check(row):
                rows.append(row)
            if len(rows) == self._batch_size:
                yield {"pass": pass_, "position": position}, to_batch(rows, self._columns)
                rows = []

    def _rows(self, pass_: int, position: int) -> Iterator[tuple[int, int, Sample]]:
        for current in count(pass_):
            order = self._one_pass(np.random.default_rng([self._seed, current]))
            for number, row in enumerate(islice(order, position, None), start=position):
                yield current, number + 1, row
            position = 0

    def _one_pass(self, random: np.random.Generator) -> Iterator[Sample]:
        if isinstance(self._source, MemorySource):
            for index in random.permutation(self._source.info.num_rows):
                yield self._source.row(int(index))
            return
        buffer: list[Sample] = []
        for row in _rows_of(self._source):
            buffer.append(row)
            if len(buffer) >= SHUFFLE_BATCHES * self._batch_size:
                yield _take_any(buffer, random)
        while buffer:
            yield _take_any(buffer, random)


class MediatorStream:
    """The mediator's fixed, numbered batches, in the order that ``visiting`` defines.

    Batch k holds rows ``k * batch_size`` and on, whatever the order of visits, and is the same
    for every task; the last may be smaller. A row that cannot be read is left out of its batch,
    which keeps its number; a batch without one readable row is skipped. A streamed source keeps
    the batches of the current window in memory.

    ``columns`` are those of the batches; each must be in the source. Raises InputError, from
    ``next``, when more rows than the dataset allows cannot be read.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        window: int | Literal["all"],
        visits: int,
        shuffle: bool,
        seed: int,
        columns: Sequence[str],
    ) -> None:
        self._source, self._batch_size = source, batch_size
        self._columns = _checked_columns(source.info, columns)
        self._corrupt = _CorruptRows(source.info)
        if window == "all" and isinstance(source, StreamSource):
            if shuffle:
                raise InputError(
                    f"mediator.shuffle: dataset {source.info.name!r} is streamed, so it can only "
                    "be shuffled within windows: set mediator.window to a number"
                )
            window, visits = 1, 1  # the same order, with one batch at a time in memory
        num_batches = -(-source.info.num_rows // batch_size)
        self._order = VisitingOrder(num_batches, window, visits, shuffle, seed)
        self._empty: set[int] = set()
        self._state: State = {"visit": 0}
        self._ahead = _Ahead(source, self._batches)

    def next(self) -> Batch:
        """The next batch; waits only if assembling has fallen behind."""
        self._state, batch = self._ahead.next(self._state)
        return batch

    def peek_id(self) -> int:
        """The number of the batch that ``next`` will give, without waiting. (It may name a batch
        that proves to be unreadable as a whole, the first time that one is due.)"""
        for number in count(self._state["visit"]):
            if (batch := self._order[number].batch) not in self._empty:
                return batch
        raise AssertionError("unreachable")

    def state_dict(self) -> State:
        """The number of visits made."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ahead.stop()
        self._state = dict(state)

    def corrupt_rows(self) -> int:
        """Rows skipped because they could not be read, each counted once."""
        return len(self._corrupt)

    def close(self) -> None:
        """End the background threads."""
        self._ahead.stop()

    def _batches(self, state: State) -> Iterator[tuple[State, Batch]]:
        if isinstance(self._source, MemorySource):
            visits = self._from_memory(self._source, state["visit"])
        else:
            visits = self._from_stream(self._source, state["visit"])
        for number, batch, rows in visits:
            good = [row for row in rows if self._corrupt.check(row)]
            if good:
                yield {"visit": number + 1}, to_batch(good, self._columns, batch)
            else:
                self._empty.add(batch)

    def _from_memory(
        self, source: MemorySource, start: int
    ) -> Iterator[tuple[int, int, list[Sample]]]:
        for number in count(start):
            batch = self._order[number].batch
            first = batch * self._batch_size
            last = min(first + self._batch_size, source.info.num_rows)
            yield number, batch, [source.row(index) for index in range(first, last)]

    def _from_stream(
        self, source: StreamSource, start: int
    ) -> Iterator[tuple[int, int, list[Sample]]]:
        """The same, of a source that can only be read in order: window by window."""
        number = start
        windows = Prefetcher(
            lambda: self._windows(source, self._order[start]), 1, f"windows of {source.info.name}"
        )
        try:
            for window in windows:
                end = self._order.end_of_window(number)
                for visit in range(number, end):
                    batch = self._order[visit].batch
                    yield visit, batch, window[batch]
                number = end
        finally:
            windows.close()

    def _windows(self, source: StreamSource, start: Visit) -> Iterator[dict[int, list[Sample]]]:
        """The batches of each window, by number, from the one of ``start`` on, without end."""
        width, num_batches = self._order.width, self._order.num_batches
        first = start.window * width
        while True:
            rows = islice(_rows_of(source), first * self._batch_size, None)
            for begin in range(first, num_batches, width):
                batches = range(begin, min(begin + width, num_batches))
                yield {batch: list(islice(rows, self._batch_size)) for batch in batches}
            for _ in rows:  # none is left: this lets the source end its pass
                pass
            first = 0


def plain_batches(source: Source, batch_size: int, columns: Sequence[str]) -> Iterator[Batch]:
    """Every readable row once, in order: what evaluation reads. The last batch may be smaller.

    Raises InputError when more rows than the dataset allows cannot be read.
    """
    columns = _checked_columns(source.info, columns)
    corrupt = _CorruptRows(source.info)
    rows: list[Sample] = []
    for row in _rows_of(source):
        if corrupt.check(row):
            rows.append(row)
        if len(rows) == batch_size:
            yield to_batch(rows, columns)
            rows = []
    if rows:
        yield to_batch(rows, columns)


def to_batch(rows: Sequence[Sample], columns: Sequence[str], id: int | None = None) -> Batch:
    """Samples stacked as tensors: images as float32 ``[B, 3, H, W]`` in [0, 1], integers as
    int64, all else as float32. The tensors own their memory."""
    return Batch({c: _to_tensor(c, np.stack([row[c] for row in rows])) for c in columns}, id)


def _to_tensor(column: str, values: np.ndarray) -> Tensor:
    # NumPy converts in this thread alone; torch would wake the training's threads for it.
    if quantity_of(column) == "image":
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    elif values.dtype.kind in "iu":
        values = values.astype(np.int64)
    else:
        values = values.astype(np.float32)
    return torch.from_numpy(values)


class _Ahead:
    """Runs a stream's batches ahead of the training, from the position it is asked to start."""

    def __init__(
        self, source: Source, batches: Callable[[State], Iterator[tuple[State, Batch]]]
    ) -> None:
        self._source, self._batches = source, batches
        self._running: Prefetcher[tuple[State, Batch]] | None = None

    def next(self, state: State) -> tuple[State, Batch]:
        if self._running is None:
            name = f"batches of {self._source.info.name}"
            self._running = Prefetcher(lambda: self._batches(dict(state)), AHEAD, name)
        return next(self._running)

    def stop(self) -> None:
        self._source.close()  # the thread may be waiting for it
        if self._running is not None:
            self._running.close()
            self._running = None
        self._source.close()  # what the thread may have begun before it ended


class _CorruptRows:
    """The rows found unreadable so far, and how many may be."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return self._info.skipped + len(self._reasons)

    def check(self, row: Sample) -> bool:
        """Whether the row can be used; InputError where too many cannot."""
        if not str(row[ERROR]):
            return True
        self._reasons.setdefault(str(row[KEY]), str(row[ERROR]))
        if len(self) > self._info.max_corrupt_rows or len(self._reasons) >= self._info.num_rows:
            first = next(iter(self._reasons.values()))
            raise InputError(
                f"dataset {self._info.name!r}: {len(self)} rows cannot be read, allowed are "
                f"{self._info.max_corrupt_rows} (max_corrupt_rows); the first: {first}"
            )
        return False


def _checked_columns(info: DatasetInfo, columns: Sequence[str]) -> list[str]:
    for column in columns:
        if column not in info.layout:
            raise InputError(
                f"dataset {info.name!r}: column {column!r} was not opened; "
                f"opened were {', '.join(info.layout)}"
            )
    return list(columns)


def _rows_of(source: Source) -> Iterator[Sample]:
    """All rows of one pass in order."""
    if isinstance(source, MemorySource):
        for index in range(source.info.num_rows):
            yield source.row(index)
        return
    for block in source.one_pass():
        for number in range(len(block[KEY])):
            # Copied, so that a row that is kept does not keep its whole block.
            yield {column: np.array(values[number]) for column, values in block.items()}


def _take_any(buffer: list[Sample], random: np.random.Generator) -> Sample:
    chosen = int(random.integers(len(buffer)))
    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
    return buffer.pop()
