"""The content of a dataset, as a table and as a contact sheet."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from taskray.data.readers.reader import Sample
from taskray.data.storage.codec import ERROR, KEY
from taskray.data.storage.parquet import columns_of, find_pieces, read_manifest
from taskray.data.storage.source import DatasetInfo, open_source
from taskray.data.streams.rows import rows_of
from taskray.errors import InputError
from taskray.files import atomic_write, make_folder
from taskray.job.config import DataConfig
from taskray.record.formatting import NOTHING, size
from taskray.report.birds_eye import birds_eye, reach_of
from taskray.report.console import print_plain, print_table
from taskray.report.panels import paint
from taskray.schema import IGNORE, QUANTITIES, frame_of, quantity_of

SHEET_ROWS = 6
"""Samples on a contact sheet."""
TILE = 160
"""Width of a picture on it, in pixels."""
MANY = 1 << 40


@dataclass
class Range:
    """Smallest and largest valid value of a column, and how many values are valid."""

    low: float = np.inf
    high: float = -np.inf
    valid: int = 0
    all: int = 0

    def add(self, column: str, values: np.ndarray) -> None:
        there = values[valid_values(column, values)]
        self.all += values.size
        self.valid += there.size
        if there.size:
            self.low = min(self.low, float(there.min()))
            self.high = max(self.high, float(there.max()))


def valid_values(column: str, values: np.ndarray) -> np.ndarray:
    """Which values of a column are valid by the conventions of ``schema`` (bool, same shape)."""
    quantity = quantity_of(column)
    valid: np.ndarray = np.isfinite(values)
    if quantity == "depth":
        valid = valid & (values > 0)
    if quantity == "normals":
        valid = valid & (np.linalg.norm(values, axis=0) > 1e-6)
    elif values.dtype == np.uint8 and quantity != "image":
        valid = values != IGNORE
    return valid


def show(
    config: DataConfig, path: Path, name: str, limit: int, save: Path | None, console: Console
) -> None:
    """Print the columns and ranges of the first ``limit`` rows of a Parquet dataset, and write a
    contact sheet to ``save``. Raises InputError for broken files, and if no row can be read."""
    columns = columns_of(path)
    num_rows = sum(piece.rows for piece in find_pieces(path, columns))
    # a person may look at a dataset because of its corrupt rows: any number of them is allowed
    look = config.model_copy(
        update={"limit": min(limit, num_rows), "materialize": "never", "max_corrupt_rows": MANY}
    )
    source = open_source(look, path, columns, use_ray=False, name=name).open()
    ranges: dict[str, Range] = defaultdict(Range)
    keys: list[str] = []
    broken: list[str] = []
    kept: list[Sample] = []
    for row in rows_of(source, more=False):
        keys.append(str(row[KEY]))
        if str(row[ERROR]):
            broken.append(str(row[ERROR]))
            continue
        for column in columns:
            ranges[column].add(column, row[column])
        if len(kept) < SHEET_ROWS:
            kept.append(row)
    source.close()

    stored = sum(f.stat().st_size for f in ([path] if path.is_file() else path.glob("*.parquet")))
    looked = f", looked at the first {len(keys)}" if len(keys) < num_rows else ""
    lines = [f"{name}: {num_rows} rows, {size(stored)} in {path}{looked}"]
    lines += [f"keys {keys[0]} ... {keys[-1]}"] if keys else []
    print_plain(console, "\n".join(lines))
    print_table(console, _table(source.info, ranges))
    skipped = [": ".join(error) for error in read_manifest(path).get("errors", [])]
    print_plain(console, "\n  ".join([f"{len(broken)} corrupt rows", *broken[:20]]))
    for text in skipped[:20]:
        print_plain(console, f"left out when it was converted: {text}")
    if save is not None:
        write_sheet(save, kept, columns)
        print_plain(console, f"contact sheet: {save}")


def _table(info: DatasetInfo, ranges: Mapping[str, Range]) -> Table:
    titles = ("column", "type", "lowest", "highest", "valid", "unit")
    rows = []
    for column, spec in info.layout.items():
        seen = ranges.get(column, Range())
        known = QUANTITIES.get(quantity_of(column))
        low, high = (f"{v:.4g}" if seen.valid else NOTHING for v in (seen.low, seen.high))
        share = f"{100 * seen.valid / seen.all:.1f} %" if seen.all else NOTHING
        unit = known.unit.split(",")[0] if known else NOTHING
        rows.append((column, str(spec), low, high, share, unit))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        right = title in ("lowest", "highest", "valid")
        justify: JustifyMethod = "right" if right else "left"
        table.add_column(title, justify=justify, no_wrap=title != "unit")
    for row in rows:
        table.add_row(*row)
    return table


def check_sheet(file: Path) -> None:
    """Raise InputError for a file that a contact sheet cannot be written to, before any sample is
    read."""
    from PIL import Image

    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), format=_format_of(file))
    except (KeyError, OSError, ValueError):  # Pillow cannot write it, or not in colour
        text = "expected the name of a picture, such as sheet.png"
        raise InputError(f"--save {file}", text) from None
    if file.is_dir():
        raise InputError(f"--save {file}", "is a folder, expected a file")
    make_folder(file.parent, "a folder of pictures")


def write_sheet(file: Path, rows: Sequence[Sample], columns: Sequence[str]) -> None:
    """Write a picture with a row for each sample and a column for each image-like quantity and each
    point cloud; a point cloud is drawn from above, with the boxes of its frame."""
    from PIL import Image, ImageDraw

    shown = [c for c in columns if _can_be_drawn(c)]
    if not rows or not shown:
        raise InputError(
            f"--save {file}", f"no column can be drawn, the dataset has {', '.join(columns)}"
        )
    painted = {c: _paint(c, rows) for c in shown}
    heights = {c: max(1, TILE * p.shape[1] // p.shape[2]) for c, p in painted.items()}
    tall, gap, head = max(heights.values()), 4, 18
    sheet = Image.new(
        "RGB", ((TILE + gap) * len(shown) + gap, head + (tall + gap) * len(rows)), (24, 26, 30)
    )
    draw = ImageDraw.Draw(sheet)
    for x, column in enumerate(shown):
        left = gap + x * (TILE + gap)
        draw.text((left, 3), column, fill=(220, 224, 230))
        for y, pixels in enumerate(painted[column]):
            size = (TILE, heights[column])
            tile = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
            sheet.paste(tile, (left, head + y * (tall + gap)))
    atomic_write(file, lambda path: sheet.save(path, format=_format_of(file)))


def _format_of(file: Path) -> str:
    from PIL import Image

    return Image.registered_extensions().get(file.suffix.lower(), "none")


def _can_be_drawn(column: str) -> bool:
    known = QUANTITIES.get(quantity_of(column))
    return known is not None and ("H" in known.shape or known.name == "points")


def _paint(column: str, rows: Sequence[Sample]) -> np.ndarray:
    """Pictures ``[N, h, w, 3]`` of a column, one for each row."""
    quantity, values = quantity_of(column), np.stack([row[column] for row in rows])
    if quantity == "points":
        reach, boxes = reach_of(values), "boxes" + frame_of(column)
        return np.stack([birds_eye(row[column], row.get(boxes), reach, TILE) for row in rows])
    return values if quantity == "image" else paint(quantity, values)(values)
