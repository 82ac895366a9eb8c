"""The stream of the mediator's numbered batches, the same for all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from taskray.data.readers.reader import Sample
from taskray.data.storage.source import MemorySource, Source, StreamSource
from taskray.data.streams.batch import Batch
from taskray.data.streams.order import MediatorOrder, Place
from taskray.data.streams.prefetch import Prefetcher
from taskray.data.streams.rows import rows_of, to_batch
from taskray.data.streams.stream import BatchStream, State
from taskray.errors import InputError


class MediatorStream(BatchStream):
    """The mediator's fixed, numbered batches, in the order that ``order.MediatorOrder`` defines.

    Batch k holds rows ``k * batch_size`` and on, whatever the order of visits, and is the same
    for every task; the last may be smaller. A row that cannot be read is left out of its batch,
    which keeps its number; a batch without one readable row is skipped. The state is the window
    and the visit in it that comes next.

    ``order`` must have the same numbers for all tasks. ``columns`` are those of the batches; each
    must be in the source. Raises InputError, from ``next``, when more rows than the dataset allows
    cannot be read, and at once where a streamed source is to be shuffled as a whole.
    """

    def __init__(
        self, source: Source, batch_size: int, order: MediatorOrder, columns: Sequence[str]
    ) -> None:
        super().__init__(source, columns, {"window": 0, "visit": 0})
        if order.window == "all" and order.shuffle and isinstance(source, StreamSource):
            raise InputError(
                "mediator.shuffle",
                f"dataset {source.info.name!r} is streamed, so it can only be shuffled within "
                "windows: set mediator.window to a number",
            )
        self._batch_size, self._order = batch_size, order
        self._told = 0

    def next(self) -> Batch:
        """The next batch of the window that :meth:`follow` named last."""
        while True:
            batch = super().next()
            if batch.place.window >= self._told:
                return batch  # others were assembled ahead, in a window that is left behind

    def follow(self, window: int) -> None:
        """Go to ``window``, if it is a later one, with the next batch. No effect where the order
        moves on by itself, or has one window alone."""
        if self._order.visits is None and self._order.window != "all":
            self._told = max(self._told, window)

    def position(self) -> Place | None:
        """The place that comes next; None at the very beginning."""
        state = self.state_dict()
        place = self._order.place(state["window"], state["visit"])
        return place if (place.window, place.visit) > (0, 0) else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._told = 0

    def batches(self, state: State) -> Iterator[tuple[State, Batch]]:
        window, visit = state["window"], state["visit"]
        rows = self._open(self._order.place(window, visit, self._told))
        unreadable = 0  # batches in a row without one readable row
        try:
            while True:
                place = self._order.place(window, visit, self._told)
                window, visit = place.window, place.visit + 1
                number = self._order.batch(place)
                good = [row for row in rows.of_batch(place, number) if self.corrupt.check(row)]
                unreadable = 0 if good else unreadable + 1
                if good:
                    tensors = to_batch(good, self._columns).tensors
                    yield {"window": window, "visit": visit}, Batch(tensors, number, place)
                elif unreadable >= place.size:  # nothing to stay for, and no task would come
                    window, visit, unreadable = window + 1, 0, 0
        finally:
            rows.close()

    def _open(self, start: Place) -> _Rows:
        if isinstance(self._source, MemorySource):
            return _RowsInMemory(self._source, self._batch_size)
        return _RowsInOrder(self._source, self._batch_size, self._order, start)


class _Rows(Protocol):
    """The rows of a mediator batch."""

    def of_batch(self, place: Place, number: int) -> list[Sample]: ...

    def close(self) -> None: ...


class _RowsInMemory:
    """Any batch at any time."""

    def __init__(self, source: MemorySource, batch_size: int) -> None:
        self._source, self._batch_size = source, batch_size

    def of_batch(self, place: Place, number: int) -> list[Sample]:
        first = number * self._batch_size
        last = min(first + self._batch_size, self._source.info.num_rows)
        return [self._source.row(index) for index in range(first, last)]

    def close(self) -> None: ...


class _RowsInOrder:
    """From a source that can only be read in order: the batches of the current window are kept in
    memory, and those of the next one are read ahead. A window of the whole dataset is read again
    in each pass, batch by batch."""

    def __init__(
        self, source: StreamSource, batch_size: int, order: MediatorOrder, start: Place
    ) -> None:
        self._source, self._batch_size, self._order = source, batch_size, order
        self._plain = order.window == "all"
        self._number = self._number_of(start) - 1
        self._chunk: dict[int, list[Sample]] = {}
        first = self._number + 1
        self._chunks = Prefetcher(
            lambda: self._read(first), 1, f"windows of {self._source.info.name}"
        )

    def of_batch(self, place: Place, number: int) -> list[Sample]:
        while self._number < self._number_of(place):
            self._chunk, self._number = next(self._chunks), self._number + 1
        return self._chunk[number]

    def close(self) -> None:
        self._chunks.close()

    def _number_of(self, place: Place) -> int:
        """Chunks before that of a place: one a window, or one a visit of a plain pass."""
        return place.visit if self._plain else place.window

    def _batches_of(self, number: int) -> range:
        if self._plain:
            batch = number % self._order.num_batches
            return range(batch, batch + 1)
        return self._order.batches(number)

    def _read(self, number: int) -> Iterator[dict[int, list[Sample]]]:
        """Chunk after chunk, without end, from chunk ``number`` on."""
        while True:
            batches = self._batches_of(number)
            rows = islice(rows_of(self._source), batches.start * self._batch_size, None)
            while True:
                yield {batch: list(islice(rows, self._batch_size)) for batch in batches}
                number += 1
                batches = self._batches_of(number)
                if batches.start == 0:  # the dataset begins again
                    break
