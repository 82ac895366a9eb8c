"""Which rows of a dataset keep which labels: drawn by a job, or read from a file.

The stored dataset has all labels. A split hides those that a row loses when the row is decoded, so
one conversion serves every protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from taskray.data.readers.labelling import draw_labelled
from taskray.data.storage.codec import KEY, Columns
from taskray.errors import InputError
from taskray.files import make_folder, read_json, write_json
from taskray.job.config import DataConfig, LabelsConfig
from taskray.job.validation import nearest
from taskray.schema import INVALID, quantity_of

_STREAM = 0x5B117


@dataclass(frozen=True)
class LabelSplit:
    """The labels that each row keeps."""

    quantities: tuple[str, ...]
    """The labels that are split; a row keeps all others."""
    kept: Mapping[str, Collection[str]]
    """Key of a row -> those of ``quantities`` that it keeps."""

    def keeps(self, key: str, column: str) -> bool:
        """Whether the row has this column as the dataset contains it."""
        quantity = quantity_of(column)
        return quantity not in self.quantities or quantity in self.kept[key]

    def splits(self, columns: Collection[str]) -> list[str]:
        """The columns that some rows lose."""
        return [column for column in columns if quantity_of(column) in self.quantities]

    def is_useful(self, key: str, columns: Collection[str]) -> bool:
        """Whether the row keeps a label among the columns, or they contain none that is split."""
        split = self.splits(columns)
        return not split or any(self.keeps(key, column) for column in split)

    def left_in(self, keys: Sequence[str], columns: Sequence[str]) -> list[str]:
        """The columns that at least one of the rows keeps."""
        return [c for c in columns if any(self.keeps(key, c) for key in keys)]

    def hide(self, rows: Columns) -> None:
        """Give decoded rows the invalid value (``schema.INVALID``) of the labels that they lose."""
        for column in self.splits(rows):
            for key, values in zip(rows[KEY], rows[column], strict=True):
                if not self.keeps(str(key), column):
                    values.fill(INVALID[quantity_of(column)])


def split_of(
    dataset: DataConfig, keys: Sequence[str], columns: Sequence[str], name: str
) -> LabelSplit | None:
    """The split of the dataset ``name`` with these keys and columns, drawn or read from the file;
    None where the job splits no labels.

    Raises InputError for a label that the dataset does not have or that has no invalid value, and
    for a file that is no split or lacks a row.
    """
    if dataset.labels is None:
        return None
    try:
        return _split_of(dataset.labels, keys, columns)
    except InputError as error:
        raise InputError(f"data.{name}.labels.{error.key}", error.text) from None


def _split_of(config: LabelsConfig, keys: Sequence[str], columns: Sequence[str]) -> LabelSplit:
    if config.file is not None:
        split = read_split(Path(config.file))
        missing = next((key for key in keys if key not in split.kept), None)
        if missing is not None:
            raise InputError("file", f"{config.file} has no row {missing!r} of the dataset")
        split = LabelSplit(split.quantities, {key: split.kept[key] for key in keys})
    else:
        kept = draw(config, len(keys))
        split = LabelSplit(tuple(config.columns or ()), dict(zip(keys, kept, strict=True)))
    there = {quantity_of(column) for column in columns} & INVALID.keys()
    for quantity in split.quantities:
        if quantity not in there:
            where = "file" if config.file is not None else "columns"
            raise InputError(
                where, f"no label {quantity!r} in the dataset; {nearest(quantity, sorted(there))}"
            )
    return split


def draw(config: LabelsConfig, count: int) -> list[tuple[str, ...]]:
    """The labels that each of ``count`` rows keeps.

    The possible sets of labels are dealt to the labelled rows in random order, so each is dealt
    equally often, or once more.
    """
    names = tuple(config.columns or ())
    sizes = {
        "full": [len(names)],
        "onelabel": [1],
        "randomlabels": range(1, len(names)),
    }[config.protocol]
    hands = [hand for size in sizes for hand in combinations(names, size)]
    labelled = sorted(draw_labelled(count, config.fraction, config.seed))
    kept: list[tuple[str, ...]] = [()] * count
    order = np.random.default_rng([config.seed, _STREAM]).permutation(len(labelled))
    for number, row in enumerate(labelled):
        kept[row] = hands[int(order[number]) % len(hands)]
    return kept


def write_split(path: Path, split: LabelSplit) -> None:
    """Write a split as JSON: ``{"columns": [...], "rows": {key: [label, ...]}}``."""
    make_folder(path.parent, "the label splits of a run")
    rows = {key: list(kept) for key, kept in split.kept.items()}
    write_json(path, {"columns": list(split.quantities), "rows": rows})


def read_split(path: Path) -> LabelSplit:
    """The split in a file. Raises InputError with the key ``file`` if it contains none."""
    try:
        content: Any = read_json(path)
    except InputError as error:
        raise InputError("file", str(error)) from None
    columns, rows = content.get("columns"), content.get("rows")
    if (
        not _is_names(columns)
        or not isinstance(rows, dict)
        or not all(map(_is_names, rows.values()))
    ):
        raise InputError("file", f"{path}: expected {{columns: [label], rows: {{key: [label]}}}}")
    return LabelSplit(tuple(columns), {key: tuple(kept) for key, kept in rows.items()})


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
