"""Partly labelled protocols: which rows keep which labels, and what tasks read of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collectives import tiny_job
from rich.console import Console

from taskray.cli import main
from taskray.data.storage.codec import ArraySpec, Columns
from taskray.data.storage.label_split import LabelSplit, draw, read_split, split_of, write_split
from taskray.data.storage.source import DatasetInfo, MemorySource
from taskray.data.streams.dedicated import DedicatedStream
from taskray.data.streams.stream import plain_batches
from taskray.errors import InputError
from taskray.job.config import DataConfig, LabelsConfig, dump_yaml, parse
from taskray.run.train import train
from taskray.schema import IGNORE, INVALID

THREE = ("depth", "segmentation", "normals")


def labels(**values: Any) -> LabelsConfig:
    return LabelsConfig(**{"columns": list(THREE), **values})


# ---- the draw -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 100, 101])
def test_onelabel_keeps_exactly_one_label_of_each_row_each_equally_often(count: int) -> None:
    kept = draw(labels(protocol="onelabel"), count)
    assert {len(names) for names in kept} == {1}
    counts = Counter(name for (name,) in kept)
    assert sum(counts.values()) == count
    assert all(counts[name] in (count // 3, -(-count // 3)) for name in THREE)


def test_randomlabels_keeps_every_proper_part_equally_often() -> None:
    parts = [*combinations(THREE, 1), *combinations(THREE, 2)]
    kept = Counter(draw(labels(protocol="randomlabels"), 600))
    assert kept == dict.fromkeys(parts, 100)


def test_of_two_labels_randomlabels_is_onelabel() -> None:
    two = {"columns": ["depth", "segmentation"]}
    assert draw(labels(protocol="randomlabels", **two), 50) == draw(
        labels(protocol="onelabel", **two), 50
    )


def test_full_labels_keep_all_of_a_fraction_and_smaller_fractions_are_subsets() -> None:
    found = []
    for fraction in (0.0, 0.05, 0.2, 1.0):
        kept = draw(labels(fraction=fraction), 200)
        assert set(kept) <= {(), THREE}
        found.append({number for number, names in enumerate(kept) if names})
        assert len(found[-1]) == 200 * fraction
    assert found[0] < found[1] < found[2] < found[3]


@pytest.mark.parametrize("protocol", ["onelabel", "randomlabels"])
def test_a_split_depends_on_its_seed_alone(protocol: str) -> None:
    first = draw(labels(protocol=protocol), 64)
    assert first == draw(labels(protocol=protocol), 64)
    assert first != draw(labels(protocol=protocol, seed=1), 64)
    assert len({*first[:12]}) > 1  # neighbours differ


def test_a_fraction_of_the_rows_may_have_one_label_each() -> None:
    kept = draw(labels(protocol="onelabel", fraction=0.5), 60)
    assert Counter(kept) == {(): 30, ("depth",): 10, ("segmentation",): 10, ("normals",): 10}


# ---- the file -------------------------------------------------------------------------------


def data(**values: Any) -> DataConfig:
    return DataConfig(reader="world", labels=labels(**values))  # type: ignore[arg-type]


def split(**values: Any) -> LabelSplit:
    found = split_of(data(**values), [f"k{n}" for n in range(9)], ["image", *THREE, "depth_2"], "d")
    assert found is not None
    return found


def test_a_written_split_is_read_again_also_for_a_part_of_the_rows(tmp_path: Path) -> None:
    written, file = split(protocol="onelabel"), tmp_path / "labels" / "d.json"
    write_split(file, written)
    assert read_split(file) == written
    again = DataConfig(reader="world", labels=LabelsConfig(file=str(file)))  # type: ignore[arg-type]
    part = split_of(again, ["k1", "k3"], THREE, "d")
    assert part == LabelSplit(THREE, {key: written.kept[key] for key in ("k1", "k3")})
    with pytest.raises(InputError, match=r"data\.d\.labels\.file: .* has no row 'k9'"):
        split_of(again, ["k9"], THREE, "d")


@pytest.mark.parametrize("content", ["[]", "{}", '{"columns": ["a"], "rows": {"k": "a"}}', "{"])
def test_a_file_that_is_no_split_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_split(tmp_path / "s.json")
    assert caught.value.key == "file"
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "labels: expected either 'columns' or 'file'"),
        ({"columns": ["depth"], "file": "x.json"}, "expected either 'columns' or 'file'"),
        ({"columns": ["depth", "depth"]}, "labels: duplicate column 'depth'"),
        ({"columns": ["depth"], "protocol": "randomlabels"}, "needs at least two columns"),
        ({"columns": ["depth"], "protocol": "one"}, "labels.protocol: got 'one', expected"),
        ({"columns": ["depth"], "fraction": 2}, "labels.fraction: got 2"),
    ],
)
def test_wrong_settings_of_a_split_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(DataConfig, {"reader": "world", "labels": values}, "job")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["depht", "image", "camera_motion"])
def test_a_label_that_cannot_be_split_is_named(name: str) -> None:
    with pytest.raises(InputError) as caught:
        split_of(data(columns=["depth", name]), ["k0"], ["image", "depth", "camera_motion"], "d")
    assert str(caught.value).startswith(f"data.d.labels.columns: no label {name!r} in the dataset")


# ---- rows and batches -----------------------------------------------------------------------


def source(found: LabelSplit | None, rows: int = 9) -> MemorySource:
    shapes = {
        "image": (4, 6, 3),
        "depth": (1, 4, 6),
        "segmentation": (1, 4, 6),
        "normals": (3, 4, 6),
    }
    layout = {c: ArraySpec(s, "float32" if c in ("depth", "normals") else "uint8")
              for c, s in shapes.items()}  # fmt: skip
    columns: Columns = {
        c: np.full((rows, *spec.shape), 1, spec.dtype) for c, spec in layout.items()
    }
    columns["image"][:] = np.arange(rows)[:, None, None, None]
    columns |= {"key": np.array([f"k{n}" for n in range(rows)]), "error": np.array([""] * rows)}
    if found is not None:
        found.hide(columns)
    return MemorySource(DatasetInfo("d", "/d", rows, layout, split=found), [columns])


def rows_in(batch: Any) -> list[int]:
    return [round(float(v) * 255) for v in batch.tensors["image"][:, 0, 0, 0]]


def test_a_hidden_label_has_its_invalid_value_and_a_kept_one_is_unchanged() -> None:
    found = split(protocol="onelabel")
    taken = source(found).take(range(9))
    for number in range(9):
        for name in THREE:
            value = 1 if found.keeps(f"k{number}", name) else INVALID[name]
            assert (taken[name][number] == value).all()
    assert INVALID["segmentation"] == IGNORE


def test_a_label_is_kept_or_lost_at_all_frames_of_a_row() -> None:
    found = split(protocol="onelabel")
    for key in found.kept:
        assert found.keeps(key, "depth") == found.keeps(key, "depth_2")
        assert found.keeps(key, "image")


def test_tasks_on_one_dataset_with_one_label_a_row_share_no_row() -> None:
    found = split(protocol="onelabel")
    read = []
    for name in THREE:
        stream = DedicatedStream(source(found), 3, 0, ["image", name])
        batches = [stream.next() for _ in range(4)]
        read.append({row for batch in batches for row in rows_in(batch)})
        assert all((batch.tensors[name] == 1).all() for batch in batches)
        stream.close()
    assert [len(rows) for rows in read] == [3, 3, 3]
    assert set.union(*read) == set(range(9))


def test_a_network_with_all_heads_reads_every_row_and_no_label_that_the_batch_lacks() -> None:
    found = split(protocol="onelabel")
    stream = DedicatedStream(source(found), 1, 0, ["image", *THREE])
    seen = set()
    for _ in range(9):
        batch = stream.next()
        (row,) = rows_in(batch)
        seen.add(row)
        assert batch.tensors.keys() == {"image", *found.kept[f"k{row}"]}
    assert seen == set(range(9))
    stream.close()


def test_a_stream_goes_on_from_its_state_with_the_same_labelled_rows() -> None:
    found = split(fraction=0.5)
    stream = DedicatedStream(source(found), 2, 0, ["image", "depth"])
    stream.next()
    state = stream.state_dict()
    expected = [rows_in(stream.next()) for _ in range(5)]
    stream.load_state_dict(state)
    assert [rows_in(stream.next()) for _ in range(5)] == expected
    stream.close()


def test_fewer_labelled_rows_than_a_batch_are_refused() -> None:
    found = split(fraction=0.2)
    with pytest.raises(InputError) as caught:
        DedicatedStream(source(found), 3, 0, ["image", "depth"])
    assert str(caught.value) == (
        "data.d.labels: 2 rows keep a label of depth, expected at least the batch_size, 3"
    )


def test_measuring_uses_the_labels_that_are_kept() -> None:
    found = split(protocol="onelabel")
    batches = list(plain_batches(source(found), 2, ["image", "normals"]))
    assert [rows_in(b) for b in batches] == [
        list(part)
        for part in np.array_split([n for n in range(9) if found.keeps(f"k{n}", "normals")], [2])
    ]


# ---- runs -----------------------------------------------------------------------------------

SPLIT = "data.labelled.labels={protocol: onelabel, columns: [depth, normals]}"
SHARED = (
    "tasks={both: {task: {name: multi, heads: {depth: depth, normals: normals}}, batch_size: 1, "
    "dedicated: labelled, model: {name: unet, base: 8, depth: 2}}}"
)


def test_a_shared_network_learns_each_head_where_its_label_is_and_the_run_keeps_the_split(
    tmp_path: Path,
) -> None:
    overrides = ["steps=6", "mediator=null", "consistency={}", "evaluation.data={}"]
    job = tiny_job(SHARED, SPLIT, "runtime.chunk_steps=1", *overrides)
    terms = set()

    def listen(_: str, __: int, values: Mapping[str, float]) -> None:
        terms.add(frozenset(n.split("/")[1] for n in values if n.startswith("loss/")))

    quiet = Console(quiet=True)
    result = train(job, tmp_path, inline=True, console=quiet, listener=listen)
    assert (result["status"], result["error"]) == ("finished", None)
    assert terms == {frozenset({"supervised", name}) for name in ("depth", "normals")}
    kept = read_split(tmp_path / "labels" / "labelled.json").kept.values()
    assert Counter(kept) == {("depth",): 16, ("normals",): 16}


def test_doctor_names_a_label_that_the_dataset_does_not_have(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = "data.labelled.labels={columns: [depth, edgs]}"
    (tmp_path / "job.yaml").write_text(dump_yaml(tiny_job(change)), encoding="utf-8")
    assert main(["doctor", str(tmp_path / "job.yaml")]) == 2
    printed = capsys.readouterr()
    expected = "data.labelled.labels.columns: no label 'edgs' in the dataset; did you mean 'edges'?"
    assert expected in " ".join((printed.out + printed.err).split())
