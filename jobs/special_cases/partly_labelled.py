"""A dataset whose rows differ in what is labelled, as a reader of one's own."""

from __future__ import annotations

from typing import Any

from taskray.data.readers.reader import Row, Sample
from taskray.data.world import World
from taskray.schema import INVALID, quantity_of


class PartlyLabelled(World):
    """The embedded world, with the labels of some kinds left out by turns.

    Args:
        labels: row n keeps the kinds of label in entry n, modulo their number.
        world: what else the ``world`` takes.
    """

    def __init__(self, labels: list[list[str]], **world: Any) -> None:
        super().__init__(**world)
        self.labels = labels

    def index(self) -> list[Row]:
        return [{**row, "number": number} for number, row in enumerate(super().index())]

    def load(self, row: Row) -> Sample:
        sample = super().load(row)
        kept = self.labels[row["number"] % len(self.labels)]
        for name, values in sample.items():
            kind = quantity_of(name)
            if kind in INVALID and kind not in kept:
                values.fill(INVALID[kind])
        return sample
