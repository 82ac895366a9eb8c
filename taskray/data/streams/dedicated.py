"""The stream of a task's own labelled samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np

from taskray.data.readers.reader import Sample
from taskray.data.storage.source import MemorySource, Source
from taskray.data.streams.batch import Batch
from taskray.data.streams.rows import is_useful, labelled_batch, rows_of
from taskray.data.streams.stream import BatchStream, State
from taskray.errors import InputError

SHUFFLE_BATCHES = 32
"""A streamed dataset is shuffled within a buffer of so many batches."""


class DedicatedStream(BatchStream):
    """A task's own labelled samples, every pass in another order.

    Pass p over a source in memory is the permutation ``default_rng([seed, p])``; over a streamed
    one, a shuffle within a buffer, by the same seeds. Passes follow each other without a gap, so
    every batch is full. The state is the pass and the rows of it that were used or skipped; a
    streamed source gets there by reading up to it.

    Where the dataset's labels are split (``storage.label_split``), only rows that keep one of the
    labels among ``columns`` are used, and a batch lacks the labels that none of its rows keeps.

    ``columns`` are those of the batches; each must be in the source. Raises InputError where fewer
    rows than a batch keep a label, and, from ``next``, when more rows than the dataset allows
    cannot be read.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, columns: Sequence[str]) -> None:
        super().__init__(source, columns, {"pass": 0, "position": 0})
        self._batch_size, self._seed = batch_size, seed
        split = source.info.split
        if split is not None:
            useful = sum(split.is_useful(key, columns) for key in split.kept)
            if useful < batch_size:
                raise InputError(
                    f"data.{source.info.name}.labels",
                    f"{useful} rows keep a label of {', '.join(split.splits(columns))}, "
                    f"expected at least the batch_size, {batch_size}",
                )

    def batches(self, state: State) -> Iterator[tuple[State, Batch]]:
        rows: list[Sample] = []
        for pass_, position, row in self._rows(state["pass"], state["position"]):
            if self.corrupt.check(row) and is_useful(self._source.info, row, self._columns):
                rows.append(row)
            if len(rows) == self._batch_size:
                batch = labelled_batch(self._source.info, rows, self._columns)
                yield {"pass": pass_, "position": position}, batch
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
