"""Streams: a source, batched for training without end, assembled ahead, resumable.

``DedicatedStream`` serves one task its labelled samples, shuffled; ``MediatorStream`` serves all
tasks the same numbered batches. Both skip rows that cannot be read and count them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, Literal

import numpy as np

from taskray.data.readers.reader import Sample
from taskray.data.storage.source import MemorySource, Source, StreamSource
from taskray.data.streams.batch import Batch
from taskray.data.streams.order import VisitingOrder
from taskray.data.streams.prefetch import Prefetcher
from taskray.data.streams.rows import CorruptRows, checked_columns, rows_of, to_batch
from taskray.errors import InputError

AHEAD = 2
"""Batches assembled before they are asked for."""
SHUFFLE_BATCHES = 32
"""A streamed dataset is shuffled within a buffer of so many batches."""

State = dict[str, int]
Visited = tuple[int, int, list[Sample]]
"""Number of a visit, how many walks more than ``visits`` its window is having, and the rows."""


class BatchStream(ABC):
    """Runs ``batches`` in a background thread, from the position to which it has been set.

    Implements ``loop.interfaces.Stream``. What goes wrong in the background ``next`` raises.
    """

    def __init__(self, source: Source, columns: Sequence[str], start: State) -> None:
        self._source = source
        self._columns = checked_columns(source.info, columns)
        self.corrupt = CorruptRows(source.info)
        self._state = start
        self._ahead: Prefetcher[tuple[State, Batch]] | None = None

    @abstractmethod
    def batches(self, state: State) -> Iterator[tuple[State, Batch]]:
        """The batches that follow ``state``, each with the state after it, without end."""

    def next(self) -> Batch:
        """The next batch; waits only if assembling has fallen behind."""
        if self._ahead is None:
            start = dict(self._state)
            name = f"batches of {self._source.info.name}"
            self._ahead = Prefetcher(lambda: self.batches(start), AHEAD, name)
        self._state, batch = next(self._ahead)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches given so far, whatever is assembled ahead."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the next batch is the one that followed it."""
        self.close()
        self._state = dict(state)

    def keep_up(self, front: int, through: int | None = None) -> None:
        """Nothing, unless it is a mediator stream: samples of a task's own have no windows."""
        return None

    def close(self) -> None:
        """End the background threads."""
        self._source.close()  # the thread may be waiting for it
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._source.close()  # what the thread may have begun before it ended


class DedicatedStream(BatchStream):
    """A task's own labelled samples, every pass in another order.

    Pass p over a source in memory is the permutation ``default_rng([seed, p])``; over a streamed
    one, a shuffle within a buffer, by the same seeds. Passes follow each other without a gap, so
    every batch is full. The state is the pass and the rows of it that were used or skipped; a
    streamed source gets there by reading up to it.

    ``columns`` are those of the batches; each must be in the source. Raises InputError, from
    ``next``, when more rows than the dataset allows cannot be read.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, columns: Sequence[str]) -> None:
        super().__init__(source, columns, {"pass": 0, "position": 0})
        self._batch_size, self._seed = batch_size, seed

    def batches(self, state: State) -> Iterator[tuple[State, Batch]]:
        rows: list[Sample] = []
        for pass_, position, row in self._rows(state["pass"], state["position"]):
            if self.corrupt.check(row):
                rows.append(row)
            if len(rows) == self._batch_size:
                yield {"pass": pass_, "position": position}, to_batch(rows, self._columns)
                rows = []

    def _rows(self, pass_: int, position: int) -> Iterator[tuple[int, int, Sample]]:
        for current in count(pass_):
            rows = self._one_pass(np.random.default_rng([self._seed, current]), position)
            for number, row in enumerate(rows, start=position + 1):
                yield current, number, row
            position = 0

    def _one_pass(self, random: np.random.Generator, skip: int) -> Iterator[Sample]:
        if isinstance(self._source, MemorySource):
            for index in random.permutation(self._source.info.num_rows)[skip:]:
                yield self._source.row(int(index))
        else:
            buffer_size = SHUFFLE_BATCHES * self._batch_size
            yield from islice(_shuffled(rows_of(self._source), buffer_size, random), skip, None)


class MediatorStream(BatchStream):
    """The mediator's fixed, numbered batches, in the order that ``visiting`` defines.

    Batch k holds rows ``k * batch_size`` and on, whatever the order of visits, and is the same
    for every task; the last may be smaller. A row that cannot be read is left out of its batch,
    which keeps its number; a batch without one readable row is skipped. A streamed source keeps
    the batches of the current window in memory, and those of the next one when they have come.
    The state is the number of visits made.

    ``window``, ``visits``, ``shuffle`` and ``seed`` are those of ``visiting.VisitingOrder``, and
    must be the same for all tasks. ``columns`` are those of the batches; each must be in the
    source. Raises InputError, from ``next``, when more rows than the dataset allows cannot be
    read, and at once where a streamed source is to be shuffled as a whole.
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
        super().__init__(source, columns, {"visit": 0})
        if window == "all" and shuffle and isinstance(source, StreamSource):
            raise InputError(
                f"mediator.shuffle: dataset {source.info.name!r} is streamed, so it can only "
                "be shuffled within windows: set mediator.window to a number"
            )
        self._batch_size = batch_size
        num_batches = -(-source.info.num_rows // batch_size)
        self._order = VisitingOrder(num_batches, window, visits, shuffle, seed)
        self._plain = window == "all"
        self._front = 0
        self._through: int | None = None

    def keep_up(self, front: int, through: int | None = None) -> None:
        """Stay together with the peers: ``front`` is the window (``Batch.window``) of the
        farthest, ``through`` the last one that all have walked once (None: no matter).

        Who is behind goes to the front when the present walk ends: a slower task makes fewer
        visits, to the batches that its peers are at. Who is ahead walks the window once more,
        until all have been there: where nobody else has been there is nothing to be consistent
        with. What is assembled ahead comes first.
        """
        self._front, self._through = max(self._front, front), through

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._front, self._through = 0, None

    def batches(self, state: State) -> Iterator[tuple[State, Batch]]:
        if isinstance(self._source, MemorySource):
            visits = self._from_memory(self._source, state["visit"])
        else:
            visits = self._from_stream(self._source, state["visit"])
        for number, again, rows in visits:
            good = [row for row in rows if self.corrupt.check(row)]
            if good:
                visit, window = self._order[number], self._order.start_of_window(number)
                tensors = to_batch(good, self._columns).tensors
                batch = Batch(tensors, visit.batch, window, visit.walk + again, number)
                yield {"visit": number + 1}, batch

    def _caught_up(self, number: int) -> int:
        """The visit to make when ``number`` is next: where a walk begins, one farther on if
        that is where the peers are."""
        behind = self._front > self._order.start_of_window(number)
        return self._front if behind and self._order.begins_walk(number) else number

    def _next(self, number: int, again: int) -> tuple[int, int]:
        """The visit after ``number``, and how many walks more than ``visits`` its window is
        having: where a window would end, that is its last walk again while peers lag behind."""
        window, after = self._order.start_of_window(number), number + 1
        if after < self._order.end_of_window(number):
            return after, again
        alone = self._through is not None and self._through < window and self._front <= window
        if alone and not self._plain:
            return after - self._order.length_of_walk(number), again + 1
        return after, 0

    def _from_memory(self, source: MemorySource, number: int) -> Iterator[Visited]:
        again = 0
        while True:
            goal = self._caught_up(number)
            number, again = goal, again if goal == number else 0
            first = self._order[number].batch * self._batch_size
            last = min(first + self._batch_size, source.info.num_rows)
            yield number, again, [source.row(index) for index in range(first, last)]
            number, again = self._next(number, again)

    def _from_stream(self, source: StreamSource, number: int) -> Iterator[Visited]:
        """The same, of a source that can only be read in order: chunk by chunk, where a chunk is
        a window, or one batch of a plain pass, which never comes back to it."""
        here, goal, again = self._order[number], number, 0
        width = 1 if self._plain else self._order.width
        first = here.batch if self._plain else here.window * width
        chunks = Prefetcher(
            lambda: self._chunks(source, first, width), 1, f"windows of {source.info.name}"
        )
        try:
            for chunk in chunks:
                end = number + 1 if self._plain else self._order.end_of_window(number)
                while number < end:
                    goal = max(goal, self._caught_up(number))
                    if goal > number:  # it lies beyond this chunk
                        break
                    yield number, again, chunk[self._order[number].batch]
                    number, again = self._next(number, again)
                    goal = number
                number, again = end, 0
        finally:
            chunks.close()

    def _chunks(
        self, source: StreamSource, first: int, width: int
    ) -> Iterator[dict[int, list[Sample]]]:
        """``width`` batches at a time, by number, from batch ``first`` on, without end."""
        num_batches = self._order.num_batches
        while True:
            rows = islice(rows_of(source), first * self._batch_size, None)
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
    columns = checked_columns(source.info, columns)
    corrupt = CorruptRows(source.info)
    rows: list[Sample] = []
    for row in rows_of(source, more=False):
        if corrupt.check(row):
            rows.append(row)
        if len(rows) == batch_size:
            yield to_batch(rows, columns)
            rows = []
    if rows:
        yield to_batch(rows, columns)


def _shuffled(
    rows: Iterator[Sample], buffer_size: int, random: np.random.Generator
) -> Iterator[Sample]:
    """All rows, each drawn at random from a buffer of the next ``buffer_size``."""
    buffer: list[Sample] = []

    def draw() -> Sample:
        chosen = int(random.integers(len(buffer)))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        return buffer.pop()

    for row in rows:
        buffer.append(row)
        if len(buffer) >= buffer_size:
            yield draw()
    while buffer:
        yield draw()
