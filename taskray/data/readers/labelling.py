"""The choice of samples that keep their labels, for studies with few labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from taskray.data.readers.reader import Row

WhichRows = Literal["all", "labelled", "unlabelled"]
"""The rows of a dataset: all, or only those that keep or lose their labels."""


def mark_labelled(
    rows: Sequence[Row], fraction: float, seed: int, which: WhichRows = "all"
) -> list[Row]:
    """The rows that ``which`` selects, each with ``labelled`` true or false.

    A part of ``fraction`` is labelled, chosen by ``seed`` and the number of rows alone; a smaller
    part is a subset of a larger one.
    """
    labelled = draw_labelled(len(rows), fraction, seed)
    marked = [{**row, "labelled": number in labelled} for number, row in enumerate(rows)]
    return [row for row in marked if which == "all" or row["labelled"] == (which == "labelled")]


def draw_labelled(count: int, fraction: float, seed: int) -> set[int]:
    """The numbers of the rows, of ``count``, that keep their labels; see :func:`mark_labelled`."""
    draw = np.random.default_rng([seed, 0x1ABE1]).random(count)
    return set(np.argsort(draw, kind="stable")[: round(fraction * count)].tolist())
