"""What people see: run folders, reports, tables, the live view. No training, no Ray."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from taskray.errors import InputError
from taskray.files import lock_folder
from taskray.loop.metric_key import SupervisedLoss
from taskray.record.folder import RunFolder, read_metrics, read_panels, read_result
from taskray.record.formatting import METRICS, describe, duration, format_change, relative_change
from taskray.report import panels
from taskray.report.charts import Line, line_chart
from taskray.report.compare import comparison_table
from taskray.report.curves import curve_charts, draw_curves, read_curves, write_curves
from taskray.report.history import Run, Series
from taskray.report.hit_rate import explain_hit_rate
from taskray.report.html import write_report
from taskray.report.live import NARROW, WIDE, Live, Progress
from taskray.report.render import to_markdown, to_rich
from taskray.report.tables import Cell, grid, read_table, study_table, to_csv, write_table

NASTY = "<script>alert('x')</script>&\"quoted\""


def make_run(path: Path, *, consistency: bool = True, finished: bool = True) -> Path:
    """A small synthetic run folder whose texts try to break out of the page."""
    mediator = {"data": "video", "consistency_steps": 1 if consistency else 0}
    with RunFolder(path, tensorboard=False) as folder:
        folder.write_config(
            {"name": f"run {NASTY}", "description": NASTY, "tasks": {"depth": {}, "normals": {}},
             "mediator": mediator, "consistency": {"depth_normals": {"weight": 1.0}}}
        )  # fmt: skip
        for step in range(25, 201, 25):
            for task, peer in (("depth", "normals"), ("normals", "depth")):
                values = {"loss/supervised": 10 / step, "eval/real_test/abs_rel": 1 / step}
                if consistency:
                    values |= {"loss/consistency": 1 / step,
                               "loss/consistency/depth_normals": 1 / step,
                               f"staleness/{peer}/steps_mean": 20.0,
                               f"staleness/{peer}/steps_max": 40.0,
                               f"staleness/{peer}/seconds_mean": 1.5,
                               f"hit_rate/{peer}": 0.9}  # fmt: skip
                folder.log(task, step, step / 10, values)
        folder.event(f"task 'depth' {NASTY}; restarted", 12.5, task="depth", step=100)
        if finished:
            folder.write_panels(make_panels())
            folder.write_result(make_result(0.39 if consistency else 0.46))
    return path


def make_result(abs_rel: float) -> dict[str, object]:
    depth = {"real_test": {"abs_rel": abs_rel, "delta_1": 0.61}, "sim_test": {"abs_rel": 0.1}}
    normals = {"real_test": {"mean_deg": 25.0, "within_11_25": 0.378}}
    return {
        "name": f"run {NASTY}", "status": "finished", "seconds": 93.1, "hardware": "2 CPU cores",
        "tasks": {"depth": {"steps": 200, "restarts": 1, "corrupt_rows": 2, "evaluations": depth,
                            "steps_per_second": 20.0, "replaced_by_supervised": 7,
                            "metrics": depth["real_test"]},
                  "normals": {"steps": 200, "restarts": 0, "evaluations": normals,
                              "steps_per_second": 5.0, "metrics": normals["real_test"]}},
        "staleness": {"depth<-normals": {"steps_mean": 20.0, "steps_max": 40, "seconds_mean": 1.5,
                                         "hit_rate": 0.9, "bound": 128,
                                         "misses": {"absent": 8, "stale": 2}}},
        "cache": {"entries": 150, "bytes": 41_000_000, "publishes": 400, "refused": 0},
        "events": [], "error": None,
    }  # fmt: skip


def make_panels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(2, 3, 8, 12)).astype(np.float32)
    return {
        "depth/real_test/image": rng.integers(0, 255, (2, 8, 12, 3), dtype=np.uint8),
        "depth/real_test/depth/truth": rng.uniform(0, 9, (2, 1, 8, 12)).astype(np.float32),
        "depth/real_test/depth/prediction": rng.uniform(1, 9, (2, 1, 8, 12)).astype(np.float32),
        "normals/real_test/image": rng.integers(0, 255, (2, 8, 12, 3), dtype=np.uint8),
        "normals/real_test/normals/truth": normals,
        "normals/real_test/normals/prediction": -normals,
    }


class WellFormed(HTMLParser):
    """Checks that every element is closed in order; collects tags and their attributes."""

    VOID = frozenset({"meta", "img", "input", "br", "!doctype"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> WellFormed:
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    return parser


# ---- run folder


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tensorboard=False) as folder:
        folder.log("depth", 50, 12.3, {"loss/supervised": 0.5, "lr": 1e-3})
        folder.event("restarted", 13.0, task="depth", step=40)
    assert read_metrics(tmp_path) == [
        {"task": "depth", "step": 50, "time": 12.3, "values": {"loss/supervised": 0.5, "lr": 1e-3}},
        {"event": "restarted", "task": "depth", "step": 40, "time": 13.0},
    ]


def test_a_value_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tensorboard=False) as folder:
        folder.log("depth", 1, 0.0, {"a": math.nan, "b": np.float32(math.inf), "c": np.float32(2)})
        folder.write_result({"tasks": {"depth": {"metrics": {"rmse": math.nan}}}, "n": [math.inf]})
    strict = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "result.json").read_text()
    assert "NaN" not in strict
    assert "Infinity" not in strict
    assert read_metrics(tmp_path)[0]["values"] == {"a": None, "b": None, "c": 2.0}
    assert read_result(tmp_path) == {"tasks": {"depth": {"metrics": {"rmse": None}}}, "n": [None]}


def test_a_truncated_last_line_is_left_out_and_repaired_on_resume(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tensorboard=False) as folder:
        folder.log("depth", 1, 5.0, {"lr": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"task": "depth", "st')
    assert len(read_metrics(tmp_path)) == 1
    with RunFolder(tmp_path, tensorboard=False) as folder:
        assert folder.elapsed == 5.0
        folder.log("depth", 2, 6.0, {"lr": 2.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_malformed_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2: got 'nonsense', expected one"):
        read_metrics(tmp_path)


def test_a_failed_write_leaves_the_old_result_and_no_temporary_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, tensorboard=False)
    folder.write_result({"status": "finished"})
    with pytest.raises(TypeError):
        folder.write_result({"status": object()})
    with pytest.raises(ValueError, match="Object arrays"):
        folder.write_panels({"a": np.array([object()])})
    assert read_result(tmp_path) == {"status": "finished"}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_scalars_also_reach_tensorboard(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.log("depth", 1, 0.0, {"loss/supervised": 0.5, "bad": math.nan})
    (events,) = (tmp_path / "tensorboard" / "depth").iterdir()
    assert b"loss/supervised" in events.read_bytes()


def test_panels_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = make_panels()
    RunFolder(tmp_path, tensorboard=False).write_panels(arrays)
    read = read_panels(tmp_path)
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[k], arrays[k]) for k in arrays)


def test_steps_done_again_after_a_restart_count_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tensorboard=False) as folder:
        for time, step in enumerate((10, 20, 30, 20, 30, 40)):
            folder.log("depth", step, float(time), {"loss/supervised": float(time)})
            folder.log("depth", step, float(time), {"other": 1.0})
    series = Run(tmp_path).series("depth", SupervisedLoss())
    assert series.steps == [10, 20, 30, 40]
    assert series.values == [0.0, 3.0, 4.0, 5.0]


HOLDER = """
import sys, time
from pathlib import Path
from taskray.files import lock_folder
with lock_folder(Path(sys.argv[1]), "a run folder"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_folder_is_one_process_s_alone_until_it_ends_in_whatever_way(
    tmp_path: Path, end: int
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            pytest.raises(InputError, match=f"{tmp_path}: another taskray process is working"),
            lock_folder(tmp_path, "a run folder"),
        ):
            pass
        holder.send_signal(end)
    with lock_folder(tmp_path, "a run folder"):
        pass


# ---- report


def test_the_report_is_one_file_that_loads_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "with")
    baseline = make_run(tmp_path / "without", consistency=False)
    page = write_report(run, baseline).read_text(encoding="utf-8")
    for tag, attributes in parse(page).tags:
        assert tag not in ("link", "iframe", "object")
        assert tag != "script" or "src" not in attributes
        source = attributes.get("src") or "data:"
        assert source.startswith("data:")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|url\(|@import""", page)


def test_the_report_has_all_sections(tmp_path: Path) -> None:
    run = make_run(tmp_path / "with")
    baseline = make_run(tmp_path / "without", consistency=False)
    page = write_report(run, baseline).read_text(encoding="utf-8")
    for title in ("Predictions", "Metrics", "Training", "Exchanged predictions", "Steps",
                  "Events"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    for text in ("1 min 33 s", "2 CPU cores", "with consistency", "without consistency",
                 "over steps", "over seconds", "depth ← normals", "Hit rate", "41.0 MB",
                 "\N{MINUS SIGN}15.2 %", "<details><summary>Configuration"):  # fmt: skip
        assert text in page
    steps = page[page.index("<h2>Steps"):page.index("<h2>Events")]  # fmt: skip
    assert re.search(r"replaced by supervised.*>7<.*>2<", steps, re.S)
    assert re.search(r"corrupt rows.*>2<", steps, re.S)
    exchanged = page[page.index("<h2>Exchanged"):page.index("<h2>Steps")]  # fmt: skip
    assert re.search(r"bound.*>128<", exchanged, re.S)
    assert ("depth found normals on 90 % of its look-ups: normals is 4.0 times slower, it had "
            "not yet predicted on the batch in 8 %, and its prediction was too old in 2 %."
            ) in exchanged  # fmt: skip
    assert page.count("<img ") == 2 * 2 * 6  # tasks, samples, pictures a row


def test_the_report_of_an_older_result_has_no_empty_columns_and_invents_no_reason(
    tmp_path: Path,
) -> None:
    edge = {"steps_mean": 20.0, "steps_max": 40, "seconds_mean": 1.5, "hit_rate": 0.9}
    result = {"name": "x", "tasks": {"depth": {"steps": 9}}, "staleness": {"depth<-normals": edge}}
    with RunFolder(tmp_path, tensorboard=False) as folder:
        folder.write_result(result)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    body = page[page.index("<h2>Exchanged") :]
    assert "this result has no reasons for the other 10 %" in body
    for heading in ("bound", "replaced by supervised", "corrupt rows", "restarts"):
        assert f">{heading}<" not in body


@pytest.mark.parametrize(
    ("edge", "speeds", "why"),
    [
        ({"hit_rate": 0.78, "misses": {"absent": 22}}, (41.0, 10.0),
         " on 78 % of its look-ups: b is 4.1 times slower, and it had not yet predicted on the "
         "batch in the other 22 %."),
        ({"hit_rate": 0.9, "misses": {"absent": 10}}, (10.0, 9.0),
         " on 90 % of its look-ups: b runs at about the same speed, and it had not yet predicted "
         "on the batch in the other 10 %."),
        ({"hit_rate": 0.5, "misses": {"stale": 50}}, (2.0, 20.0),
         " on 50 % of its look-ups: b is 10.0 times faster, and its prediction was too old in the "
         "other 50 %."),
        ({"hit_rate": 0.6, "misses": {"stale": 10, "absent": 30}}, (None, 3.0),
         " on 60 % of its look-ups: b had not yet predicted on the batch in 30 %, and its "
         "prediction was too old in 10 %."),
        ({"hit_rate": 0.6, "misses": {"absent": 4}}, (5.0, 0.0),  # a frozen task has no speed
         " on 60 % of its look-ups: b had not yet predicted on the batch in the other 40 %."),
        ({"hit_rate": 0.8, "misses": {"timeout": 2}}, (9.0, 1.0),  # not a matter of speed
         " on 80 % of its look-ups: the wait for b timed out in the other 20 %."),
        ({"hit_rate": 0.8, "misses": {"unavailable": 2}}, (9.0, 1.0),
         " on 80 % of its look-ups: b's prediction could not be read in the other 20 %."),
        ({"hit_rate": 0.995, "misses": {"unusable": 1}}, (9.0, 1.0),
         " on more than 99 % of its look-ups: b's prediction gave no finite loss in the other "
         "less than 1 %."),
        ({"hit_rate": 0.75, "misses": {"lost": 1}}, (9.0, 1.0),
         " on 75 % of its look-ups: b's prediction was missing (lost) in the other 25 %."),
        ({"hit_rate": 0.0, "misses": {"absent": 9}}, (9.0, 3.0),
         " on 0 % of its look-ups: b is 3.0 times slower, and it had not yet predicted on the "
         "batch in all of them."),
        ({"hit_rate": 1.0, "misses": {}}, (9.0, 1.0), " on 100 % of its look-ups."),
        ({"hit_rate": 1.0}, (None, None), " on 100 % of its look-ups."),
        ({"hit_rate": 0.9}, (9.0, 1.0),
         " on 90 % of its look-ups; this result has no reasons for the other 10 %."),
    ],
)  # fmt: skip
def test_a_sentence_explains_the_hit_rate_of_an_edge(
    edge: dict[str, Any], speeds: tuple[float | None, float | None], why: str
) -> None:
    assert explain_hit_rate("a", "b", edge, *speeds) == f"a found b{why}"


def test_an_edge_without_look_ups_has_no_hit_rate_to_explain() -> None:
    assert explain_hit_rate("a", "b", {"hit_rate": 0.0, "misses": {}}) == "a made no look-ups of b."
    assert explain_hit_rate("a", "b", {}) == ""


def test_the_report_escapes_what_comes_from_data(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_report_works_on_a_run_that_has_not_finished(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, finished=False)).read_text(encoding="utf-8")
    parse(page)
    assert "unfinished" in page
    assert "So far" in page
    assert "<h2>Training" in page


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "result.json"])
def test_the_report_works_with_only_one_file_of_a_run(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / name).write_bytes((run / name).read_bytes())
    parse(write_report(alone, run).read_text(encoding="utf-8"))


def test_a_failed_run_shows_its_error(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tensorboard=False) as folder:
        folder.write_result({"name": "x", "status": "failed", "error": "task 'depth' failed: NaN"})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'class="status failed"' in page
    assert "task &#x27;depth&#x27; failed: NaN" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("panels.npz", None, "cannot be read as .npz"),
        ("config.yaml", b"name: \xff", "not a text file in UTF-8"),
        ("config.yaml", b"name: 2020-13-45", "contains values that taskray did not write"),
        ("study.yaml", b"name: \xff", "not a text file in UTF-8"),
        ("curves.json", b"[1, 2]", "not curves that taskray wrote"),
        ("curves.json", b'{"k": {"a": {"steps": [1], "times": ["x"]}}}', "not curves that"),
        ("table.json", b'{"columns": [], "rows": [{"name": "a", "label": "a", "cells": []}]}',
         "not a table that taskray wrote"),
        ("table.json", b'{"title": 3, "columns": [], "rows": [], "notes": [], '
         b'"metrics_as_rows": false, "baseline": null}', "contains values that taskray did not"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    if name in ("panels.npz", "config.yaml"):
        make_run(tmp_path)
    else:
        write_table(study_table("Study", {"a": {"abs_rel": [0.4]}}), tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(InputError, match=problem) as caught:
        write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_panels_are_refused_wherever_they_are_damaged(tmp_path: Path, position: float) -> None:
    file = make_run(tmp_path) / "panels.npz"
    content = bytearray(file.read_bytes())
    place = int(len(content) * position)
    content[place : place + 40] = bytes(40)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        read_panels(tmp_path)


def test_a_study_has_no_baseline(tmp_path: Path) -> None:
    write_table(study_table("Study", {"a": {"abs_rel": [0.4]}}), tmp_path / "study")
    with pytest.raises(InputError, match=r"--baseline .*is a study"):
        write_report(tmp_path / "study", make_run(tmp_path / "run"))


def test_a_study_folder_gets_a_report_that_links_its_runs(tmp_path: Path) -> None:
    results = {NASTY: {"abs_rel": [0.4, 0.5]}, "b": {"abs_rel": [0.3, 0.2]}}
    write_table(study_table("Study", results), tmp_path)
    write_report(make_run(tmp_path / "runs" / "b #1"))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    parse(page)
    assert 'href="runs/b%20%231/report.html"' in page
    assert "0.250 ± 0.071" in page
    assert "<script>alert" not in page


def test_a_study_draws_all_variants_in_one_plot_over_steps_and_over_seconds(tmp_path: Path) -> None:
    key = "depth/real_test/abs_rel"
    results = {"a": {key: [0.4, 0.5], "seconds": 3.0}, "b": {key: [0.3, 0.2], "seconds": 4.0}}
    table = study_table("Study", results)
    write_table(table, tmp_path)
    assert write_curves(table, read_curves(table, {}), tmp_path) is None
    runs = {"a": [tmp_path / "runs/a/seed_0", tmp_path / "runs/a/seed_1"], "b": [tmp_path / "b"]}
    for run in [*runs["a"], *runs["b"]]:
        make_run(run)
    curves = read_curves(table, runs)
    assert {key: ["a", "b"]} == {k: [*v] for k, v in curves.items()}
    assert curves[key]["a"].steps == list(range(25, 201, 25))
    assert curves[key]["a"].values[0] == pytest.approx(1 / 25)
    picture = write_curves(table, curves, tmp_path)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    parse(page)
    charts = page[page.index("<h2>Training") : page.index("<h2>Spread")].split("<figure>")[1:]
    assert len(charts) == 2
    for chart, axis in zip(charts, ("steps", "seconds"), strict=True):
        assert f"<figcaption>depth · real_test · AbsRel ↓, {axis}</figcaption>" in chart
        assert re.findall(r'data-name="(\w)"', chart) == ["a", "b"]


def test_a_variant_has_one_colour_in_all_curves_even_if_another_has_the_same_label() -> None:
    results = {name: {"depth/t/abs_rel": 0.1, "normals/t/miou": 0.2} for name in "abc"}
    table = study_table("", results, labels={"a": "same", "b": "same"})
    series = Series([1, 2], [1.0, 2.0], [0.5, 0.4])
    curves = {
        "depth/t/abs_rel": {"b": series, "c": series},
        "normals/t/miou": {"a": series, "b": series, "c": series},
    }
    first, _, second, _ = draw_curves(table, curves).axes
    assert [line.get_color() for line in first.lines] == ["C1", "C2"]
    assert [line.get_color() for line in second.lines] == ["C0", "C1", "C2"]
    legend = zip(first.get_legend().get_texts(), first.get_legend().get_lines(), strict=True)
    named = [(text.get_text(), line.get_color()) for text, line in legend]
    assert named == [("same", "C0"), ("same", "C1"), ("c", "C2")]
    page = curve_charts(table, curves)
    assert re.findall(r'class="line (c\d)"', page) == ["c1", "c2"] * 2 + ["c0", "c1", "c2"] * 2


def test_dollar_signs_are_not_read_as_mathematics(tmp_path: Path) -> None:
    dollars = "$5_ and 6^$"
    table = study_table(
        dollars, {"a": {f"t/{dollars}": 1.0}}, labels={"a": dollars}, notes=[dollars]
    )
    write_table(table, tmp_path)
    curves = {f"t/{dollars}": {"a": Series([1, 2], [1.0, 2.0], [0.5, 0.4])}}
    assert write_curves(table, curves, tmp_path) is not None


def test_charts_accept_one_point_constants_and_thousands_of_points() -> None:
    assert line_chart("empty", [Line("a", [], [])]) == ""
    for ys in ([1.0], [0.0] * 5, [2.5] * 5, [1e-9, 1e9], list(np.arange(5000.0)), [-1.0, 1.0]):
        chart = line_chart("a", [Line("a", list(range(1, len(ys) + 1)), ys)])
        parse(chart)
        assert "nan" not in chart
        assert chart.count(",") < 600


# ---- tables


def test_table_cells_hold_the_exact_mean_and_sample_deviation() -> None:
    cell = Cell.of([0.25, 0.5, 0.75])
    assert (cell.mean, cell.std) == (0.5, 0.25)
    assert (Cell.of(0.5).mean, Cell.of(0.5).std) == (0.5, None)
    assert Cell.of([0.5, math.nan, None]) == Cell((0.5,), missing=2)


def study() -> dict[str, dict[str, list[float]]]:
    return {
        "alone": {"abs_rel": [0.25, 0.5, 0.75], "delta_1": [0.5, 0.5, 0.5]},
        "collective": {"abs_rel": [0.25, 0.25, 0.25], "delta_1": [0.6, 0.7, 0.8]},
    }


def test_the_best_of_each_metric_is_bold_in_its_own_direction() -> None:
    table = study_table("T", study(), paper={"alone": {"abs_rel": 0.142}}, paper_title="Taskology")
    assert to_markdown(table).splitlines()[2:6] == [
        "|  | AbsRel ↓<br>[ours] | AbsRel ↓<br>[Taskology] | δ < 1.25 (%) ↑ |",
        "| --- | ---: | ---: | ---: |",
        "| alone | 0.500 ± 0.250 | 0.142 | 50.0 ± 0.0 |",
        "| collective | **0.250 ± 0.000** | — | **70.0 ± 10.0** |",
    ]


def test_nothing_is_bold_where_all_tie() -> None:
    table = study_table("", {"a": {"rmse": [1.0]}, "b": {"rmse": [1.0]}, "c": {"rmse": [math.nan]}})
    assert not any(entry.best for row in grid(table).rows for entry in row)
    assert "**" not in to_markdown(table)


def test_csv_contains_fractions_and_seeds() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(study_table("T", study())))))
    assert rows[0] == {"variant": "alone", "abs_rel": "0.5", "abs_rel std": "0.25",
                       "abs_rel seeds": "3", "delta_1": "0.5", "delta_1 std": "0.0",
                       "delta_1 seeds": "3"}  # fmt: skip


def test_a_table_is_written_in_four_formats_the_same_each_time(tmp_path: Path) -> None:
    table = study_table("T", study(), paper={"alone": {"abs_rel": 0.142}}, notes=["a | b"])
    first = {p.name: p.read_bytes() for p in write_table(table, tmp_path / "a")}
    second = {p.name: p.read_bytes() for p in write_table(table, tmp_path / "b")}
    assert list(first) == ["table.md", "table.csv", "table.json", "table.png"]
    assert first == second
    assert read_table(tmp_path / "a" / "table.json") == table
    cell = json.loads(first["table.json"])["rows"][0]["cells"]["abs_rel"]
    assert (cell["mean"], cell["std"], cell["values"]) == (0.5, 0.25, [0.25, 0.5, 0.75])


def test_a_json_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="not a table that taskray wrote"):
        read_table(tmp_path / "table.json")


def test_the_comparison_shows_the_relative_change_and_whether_it_is_good() -> None:
    table = comparison_table({"alone": make_result(0.5), "collective": make_result(0.4)})
    laid = grid(table)
    assert laid.header == ("", "metric", "alone", "collective", "change")
    abs_rel, delta_1 = laid.rows[0], laid.rows[1]
    assert [e.text for e in abs_rel] == [
        "depth · real_test", "AbsRel ↓", "0.500", "0.400", "\N{MINUS SIGN}20.0 %"
    ]  # fmt: skip
    assert abs_rel[4].good is True
    assert abs_rel[3].best
    assert not abs_rel[2].best
    assert delta_1[4].text == "0.0 %"
    assert delta_1[4].good is None
    console = Console(file=io.StringIO(), width=100)
    console.print(to_rich(table))
    assert "20.0 %" in console.file.getvalue()  # type: ignore[attr-defined]


def test_metrics_know_their_direction_and_unit() -> None:
    assert not describe("depth/real_test/abs_rel").higher_is_better
    assert describe("segmentation/test/iou/traffic sign").title == "IoU traffic sign"
    assert describe("iou/car").percent
    assert describe("something_new").higher_is_better is None
    for name in ("restarts", "corrupt_rows", "refused", "skipped_consistency_steps", "turn_error"):
        assert describe(name).higher_is_better is False
    for name in ("evictions", "bytes", "entries", "steps"):
        assert METRICS[name].higher_is_better is None
    assert describe("depth/data_wait_fraction").heading == "Waiting for data or peers (%) ↓"
    assert describe("depth/data_wait_fraction").format(0.0042) == "0.4"
    assert not describe("loss/supervised").higher_is_better
    assert describe("within_11_25").format(0.378, 0.004) == "37.8 ± 0.4"
    assert (relative_change(1.0, 0.0), format_change(None)) == (None, "—")
    assert [duration(s) for s in (4.2, 185, 7620)] == ["4.2 s", "3 min 05 s", "2 h 07 min"]


# ---- live view


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_live(terminal: bool, seconds: int = 40, width: int = 120) -> str:
    """A run of so many seconds that reports ten times a second."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=width)
    with Live({"depth": 1000}, "demo", console, clock=clock) as live:
        for i in range(seconds * 10):
            clock.now = i / 10
            live.update(
                "depth",
                i,
                {
                    "loss/supervised": 0.5,
                    "steps_per_second": 10.0,
                    "staleness/normals/steps_mean": 31.0,
                    "hit_rate/normals": 1.0,
                },
            )
        live.event("task 'depth' [lost] its process")
    return out.getvalue()  # fmt: skip


def test_the_live_view_is_quiet_without_a_terminal() -> None:
    lines = run_live(terminal=False).splitlines()
    assert len(lines) == 5  # one every 10 s, the event, the last state
    assert lines[0] == "[10 s] depth 100/1000 10.0/s loss 0.5000"
    assert "task 'depth' [lost] its process" in lines[3]


def test_the_live_view_shows_the_consistency_loss_once_however_many_terms_it_has() -> None:
    terms = {"loss/consistency": 0.5, "loss/consistency/scene": 1.0}
    parts = {"loss/consistency/scene/rgb": 0.6, "loss/consistency/scene/ssim": 0.4}
    assert Progress(100, values=terms | parts).consistency == 0.5


def test_the_live_view_draws_at_most_twice_a_second() -> None:
    drawn = run_live(terminal=True, seconds=20)
    assert drawn.count("steps/s") <= 2 * 20 + 4
    assert "task 'depth' [lost] its process" in drawn


@pytest.mark.parametrize("width", [40, NARROW - 1, NARROW, WIDE - 1, WIDE, 200])
def test_the_live_view_fits_every_terminal(width: int) -> None:
    """No line is longer than the terminal, no figure is cut, and columns that have no room go."""
    console = Console(file=io.StringIO(), width=width)
    live = Live({"depth": 1000, "normals": 1000}, "demo", console, clock=Clock())
    for task, peer in (("depth", "normals"), ("normals", "depth")):
        live.update(task, 250, {"loss/supervised": 0.5, "steps_per_second": 10.0,
                                f"staleness/{peer}/steps_mean": 31.0,
                                f"staleness/{peer}/steps_max": 75.0,
                                f"hit_rate/{peer}": 0.97})  # fmt: skip
    console.print(live.render())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in ("depth", "normals", "250/1000", "0.5000", "1 min 15 s"):
        assert figure in text
    assert ("normals 31/75" in text) == ("97 %" in text) == (width >= NARROW)
    assert ("steps/s" in text) == ("restarts" in text) == ("━" in text) == (width >= WIDE)


# ---- pictures


def test_normals_look_as_usual() -> None:
    towards, floor, nothing = (0, 0, -1), (0, -1, 0), (0, 0, 0)
    normals = np.array([towards, floor, nothing], np.float32).T.reshape(3, 1, 3)
    blue, green, invalid = panels.colour_normals(normals)[0]
    assert blue.tolist() == [128, 128, 255]
    assert green.tolist() == [128, 255, 128]
    assert tuple(invalid) == panels.INVALID


def test_near_is_brighter_than_far_and_invalid_depth_is_neither() -> None:
    near, far, invalid = panels.colour_depth(np.array([[1.0, 9.0, 0.0]]), 1.0, 9.0)[0]
    assert near.sum() > far.sum()
    assert tuple(invalid) == panels.INVALID


def test_ignored_classes_have_no_colour_of_their_own() -> None:
    colours = panels.colour_segmentation(np.array([[0.0, 1.0, 255.0]]))[0]
    assert len({tuple(c) for c in colours}) == 3
    assert tuple(colours[2]) == panels.INVALID


def test_predictions_on_other_images_are_not_shown_beside_ours() -> None:
    ours, theirs = make_panels(), make_panels()
    theirs["depth/real_test/image"] = theirs["depth/real_test/image"] + 1
    rows = panels.compose(ours, "depth/real_test", "depth", ("without", "with"), theirs)
    assert [panel.caption for panel in rows[0]] == ["input", "truth", "with", "error with"]


@pytest.mark.parametrize("quantity", ["segmentation", "motion_mask", "object_motion"])
def test_every_quantity_has_a_picture(quantity: str) -> None:
    channels = 3 if quantity == "object_motion" else 1
    arrays = {
        f"t/e/{quantity}/truth": np.ones((2, channels, 4, 6), np.float32),
        f"t/e/{quantity}/prediction": np.full((2, channels, 4, 6), np.nan, np.float32),
    }
    rows = panels.compose(arrays, "t/e", quantity, ("", "with"))
    assert [p.caption for p in rows[0]] == ["truth", "with"]
    assert all(p.pixels.shape == (4, 6, 3) and p.pixels.dtype == np.uint8 for p in rows[0])
