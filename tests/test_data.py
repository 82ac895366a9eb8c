"""Encoding, conversion, storage, opening and augmentation of datasets."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import Field

from taskray.data.readers.reader import Reader, Row, Sample
from taskray.data.storage.codec import decode_rows, encode
from taskray.data.storage.convert import build_reader, convert
from taskray.data.storage.parquet import ParquetFolder, find_pieces, read_manifest
from taskray.data.storage.source import (
    MemorySource,
    StreamSource,
    load_in_process,
    open_source,
)
from taskray.data.storage.store import cache_dir, folder_of, prepare
from taskray.data.streams.augment import augment
from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.errors import InputError
from taskray.files import lock_folder
from taskray.job.config import AugmentConfig, DataConfig

HERE = f"{__name__}:Counting"
COLUMNS = ("image", "depth", "intrinsics")


class Counting(Reader):
    """Samples that hold their own number; those in ``broken`` cannot be read."""

    columns = COLUMNS

    def __init__(
        self,
        rows: Annotated[int, Field(ge=0)] = 10,
        broken: list[int] | None = None,
        odd: list[int] | None = None,
        height: int = 6,
    ) -> None:
        self.rows, self.broken, self.odd, self.height = rows, broken or [], odd or [], height

    def index(self) -> list[Row]:
        return [{"key": f"sample-{n:04d}", "number": n} for n in range(self.rows)]

    def load(self, row: Row) -> Sample:
        number = row["number"]
        if number in self.broken:
            raise OSError(f"file {number} is broken")
        return make_sample(number, self.height + (number in self.odd))


def make_sample(number: int, height: int = 6, width: int = 8) -> Sample:
    return {
        "image": np.full((height, width, 3), number % 256, np.uint8),
        "depth": np.full((1, height, width), number, np.float32),
        "intrinsics": np.eye(3, dtype=np.float32),
    }


def counting(max_corrupt_rows: int = 10, limit: int | None = None, **arguments: Any) -> DataConfig:
    reader = {"name": HERE, **arguments}
    return DataConfig(reader=reader, max_corrupt_rows=max_corrupt_rows, limit=limit)


def write_parquet(file: Path, numbers: range, **samples: Sample) -> None:
    """Rows ``numbers``; those named ``key=sample`` come after."""
    rows = [{"key": f"row-{n:04d}", **encode(make_sample(n), COLUMNS)} for n in numbers]
    rows += [{"key": key, **encode(sample, COLUMNS)} for key, sample in samples.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def damage(file: Path, whole: bytes) -> None:
    """Overwrite the end of the data; keys, which stand before it, and the footer, which is read
    first, stay."""
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    file.write_bytes(whole[: end - 196] + bytes(196) + whole[end:])


def parquet(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(reader={"name": "parquet", "path": str(path)}, **settings)


# Encoding


def test_what_is_encoded_is_decoded_again() -> None:
    rng = np.random.default_rng(0)
    sample = {
        "image": rng.integers(0, 256, (6, 8, 3), dtype=np.uint8),
        "depth": rng.random((1, 6, 8), dtype=np.float32),
        "segmentation": rng.integers(0, 256, (1, 6, 8), dtype=np.uint8),
        "camera_motion": rng.random((4, 4), dtype=np.float32),
    }
    table = pa.Table.from_pylist([{"key": "a", **encode(sample, sample)}] * 3)
    decoded = decode_rows(table, sample)
    assert list(decoded["key"]) == ["a"] * 3
    assert list(decoded["error"]) == [""] * 3
    for column, values in sample.items():
        np.testing.assert_array_equal(decoded[column], np.stack([values] * 3))


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("depth", np.zeros((6, 8), np.float32), "depth: got float32 6x8, expected float32 1xHxW"),
        ("depth", np.zeros((1, 6, 8)), "depth: got float64 1x6x8, expected float32"),
        ("depth", np.zeros((1, 5, 8), np.float32), "depth: got 5x8 pixels, expected 6x8 as image"),
        ("image", np.zeros((3, 6, 8), np.uint8), "image: got uint8 3x6x8, expected uint8 HxWx3"),
    ],
)
def test_a_sample_that_breaks_the_schema_is_refused(
    column: str, values: np.ndarray, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        encode({**make_sample(1), column: values}, COLUMNS)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="the reader returned no normals"):
        encode(make_sample(1), ["image", "normals"])


def test_a_corrupt_row_becomes_zeros_with_a_reason() -> None:
    rows = [{"key": f"k{n}", **encode(make_sample(n + 1), COLUMNS)} for n in range(4)]
    rows[0]["image"] = rows[0]["image"][:40]
    rows[1]["depth"] = b"no numpy"
    rows[3] = {"key": "k3", **encode(make_sample(4, height=7), COLUMNS)}
    decoded = decode_rows(pa.Table.from_pylist(rows), COLUMNS, where="part.parquet")
    errors = list(decoded["error"])
    assert [bool(error) for error in errors] == [True, True, False, True]
    assert all(error.startswith(f"part.parquet: k{n}: ") for n, error in enumerate(errors) if error)
    assert "image: got uint8 7x8x3, expected uint8 6x8x3 as in" in errors[3]
    assert [float(depth.max()) for depth in decoded["depth"]] == [0, 0, 3, 0]


def test_pickled_objects_are_never_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    row = {"key": "evil", **encode(make_sample(1), COLUMNS), "depth": buffer.getvalue()}
    with pytest.raises(ValueError, match=r"evil: .*allow_pickle=False"):
        decode_rows(pa.Table.from_pylist([row]), COLUMNS)


def test_jpeg_and_grey_images_are_read_as_rgb() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 6), 100).save(buffer, format="JPEG")
    row = {"key": "a", "image": buffer.getvalue()}
    image = decode_rows(pa.Table.from_pylist([row]), ["image"])["image"]
    assert image.shape == (1, 6, 8, 3)
    assert abs(int(image[0, 0, 0, 0]) - 100) < 3


# Conversion


def test_a_dataset_is_converted_once_and_in_order(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = counting(rows=150)
    folder = prepare(
        config, name="d", use_ray=False, progress=lambda done, total: seen.append((done, total))
    )
    assert folder.parent == cache == cache_dir()
    assert seen[-1] == (150, 150)
    assert seen == sorted(seen)
    source = load_in_process(folder, config, ["depth"]).open()
    assert source.take(range(150))["depth"][:, 0, 0, 0].tolist() == list(range(150))
    manifest = read_manifest(folder)
    assert manifest["num_rows"] == 150
    assert manifest["columns"] == list(COLUMNS)
    assert manifest["settings"] == {
        "name": HERE, "rows": 150, "broken": None, "odd": None, "height": 6,
    }  # fmt: skip
    seen.clear()
    assert prepare(config, name="d", use_ray=False) == folder
    assert not seen
    assert [path for path in cache.iterdir() if path.suffix == ".tmp"] == []


def test_other_settings_are_another_conversion(cache: Path) -> None:
    folders = {
        prepare(config, name="d", use_ray=False)
        for config in (counting(rows=4), counting(rows=5), counting(rows=5, limit=2))
    }
    assert len(folders) == 3
    assert prepare(counting(rows=4, height=6), name="d", use_ray=False) in folders  # a default


def test_unreadable_samples_are_left_out_and_recorded(cache: Path) -> None:
    config = counting(rows=40, broken=[3, 20])
    folder = prepare(config, name="d", use_ray=False)
    manifest = read_manifest(folder)
    assert manifest["num_rows"] == 38
    assert manifest["errors"] == [
        ["sample-0003", "file 3 is broken"],
        ["sample-0020", "file 20 is broken"],
    ]


def test_too_many_unreadable_samples_are_an_error(cache: Path) -> None:
    config = counting(max_corrupt_rows=2, rows=40, broken=[3, 4, 20])
    with pytest.raises(InputError, match=r"'d': more than 2 rows .*sample-0003: file 3 is broken"):
        prepare(config, name="d", use_ray=False)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"rows": 0}, "found no samples"), ({"rows": 2, "broken": [0, 1]}, "no row could be read")],
)
def test_a_dataset_without_rows_is_an_error(
    cache: Path, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=f"'d': .*{reason}"):
        prepare(counting(**arguments), name="d", use_ray=False)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", ["mine.jpg", "part-00000.parquet", "part-notes.txt"])
def test_a_folder_of_something_else_is_never_replaced(
    tmp_path: Path, name: str, ours: bool
) -> None:
    folder = tmp_path / "photos"
    if ours:
        convert(counting(rows=3), folder, name="d", use_ray=False)
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    if ours and name.endswith(".parquet"):  # it may only be another state of the same dataset
        convert(counting(rows=3), folder, name="d", use_ray=False)
        assert len(load_in_process(folder, counting(), ["depth"]).open().take(range(3))["key"]) == 3
        return
    with pytest.raises(InputError, match="is not replaced, because"):
        convert(counting(), folder, name="d", use_ray=False)
    assert (folder / name).read_text() == "mine"


def test_the_folder_behind_a_symlink_is_the_one_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert(counting(rows=3), tmp_path / "link", name="d", use_ray=False)
    assert (tmp_path / "link").is_symlink()
    assert read_manifest(tmp_path / "disk")["num_rows"] == 3


def test_an_interrupted_conversion_starts_again(cache: Path) -> None:
    config = counting(rows=5)
    folder = prepare(config, name="d", use_ray=False)
    shutil.rmtree(folder)
    (cache / f".{folder.name}.999999.tmp").mkdir()  # what a killed process leaves behind
    assert prepare(config, name="d", use_ray=False) == folder
    assert read_manifest(folder)["num_rows"] == 5
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_waiting_for_another_process_prints_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = counting(rows=3), io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    folder = folder_of(config, build_reader(config, "d"), "d")
    cache.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with lock_folder(cache, "a test", name=f".{folder.name}.lock"):
            waiting = pool.submit(prepare, config, name="d", use_ray=False)
            while not said.getvalue() and not waiting.done():
                time.sleep(0.01)
        assert waiting.result(60) == folder
    expected = f"{cache}: waiting for another taskray process (the cache of dataset 'd')\n"
    assert said.getvalue() == expected


def test_a_cache_that_is_a_file_is_named(cache: Path) -> None:
    cache.parent.write_text("")
    with pytest.raises(
        InputError, match="cache/taskray: cannot be the cache of dataset 'd': Not a "
    ):
        prepare(counting(rows=3), name="d", use_ray=False)


OWN = """
from taskray.data.readers.reader import Reader

class Mine(Reader):
    columns = ("depth",)
    def __init__(self, path: str, more: list[str]) -> None: pass
    def index(self): return []
    def load(self, row): return {}
"""


def test_a_readers_own_code_and_files_tell_its_conversions_apart(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(place: str) -> Path:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / place)
            patch.syspath_prepend(tmp_path / place)
            sys.modules.pop("mine_of_test_data", None)
            reader = {"name": "mine_of_test_data:Mine", "path": "v.txt", "more": ["images", "."]}
            config = DataConfig(reader=reader)
            return folder_of(config, build_reader(config, "d"), "d")

    def change(file: str, text: str) -> None:
        (tmp_path / "a" / file).write_text(text)
        assert found("a") not in seen
        seen.add(found("a"))

    for place in ("a", "b"):
        (tmp_path / place / "images").mkdir(parents=True)
        (tmp_path / place / "v.txt").write_text("1")
        (tmp_path / place / "mine_of_test_data.py").write_text(OWN)
    seen = {found("a"), found("b")}
    assert len(seen) == 2
    (tmp_path / "a" / "runs").mkdir()  # which says nothing of the data, though it lies in "."
    assert found("a") in seen
    change("v.txt", "12")
    change("images/1.png", "")
    change("mine_of_test_data.py", OWN + "# edited\n")


class Keyed(Counting):
    """Its rows have the keys given."""

    def __init__(self, keys: list[Any]) -> None:
        super().__init__(len(keys))
        self.keys = keys

    def index(self) -> list[Row]:
        return [{"number": n} if key is None else {"key": key} for n, key in enumerate(self.keys)]


class WithoutColumns(Counting):
    """Its author has forgotten a comma."""

    columns = "depth"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (
            {"name": f"{__name__}:Keyed", "keys": ["a", None]},
            "row 1 of the index .*: expected text",
        ),
        ({"name": f"{__name__}:Keyed", "keys": [1]}, "row 0 of the index .* under 'key'"),
        (
            {"name": f"{__name__}:Keyed", "keys": ["a", "b", "a"]},
            "duplicate key 'a' in two samples",
        ),
        ({"name": f"{__name__}:WithoutColumns"}, "no columns: got 'depth', expected"),
    ],
)
def test_a_reader_that_breaks_its_contract_is_named(
    cache: Path, reader: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        prepare(DataConfig(reader=reader), name="d", use_ray=False)


def _prepare_in_process(_: int) -> str:
    return str(prepare(counting(rows=300), name="d", use_ray=False))


def test_two_processes_may_prepare_the_same_dataset_at_once(cache: Path) -> None:
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        folders = set(pool.map(_prepare_in_process, range(4)))
    assert len(folders) == 1
    folder = Path(folders.pop())
    depth = load_in_process(folder, counting(), ["depth"]).open().take(range(300))["depth"]
    assert depth[:, 0, 0, 0].tolist() == list(range(300))
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


# Parquet


def test_parquet_is_read_where_it_lies(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "b.parquet", range(5, 8))
    write_parquet(tmp_path / "data" / "a.parquet", range(5))
    for path, rows in ((tmp_path / "data", 8), (tmp_path / "data" / "a.parquet", 5)):
        config = parquet(path)
        assert prepare(config, name="d", use_ray=False) == path
        source = load_in_process(path, config, ["depth"]).open()
        assert source.take(range(rows))["depth"][:, 0, 0, 0].tolist() == list(range(rows))
    reader = ParquetFolder(str(tmp_path / "data"))
    rows_in_all = reader.index()
    assert [row["key"] for row in rows_in_all] == [f"row-{n:04d}" for n in range(8)]
    assert reader.load(rows_in_all[6])["depth"][0, 0, 0] == 6


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        ParquetFolder(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"no \*.parquet files"):
        ParquetFolder(str(tmp_path))
    write_parquet(tmp_path / "a.parquet", range(3))
    write_parquet(tmp_path / "b.parquet", range(3, 6))
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"b\.parquet: not a readable Parquet file"):
        load_in_process(tmp_path, parquet(tmp_path), ["depth"])
    damage(tmp_path / "b.parquet", whole)
    with pytest.raises(InputError, match=r"b\.parquet: damaged Parquet"):
        load_in_process(tmp_path, parquet(tmp_path), list(COLUMNS))


def test_that_labels_were_lost_is_known_of_what_was_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lost in (False, True):
        monkeypatch.setattr(Counting, "unlabelled", lost)
        convert(counting(), tmp_path / str(lost), name="d", use_ray=False)
        assert ParquetFolder(str(tmp_path / str(lost))).unlabelled is lost


def test_a_column_that_the_dataset_lacks_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(3))
    with pytest.raises(InputError, match=r"'rooms': no column 'normals'; it has image, depth"):
        load_in_process(tmp_path, parquet(tmp_path), ["normals"], name="rooms")
    pq.write_table(pa.table({"key": ["x"], "depth": [b""]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet: no column 'image'; it has key, depth"):
        load_in_process(tmp_path, parquet(tmp_path), ["image"])


def test_a_dataset_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    rows = [{"key": f"k{n}", "depth": b"x"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: no readable row; the first error: k0: "):
        load_in_process(tmp_path, parquet(tmp_path), ["depth"])


# Opening


def test_the_limit_takes_the_first_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(5))
    write_parquet(tmp_path / "b.parquet", range(5, 10))
    handle = load_in_process(tmp_path, parquet(tmp_path, limit=7), ["depth"])
    assert handle.info.num_rows == 7
    assert handle.open().take([6])["depth"][0, 0, 0, 0] == 6


def test_of_a_row_group_no_more_is_decoded_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", range(20))
    (piece,) = find_pieces(tmp_path, ["depth"], limit=7)
    decoded, whole = [], pq.ParquetFile.iter_batches

    def counted(*arguments: Any, **keywords: Any) -> Iterator[pa.RecordBatch]:
        for batch in whole(*arguments, **keywords):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert [table.num_rows for table in piece.read(["depth"], rows_each=4)] == [4, 3]
    assert sum(decoded) == 8


def test_rows_that_share_a_key_are_refused(tmp_path: Path) -> None:
    """Unreadable rows are counted by their keys."""
    rows = [{"key": "same", **encode(make_sample(n), COLUMNS)} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="duplicate key 'same' in two rows"):
        load_in_process(tmp_path, parquet(tmp_path), ["depth"])
    assert load_in_process(tmp_path, parquet(tmp_path, limit=1), ["depth"]).info.num_rows == 1


def test_small_datasets_are_held_and_large_ones_streamed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(10))
    bytes_per_row = 6 * 8 * 3 + 6 * 8 * 4
    for settings, expected in (
        ({"materialize_bytes": 10 * bytes_per_row}, MemorySource),
        ({"materialize_bytes": 10 * bytes_per_row - 1}, StreamSource),
        ({"materialize": "never"}, StreamSource),
        ({"materialize": "always", "materialize_bytes": 1}, MemorySource),
    ):
        config = parquet(tmp_path, **settings)
        source = open_source(config, tmp_path, ["image", "depth"], use_ray=False).open()
        assert isinstance(source, expected)
        source.close()


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(3))
    handle = load_in_process(tmp_path, parquet(tmp_path), ["depth"])
    assert set(handle.blocks[0]) == {"depth", "key", "error"}


def test_a_streamed_pass_starts_the_next_one_before_it_ends(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(10))
    handle = open_source(parquet(tmp_path, materialize="never"), tmp_path, ["depth"], False)
    passes = []
    source = handle.open()
    read = source._read
    source._read = lambda: passes.append(1) or read()  # type: ignore[func-returns-value]
    first = source.one_pass()
    next(first)
    source.close()
    assert len(passes) == 2


# Ray


def test_ray_converts_and_holds_the_same_rows_in_the_same_order(
    ray_session: ModuleType, cache: Path
) -> None:
    config = counting(rows=200, broken=[7])
    with_ray = prepare(config, name="d", use_ray=True)
    manifest = read_manifest(with_ray)
    shutil.rmtree(with_ray)
    without = prepare(config, name="d", use_ray=False)
    assert manifest == read_manifest(without)
    handle = open_source(config, without, ["image", "depth"], use_ray=True)
    ray_session.get(ray_session.put(pickle.dumps(vars(handle.info))))
    held, read = handle.open(), load_in_process(without, config, ["image", "depth"]).open()
    for column, values in read.take(range(199)).items():
        np.testing.assert_array_equal(held.take(range(199))[column], values)


def test_actors_that_hold_every_cpu_do_not_starve_a_stream(
    ray_session: ModuleType, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", range(20))
    config = parquet(tmp_path, materialize="never")
    handle = open_source(config, tmp_path, ["depth"], use_ray=True)

    class Consumer:
        def first_rows(self, handle: Any) -> list[float]:
            source = handle.open()
            rows = [float(v) for block in source.one_pass() for v in block["depth"][:, 0, 0, 0]]
            source.close()
            return rows

    actors = [ray_session.remote(num_cpus=1)(Consumer).remote() for _ in range(2)]
    try:
        rows = ray_session.get([a.first_rows.remote(handle) for a in actors], timeout=120)
    finally:
        for actor in actors:
            ray_session.kill(actor)
    assert rows == [list(range(20))] * 2


def test_an_error_in_a_ray_worker_names_the_file(ray_session: ModuleType, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(3))
    write_parquet(tmp_path / "b.parquet", range(3, 6))
    damage(tmp_path / "b.parquet", (tmp_path / "b.parquet").read_bytes())
    with pytest.raises(InputError, match=r"b\.parquet: damaged Parquet"):
        open_source(parquet(tmp_path), tmp_path, list(COLUMNS), use_ray=True)


# Augmentation


def labelled_batch(size: int = 64) -> Batch:
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(size, *shape, generator=random)

    k = torch.tensor([[10.0, 0, 3.0], [0, 10.0, 2.5], [0, 0, 1]])
    return Batch(
        {
            "image": draw(3, 6, 8),
            "depth": draw(1, 6, 8) + 1,
            "normals": draw(3, 6, 8) - 0.5,
            "segmentation": (draw(1, 6, 8) * 9).long(),
            "intrinsics": k.expand(size, 3, 3).clone(),
            "camera_motion": draw(4, 4),
            "object_motion": draw(3, 6, 8),
        },
        id=5,
        place=Place(2, 5, 16),
    )


def test_no_augmentation_leaves_a_batch_as_it_is() -> None:
    batch = labelled_batch()
    after = augment(batch, AugmentConfig(), torch.Generator(), labelled=True)
    assert (after.id, after.place) == (5, Place(2, 5, 16))
    assert all(torch.equal(after.tensors[c], v) for c, v in batch.tensors.items())


def test_photometric_augmentation_changes_the_image_alone() -> None:
    batch = labelled_batch()
    config = AugmentConfig(brightness=0.3, contrast=0.3, saturation=0.3, noise=0.02, flip=True)
    before = {column: values.clone() for column, values in batch.tensors.items()}
    after = augment(batch, config, torch.Generator().manual_seed(3), labelled=False)
    again = augment(batch, config, torch.Generator().manual_seed(3), labelled=False)
    for column, values in batch.tensors.items():
        assert torch.equal(values, before[column])
        assert torch.equal(after.tensors[column], again.tensors[column])
        assert torch.equal(after.tensors[column], values) == (column != "image")
    assert (after.id, after.place) == (5, Place(2, 5, 16))
    assert after.tensors["image"].min() >= 0
    assert after.tensors["image"].max() <= 1


def test_a_flip_mirrors_the_world_half_of_the_time() -> None:
    batch = labelled_batch()
    after = augment(
        batch, AugmentConfig(flip=True), torch.Generator().manual_seed(0), labelled=True
    ).tensors
    before = batch.tensors
    mirrored = (after["image"] != before["image"]).flatten(1).any(dim=1)
    assert 16 < mirrored.sum() < 48
    for column in ("image", "depth", "segmentation"):
        assert torch.equal(after[column][mirrored], before[column][mirrored].flip(-1))
        assert torch.equal(after[column][~mirrored], before[column][~mirrored])
    sign = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    for column in ("normals", "object_motion"):
        assert torch.equal(after[column][mirrored], before[column][mirrored].flip(-1) * sign)
    # A point, seen at (column, row) before, is seen mirrored: x -> -x, column -> 7 - column.
    point, mirror = torch.tensor([0.7, -0.2, 2.0, 1.0]), torch.tensor([-1.0, 1, 1, 1])
    sample = int(mirrored.nonzero()[0, 0])
    pixel = before["intrinsics"][sample] @ point[:3] / 2
    pixel_after = after["intrinsics"][sample] @ (mirror * point)[:3] / 2
    assert torch.allclose(pixel_after, torch.stack([7 - pixel[0], pixel[1], pixel[2]]))
    moved = after["camera_motion"][sample] @ (mirror * point)
    assert torch.allclose(moved, mirror * (before["camera_motion"][sample] @ point))


def test_a_flip_mirrors_the_motion_back_as_well() -> None:
    batch = labelled_batch()
    there = batch.tensors["camera_motion"].double()
    batch.tensors.update(camera_motion=there, camera_motion_back_2=there.inverse())
    config = AugmentConfig(flip=True)
    after = augment(batch, config, torch.Generator().manual_seed(0), labelled=True).tensors
    assert not torch.equal(after["camera_motion"], there)
    torch.testing.assert_close(after["camera_motion_back_2"], after["camera_motion"].inverse())


@pytest.mark.parametrize("column", ["scribble", "points"])
def test_a_flip_refuses_a_column_that_has_no_mirror_image(column: str) -> None:
    batch = labelled_batch()
    batch.tensors[column] = torch.zeros(64, 5, 4)
    with pytest.raises(InputError, match=rf"augment\.flip: column '{column}' has no mirror image"):
        augment(batch, AugmentConfig(flip=True), torch.Generator(), labelled=True)


def test_all_frames_of_a_sample_change_colour_alike() -> None:
    image = labelled_batch().tensors["image"]
    batch = Batch({"image": image, "image_2": image.clone()})
    config = AugmentConfig(brightness=0.5, contrast=0.5, hue=0.5)
    after = augment(batch, config, torch.Generator().manual_seed(0), labelled=True).tensors
    assert torch.equal(after["image"], after["image_2"])
    assert not torch.equal(after["image"], image)


def test_a_turn_of_hue_takes_red_to_other_colours_and_leaves_grey() -> None:
    red, grey = torch.tensor([0.6, 0.3, 0.3]), torch.full((3,), 0.3)
    image = torch.stack([red, grey], dim=1)[None, :, None].repeat(64, 1, 1, 1)  # [64, 3, 1, 2]
    config = AugmentConfig(hue=1.0)
    after = augment(
        Batch({"image": image}), config, torch.Generator().manual_seed(0), labelled=True
    )
    turned = after.tensors["image"][:, :, 0, 0]
    torch.testing.assert_close(after.tensors["image"][:, :, 0, 1], grey.expand(64, 3))
    torch.testing.assert_close(turned.mean(dim=1), red.mean().expand(64))
    torch.testing.assert_close(turned.norm(dim=1), red.norm().expand(64))
    assert set(turned.argmax(dim=1).tolist()) == {0, 1, 2}


def test_the_manifest_of_a_broken_cache_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(3))
    for content in ('{"err', "[]", '{"errors": 3}'):
        (tmp_path / "_taskray.json").write_text(content)
        with pytest.raises(
            InputError, match=r"_taskray\.json: (malformed JSON|got list|not a manifest)"
        ):
            load_in_process(tmp_path, parquet(tmp_path), ["depth"])
