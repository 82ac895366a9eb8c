"""Streams: a source, batched for training without end, assembled ahead, resumable.

``dedicated.DedicatedStream`` gives one task its labelled samples, shuffled;
``mediator.MediatorStream`` gives all tasks the same numbered batches. Both skip rows that cannot be
read and count them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from taskray.data.readers.reader import Sample
from taskray.data.storage.codec import KEY
from taskray.data.storage.source import Source
from taskray.data.streams.batch import PLACE, Batch
from taskray.data.streams.prefetch import Prefetcher
from taskray.data.streams.rows import (
    CorruptRows,
    checked_columns,
    is_useful,
    labelled_batch,
    places,
    rows_of,
)

AHEAD = 2
"""Batches assembled before they are asked for."""

State = dict[str, int]


class BatchStream(ABC):
    """Runs ``batches`` in a background thread, from the position to which it has been set.

    Implements ``loop.interfaces.Stream``. ``next`` raises what goes wrong in the background.
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

    def close(self) -> None:
        """End the background threads."""
        self._source.close()  # the thread may be waiting for it
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._source.close()  # what the thread may have begun before it ended


def plain_batches(source: Source, batch_size: int, columns: Sequence[str]) -> Iterator[Batch]:
    """Every readable row once, in order: what evaluation reads. The last batch may be smaller.
    Where the labels are split, only rows that keep one of the labels among ``columns``.

    The batches also contain ``batch.PLACE``. Raises InputError when more rows than the dataset
    allows cannot be read.
    """
    columns = checked_columns(source.info, columns)
    corrupt = CorruptRows(source.info)
    rows: list[Sample] = []
    sequences: dict[str, int] = {}

    def batch() -> Batch:
        tensors = labelled_batch(source.info, rows, columns).tensors
        return Batch({**tensors, PLACE: places([str(row[KEY]) for row in rows], sequences)})

    for row in rows_of(source, more=False):
        if corrupt.check(row) and is_useful(source.info, row, columns):
            rows.append(row)
        if len(rows) == batch_size:
            yield batch()
            rows = []
    if rows:
        yield batch()
