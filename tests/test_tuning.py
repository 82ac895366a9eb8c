"""Studies and searches: their files, what is left to do of them, and small real ones on Ray."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from taskray.data.storage.convert import convert
from taskray.errors import InputError
from taskray.files import lock_folder
from taskray.job.config import DataConfig, Job, dump_yaml, load_job, parse_job
from taskray.loop.metric_key import TaskMetric
from taskray.record.folder import read_metrics, read_result
from taskray.report.tables import read_table
from taskray.run.train import train
from taskray.tuning.fit import concurrency, footprint, quiet, share_threads
from taskray.tuning.progress import Progress
from taskray.tuning.runs import Run, RunState, check_metric, resolve, run_state, value_of
from taskray.tuning.searching import domains, tune_settings
from taskray.tuning.settings import StudyConfig, load_space, load_study
from taskray.tuning.study import plan_study, run_in_waves, study, table_of
from taskray.tuning.trial import run_trial
from taskray.tuning.trial_table import TrialRow
from taskray.tuning.tune import Space, check_space, pick_best, short_names, tune, verdict

ROOT = Path(__file__).parents[1]
WORLD = {"name": "world", "num_samples": 16, "height": 32, "width": 48}

JOB: dict[str, Any] = {
    "name": "tiny",
    "steps": 40,
    "data": {
        "sim": {"reader": {**WORLD, "domain": "sim"}},
        "real": {"reader": {**WORLD, "domain": "real"}},
        "val": {"reader": {**WORLD, "domain": "real", "split": "validation", "num_samples": 8}},
        "test": {"reader": {**WORLD, "domain": "real", "split": "test", "num_samples": 8}},
    },
    "tasks": {
        name: {
            "task": name,
            "dedicated": "sim",
            "batch_size": 4,
            "model": {"name": "unet", "base": 8, "depth": 2},
        }
        for name in ("depth", "normals")
    },
    "mediator": {"data": "real", "batch_size": 4, "window": 2, "visits": 2},
    "consistency": {"ties": {"relation": "depth_normals"}},
    "evaluation": {"data": {"test": "test"}},
    "runtime": {"chunk_steps": 5},
}

STUDY: dict[str, Any] = {
    "name": "small",
    "job": "job.yaml",
    "seeds": 2,
    "variants": {
        "alone": {"set": {"consistency.ties.weight": 0}},
        "together": {"label": "with consistency", "description": "tied."},
    },
    "metrics": ["depth/test/abs_rel", "normals/test/within_30"],
}

SPACE: dict[str, Any] = {
    "name": "space",
    "job": "job.yaml",
    "metric": "depth/val/abs_rel",
    "set": {"evaluation": {"data": {"val": "val"}, "every": 10}},
    "parameters": {"consistency.ties.weight": {"log_uniform": [0.1, 10.0]}},
}


def write(folder: Path, **files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        text = yaml.safe_dump(dict(content), sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def changed(content: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    return {k: v for k, v in {**content, **values}.items() if v is not None}


def silent() -> Console:
    return Console(file=StringIO(), width=120)


def text_of(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def planned(folder: Path, **values: Any) -> list[Any]:
    """The runs of a study whose file differs from STUDY."""
    write(folder, job=JOB, study=changed(STUDY, **values))
    path = folder / "study.yaml"
    config = load_study(path)
    return plan_study(config, path, folder / "out", config.seed_list(), [])


def finish(run: Run, **metrics: float) -> None:
    """Leave in a run's folder what a finished run leaves."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(dump_yaml(run.job), encoding="utf-8")
    tasks: dict[str, Any] = {}
    for key, value in metrics.items():
        task, title, name = key.split("__")
        tasks.setdefault(task, {"evaluations": {}})["evaluations"].setdefault(title, {})
        tasks[task]["evaluations"][title][name] = value
    result = {"name": "x", "status": "finished", "error": None, "seconds": 1.0, "tasks": tasks}
    (run.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "jobs/studies").glob("*.yaml")), ids=str)
def test_every_study_of_the_project_fits_its_job(path: Path) -> None:
    config = load_study(path)
    assert config.name == path.stem
    runs = plan_study(config, path, Path("/nowhere"), config.seed_list(), [])
    assert len({r.run.folder for r in runs}) == len(config.variants) * len(config.seed_list())


ROW = '''"""A weighting of one's own, and its row."""
from torch import Tensor
from taskray.weighting.weighting import Sum

VARIANT = {
    "label": "twice the sum",
    "set": {"tasks.depth.weighting": "rows.mine:Twice"},
}


class Twice(Sum):
    """Its steps are twice as large."""
'''


def test_a_file_beside_a_study_is_a_row_of_it_with_the_code_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "mine.py").write_text(ROW, encoding="utf-8")
    (rows / "_unused.py").write_text("no row", encoding="utf-8")
    write(rows, later={"label": "later", "set": {"consistency.ties.start_step": 2}})
    runs = planned(tmp_path, rows="rows")
    assert [r.variant for r in runs[:4]] == ["alone", "together", "later", "mine"]
    assert runs[3].run.job.tasks["depth"].weighting.name == "rows.mine:Twice"
    config = load_study(tmp_path / "study.yaml")
    assert config.variants["mine"].label == "twice the sum"
    (tmp_path / "again.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_study(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "", "rows: no row (*.yaml or *.py) in this folder"),
        ("x.yaml", "lable: x", "x.yaml: lable: unknown key; did you mean 'label'?"),
        ("x.py", "a = 1", "x.py: expected VARIANT = {...}, a dict of literals"),
        ("x.py", "VARIANT = {'set': f()}", "x.py: malformed node or string on line 1"),
        ("x.py", "VARIANT = {", "x.py: SyntaxError: '{' was never closed"),
        ("alone.yaml", "label: x", "study.yaml: variants.alone: is also a file in "),
    ],
)
def test_a_file_that_is_no_row_is_one_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        planned(tmp_path, rows="rows")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=str)
def test_every_space_of_the_project_fits_its_job(path: Path) -> None:
    config = load_space(path)
    assert config.name == path.stem
    values = yaml.safe_load((path.parent / config.job).read_text(encoding="utf-8"))
    check_space(Space(config, str(path), values, (), Path("/nowhere")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seedz": 3}, "seedz: unknown key; did you mean 'seeds'?"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "duplicate seed 1"),
        ({"variants": {}}, "variants"),
        ({"job": "no.yaml"}, "no.yaml: no such file"),
        ({"variants": {"a": {"set": {"stepz": 3}}}}, "variants.a: stepz: unknown key"),
        ({"variants": {"a": {"set": {"steps.more": 3}}}}, "variants.a: 'steps.more'"),
        (
            {"variants": {"a": {"set": {"tasks.depth.model.bases": 8}}}},
            "variants.a: tasks.depth.model.bases: unknown key; did you mean 'base'?",
        ),
        ({"metrics": ["dept/test/abs_rel"]}, "no task 'dept'; did you mean 'depth'?"),
        ({"metrics": ["depth/tset/abs_rel"]}, "no evaluation 'tset'; did you mean 'test'?"),
        ({"metrics": ["*/test/abs_rell"]}, "measures no 'abs_rell'; did you mean 'abs_rel'?"),
        ({"metrics": ["depth/test/abs_rell"]}, "measures no 'abs_rell'; did you mean 'abs_rel'?"),
        ({"metrics": ["depth/abs_rel"]}, "has no evaluation, expected depth/<evaluation>/abs_rel"),
        ({"metrics": ["depth/stepz"]}, "no such figure; did you mean 'steps'?"),
        ({"metrics": ["cache/foo"]}, "no such figure; known: bytes, entries, "),
        ({"metrics": ["seconds/x"]}, "no such figure; known: seconds"),
        (
            {"metrics": ["staleness/depth<-edges/steps_mean"]},
            "no such figure; did you mean 'depth<-no",
        ),
        ({"metrics": ["staleness/nonsense/x"]}, "no such figure"),
        (
            {"delta_m": {"baseline": "alone", "metrics": ["depth/steps"]}},
            "delta_m.metrics: 'depth/steps' has no known direction",
        ),
        ({"set": {"seed": 9}}, "set.seed: the study sets it: change 'seeds' or give --seeds"),
        ({"variants": {"a": {"set": {"name": "x"}}}}, "variants.a.set.name: the study sets it"),
        ({"variants": {"a": {}, "A": {}}}, "variants.A: differs from 'a' by case alone"),
        (
            {"paper": {"title": "P", "rows": {"alon": {"depth/test/abs_rel": 0.3}}}},
            "paper.rows.alon: no such variant; did you mean 'alone'?",
        ),
        (
            {"paper": {"title": "P", "rows": {"alone": {"depth/test/rmse": 0.3}}}},
            "paper.rows.alone.depth/test/rmse: not in 'metrics'",
        ),
    ],
)
def test_a_wrong_study_is_refused_in_one_line_that_names_the_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        planned(tmp_path, **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"parameters": {}}, "parameters"),
        ({"parameters": {"steps": {"choice": [1], "grid": [2]}}}, "expected exactly one of"),
        ({"parameters": {"steps": {"uniform": [3, 1]}}}, "expected two bounds"),
        ({"parameters": {"stepz": {"choice": [1]}}}, "parameters: stepz: unknown key"),
        ({"parameters": {"steps": {"uniform": [1, 9]}}}, "parameters: steps: "),
        ({"parameters": {"steps": {"choice": [0]}}}, "parameters: steps: "),
        (
            {"parameters": {"tasks.depth.model.base": {"choice": [9]}}},
            "parameters: tasks.depth.model",
        ),
        ({"search": "grid"}, "expected 'grid' or 'choice'"),
        (
            {"search": "optuna", "parameters": {"steps": {"grid": [1]}}},
            "got 'grid', expected 'choice'",
        ),
        ({"metric": "depth/test/abs_rel"}, "no evaluation 'test'"),
        ({"metric": "depth/test/abs_rel", "set": {}}, "'test' is a test split"),
        ({"metric": "seconds"}, "expected <task>/<evaluation>/<metric>"),
        ({"metrics": ["depth/stepz"]}, "no such figure"),
        ({"scheduler": "asha", "set": {"evaluation.data": {"val": "val"}}}, "evaluation.every"),
        ({"scheduler": "hyperband"}, "scheduler"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line_that_names_the_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, job=JOB, space=changed(SPACE, **change))
    with pytest.raises(InputError) as caught:
        tune(tmp_path / "space.yaml", None, tmp_path / "out", None, [], silent())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_metric_of_a_user_s_task_is_allowed_and_a_search_needs_its_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskray.tuning.runs.metric_names", lambda job, task: ["own", "iou/a"])
    for metric in ("depth/test/own", "depth/test/iou/a"):
        planned(tmp_path, metrics=[metric])
    with pytest.raises(InputError, match="measures no 'iou/b'"):
        planned(tmp_path, metrics=["depth/test/iou/b"])
    write(tmp_path, space=changed(SPACE, metric="depth/val/own"))
    space = Space(load_space(tmp_path / "space.yaml"), "space.yaml", JOB, (), tmp_path)
    with pytest.raises(InputError, match=r"space.yaml: mode: expected 'min' or 'max'"):
        check_space(space)


def test_the_seed_of_a_study_cannot_be_set_on_the_command_line(tmp_path: Path) -> None:
    write(tmp_path, job=JOB, study=STUDY)
    with pytest.raises(InputError, match="--set 'seed=9': the study sets it"):
        study(tmp_path / "study.yaml", tmp_path / "out", None, ["seed=9"], silent())


@pytest.mark.parametrize("kind", [study, tune])
def test_a_folder_that_another_study_uses_is_refused(tmp_path: Path, kind: Any) -> None:
    write(tmp_path, job=JOB, study=STUDY, space=SPACE)
    file = tmp_path / ("study.yaml" if kind is study else "space.yaml")
    arguments = (file, *([None] if kind is tune else []), tmp_path / "out", None, [], silent())
    with (
        lock_folder(tmp_path / "out", "a study folder"),
        pytest.raises(InputError, match="out: another taskray process is working in this folder"),
    ):
        kind(*arguments)


def test_zero_samples_or_seeds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, job=JOB, space=SPACE, study=STUDY)
    with pytest.raises(InputError, match="--samples: got 0, expected at least 1"):
        tune(tmp_path / "space.yaml", None, tmp_path / "out", 0, [], silent())
    with pytest.raises(InputError, match="--seeds: got 0, expected at least 1"):
        study(tmp_path / "study.yaml", tmp_path / "out", 0, [], silent())


def test_a_count_of_seeds_begins_with_the_study_s_own() -> None:
    config = StudyConfig(**{**STUDY, "seeds": [4, 2]})
    assert config.seed_list() == [4, 2]
    assert config.seed_list(1) == [4]
    assert config.seed_list(4) == [4, 2, 5, 6]
    assert StudyConfig(**STUDY).seed_list(3) == [0, 1, 2]


def test_changes_of_a_variant_win_and_every_seed_has_its_own_job(tmp_path: Path) -> None:
    write(tmp_path, job=JOB, study=changed(STUDY, set={"steps": 7, "mediator.visits": 3}))
    path = tmp_path / "study.yaml"
    overrides = ["steps=9", "consistency.ties.weight=0.5"]
    runs = plan_study(load_study(path), path, tmp_path / "out", [0, 5], overrides)
    jobs = {(r.variant, r.seed): r.run.job for r in runs}
    assert {job.steps for job in jobs.values()} == {9}
    assert {job.mediator.visits for job in jobs.values() if job.mediator} == {3}
    assert jobs["alone", 5].consistency["ties"].weight == 0
    assert jobs["together", 5].consistency["ties"].weight == 0.5
    assert jobs["together", 5].seed == 5
    assert runs[3].run.folder == tmp_path / "out/runs/together/seed_5"


def test_runs_that_share_a_checkpoint_address_get_separate_folders_there(
    tmp_path: Path,
) -> None:
    runs = planned(tmp_path, set={"checkpoint.path": "s3://bucket/checkpoints/"})
    paths = [r.run.job.checkpoint.path for r in runs]
    assert paths[0] is not None
    assert paths[0].startswith("s3://bucket/checkpoints/out/runs/alone/seed_0-")
    (tmp_path / "elsewhere").mkdir()  # a study of the same name
    others = planned(tmp_path / "elsewhere", set={"checkpoint.path": "s3://bucket/checkpoints/"})
    assert len({*paths, *(r.run.job.checkpoint.path for r in others)}) == 8


# ---- what is left to do -------------------------------------------------------------------------


def test_a_run_is_done_only_if_it_finished_with_the_same_job(tmp_path: Path) -> None:
    job = parse_job(JOB, "job")
    run = Run("r", tmp_path / "r", job)
    assert run_state(run) is RunState.RESUME  # nothing there: begins
    finish(run)
    assert run_state(run) is RunState.DONE

    def now(**changes: Any) -> RunState:
        return run_state(resolve(JOB, [changes], "job", run.folder))

    assert now(name="other", description="x") is RunState.DONE
    assert now(**{"checkpoint.every": 3}) is RunState.DONE
    assert now(**{"tasks.depth.threads": 1}) is RunState.DONE
    assert now(**{"evaluation.data": {"val": "val"}}) is RunState.RESUME
    assert now(**{"data.test.limit": 3, "evaluation.batch_size": 4}) is RunState.RESUME
    assert now(seed=1) is RunState.START_OVER
    assert now(**{"tasks.depth.optimizer.lr": 0.1}) is RunState.START_OVER
    assert now(**{"data.sim.reader.num_samples": 17}) is RunState.START_OVER
    assert now(**{"mediator.visits": 9}) is RunState.START_OVER


@pytest.mark.parametrize("content", ['{"status": "interrupted"}', '{"status": "fail', ""])
def test_a_run_that_did_not_finish_continues_from_its_checkpoints(
    tmp_path: Path, content: str
) -> None:
    run = Run("r", tmp_path / "r", parse_job(JOB, "job"))
    finish(run)
    (run.folder / "result.json").write_text(content, encoding="utf-8")
    assert run_state(run) is RunState.RESUME


def test_of_two_trials_of_one_point_the_second_finds_the_work_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("r", tmp_path / "trials/r", parse_job(JOB, "job"))
    trained: list[Path] = []
    reports: list[dict[str, Any]] = []

    def slowly(job: Job, folder: Path, **_: Any) -> dict[str, Any]:
        trained.append(folder)
        time.sleep(0.2)
        finish(run, depth__test__abs_rel=0.5)
        return read_result(folder) or {}

    monkeypatch.setattr("taskray.tuning.trial.train", slowly)
    monkeypatch.setattr("taskray.tuning.trial.tune.report", reports.append)
    arguments = (run, tmp_path / ".stop", TaskMetric("depth", "test", "abs_rel"))
    trials = [threading.Thread(target=run_trial, args=arguments) for _ in range(2)]
    for trial in trials:
        trial.start()
    for trial in trials:
        trial.join()
    assert trained == [run.folder]
    assert [report["depth/test/abs_rel"] for report in reports] == [0.5, 0.5]


# ---- variants that build on each other ----------------------------------------------------------

CHAIN: dict[str, Any] = {
    "depth_alone": {"set": {"tasks.normals": None, "consistency.ties": None}},
    "together": {},
    "normals_by_depth": {
        "set": {"tasks.depth.frozen": True, "tasks.depth.checkpoint": "${depth_alone}"}
    },
    "normals_again": {"set": {"tasks.normals.checkpoint": "${normals_by_depth}#normals"}},
}


def test_a_variant_begins_from_another_ones_run_of_the_same_seed(tmp_path: Path) -> None:
    runs = {(r.variant, r.seed): r for r in planned(tmp_path, variants=CHAIN)}
    job = runs["normals_by_depth", 1].run.job
    origin = tmp_path / "out/runs/depth_alone/seed_1"
    assert job.tasks["depth"].checkpoint == str(origin)
    assert runs["normals_by_depth", 1].origins == (origin,)
    assert [runs[name, 0].wave for name in CHAIN] == [0, 0, 1, 2]
    other = runs["normals_again", 0].run.job.tasks["normals"].checkpoint
    assert other == f"{tmp_path / 'out/runs/normals_by_depth/seed_0'}#normals"


def test_null_removes_a_task_or_a_relation(tmp_path: Path) -> None:
    runs = {r.variant: r.run.job for r in planned(tmp_path, variants=CHAIN)}
    assert set(runs["depth_alone"].tasks) == {"depth"}
    assert runs["depth_alone"].consistency == {}
    assert set(runs["together"].tasks) == {"depth", "normals"}
    # a field may still be null
    unlabelled = {"a": {"set": {"tasks.depth.dedicated": None}}}
    assert planned(tmp_path, variants=unlabelled)[0].run.job.tasks["depth"].dedicated is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks.depth.checkpoint": "${alon}"}, "${alon}: no such variant; did you mean 'alone'?"),
        ({"tasks.depth.checkpoint": "${b}"}, "variants: circular references: b"),
        ({"tasks.dept": None}, "variants.b: 'tasks.dept': there is no 'tasks.dept' to remove"),
        ({"tasks.depth": None}, "needs 'depth', which no task predicts"),
        (
            {"tasks.normals.checkpoint": "${alone}#edges"},
            "variants.b: tasks.normals.checkpoint: variant 'alone' has no task 'edges'",
        ),
    ],
)
def test_a_wrong_reference_or_removal_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        planned(tmp_path, variants={"alone": {}, "b": {"set": changes}})
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_progressive_study_runs_in_order_and_repeats_only_outdated_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wave in one process instead of through Ray Tune."""
    order: list[str] = []

    def run_inline(
        runs: list[Run], folder: Path, max_concurrent: int | None, console: Console
    ) -> dict[Path, str]:
        for run in runs:
            if (what := run_state(run)) is not RunState.DONE:
                order.append(run.folder.parent.name)
                resume: Any = "auto" if what is RunState.RESUME else "never"
                train(run.job, run.folder, resume=resume, inline=True, console=console)
        return {}

    monkeypatch.setattr("taskray.tuning.study.run_all", run_inline)
    variants = {name: CHAIN[name] for name in ("normals_by_depth", "together", "depth_alone")}
    write(tmp_path, job=changed(JOB, steps=4), study=changed(STUDY, variants=variants))
    arguments = (tmp_path / "study.yaml", tmp_path / "out", 1, [], silent())
    assert study(*arguments) == 0
    assert order == ["together", "depth_alone", "normals_by_depth"]
    rows = {row.name: row.cells for row in read_table(tmp_path / "out" / "table.json").rows}
    first, frozen = (rows[name]["depth/test/abs_rel"] for name in list(CHAIN)[::2][:2])
    assert first.values == frozen.values  # the same weights, on the same frames
    assert "normals/test/within_30" not in rows["depth_alone"]  # no hole: it has no such task
    assert study(*arguments) == 0
    assert len(order) == 3  # all is done

    begun_from = next((tmp_path / "out/runs/depth_alone").glob("**/depth/step_4/manifest.json"))
    os.utime(begun_from)  # as if it had been trained again
    assert study(*arguments) == 0
    assert order[3:] == ["normals_by_depth"]


def test_a_run_whose_origin_did_not_finish_is_missing_with_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskray.tuning.study.run_all", lambda *arguments: {})
    runs = planned(tmp_path, variants=CHAIN)
    errors = run_in_waves(runs, tmp_path, None, silent())
    reasons = {r.variant: errors.get(r.run.folder) for r in runs if r.seed == 0}
    assert reasons == {
        "depth_alone": None,
        "together": None,
        "normals_by_depth": "needs depth_alone, seed 0, which did not finish",
        "normals_again": "needs normals_by_depth, seed 0, which did not finish",
    }


# ---- tables -------------------------------------------------------------------------------------


def test_a_metric_is_an_evaluation_s_or_a_path_of_the_result() -> None:
    result = {
        "seconds": 3.5,
        "tasks": {
            "depth": {"steps_per_second": 12.0, "evaluations": {"test": {"abs_rel": 0.4}}},
            "segmentation": {"evaluations": {"test": {"iou/road": 0.8}}},
        },
        "staleness": {"depth<-normals": {"steps_mean": 31.0}},
    }
    assert value_of(result, "depth/test/abs_rel") == 0.4
    assert value_of(result, "segmentation/test/iou/road") == 0.8
    assert value_of(result, "depth/steps_per_second") == 12.0
    assert value_of(result, "seconds") == 3.5
    assert value_of(result, "staleness/depth<-normals/steps_mean") == 31.0
    assert value_of(result, "depth/test/rmse") is None
    assert value_of(result, "*/test/abs_rel") == 0.4
    assert value_of(result, "*/test/rmse") is None
    assert value_of(result, "normals/test/abs_rel") is None
    job = parse_job(JOB, "job")
    check_metric("staleness/depth<-normals/steps_mean", [job], "study")
    for figure in ("depth/steps_per_second", "depth/restarts", "seconds", "cache/evictions"):
        check_metric(figure, [job], "study")


def test_the_table_shows_the_paper_s_values_beside_ours_and_names_missing_runs(
    tmp_path: Path,
) -> None:
    paper = {"title": "Paper", "rows": {"alone": {"depth/test/abs_rel": 0.282}}, "note": "Other."}
    runs = planned(tmp_path, paper=paper)
    for r, value in zip(runs[:3], (0.40, 0.30, 0.50), strict=True):
        finish(r.run, depth__test__abs_rel=value, normals__test__within_30=0.5)
    config = load_study(tmp_path / "study.yaml")
    table = table_of(config, runs, {runs[3].run.folder: "worker lost"})
    assert [row.label for row in table.rows] == ["alone", "with consistency"]
    cells = table.rows[0].cells
    assert cells["depth/test/abs_rel"].mean == pytest.approx(0.45)
    assert cells["depth/test/abs_rel"].values == (0.40, 0.50)
    assert cells["Paper: depth/test/abs_rel"].mean == 0.282
    assert table.rows[1].cells["depth/test/abs_rel"].missing == 1
    assert "Missing: together, seed 1 (worker lost)" in table.notes
    assert "Other" in table.notes
    assert "with consistency: tied" in table.notes


def test_the_gain_over_a_variant_counts_every_metric_in_its_direction(tmp_path: Path) -> None:
    metrics = ["depth/test/abs_rel", "normals/test/within_30"]
    runs = planned(tmp_path, delta_m={"baseline": "alone", "metrics": metrics})
    figures = {("alone", 0): 0.4, ("together", 0): 0.2, ("alone", 1): 0.6, ("together", 1): 0.5}
    for r in runs:
        error = figures[r.variant, r.seed]
        finish(r.run, depth__test__abs_rel=error, normals__test__within_30=1 - error)
    table = table_of(load_study(tmp_path / "study.yaml"), runs, {})
    assert table.rows[1].cells["delta_m"].values == pytest.approx((0.6, 0.0))
    assert "delta_m" not in table.rows[0].cells
    known = {metrics[0]: True, "depth/test/rmse": True}  # the second is none of the gain's
    gain = {"baseline": "alone", "metrics": metrics, "higher_is_better": known}
    runs = planned(tmp_path, delta_m=gain)
    table = table_of(load_study(tmp_path / "study.yaml"), runs, {})
    assert table.rows[1].cells["delta_m"].values == pytest.approx((0.0, 0.0))
    with pytest.raises(InputError, match=r"delta_m.baseline: no such variant; did you mean"):
        planned(tmp_path, delta_m={"baseline": "alon", "metrics": metrics})


def test_a_study_that_is_done_needs_no_ray_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for r in planned(tmp_path):
        finish(r.run, depth__test__abs_rel=0.4 + r.seed / 10, normals__test__within_30=0.5)
    monkeypatch.setattr("taskray.runtime.session.session", None)
    console = silent()
    arguments = (tmp_path / "study.yaml", tmp_path / "out", None, [], console, tmp_path / "[/kept]")
    assert study(*arguments) == 0
    assert "4 of 4 runs are already done" in text_of(console)
    assert f"recorded in {tmp_path}/[/kept]/small.md" in text_of(console)
    for name in ("table.md", "table.csv", "table.json", "table.png", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    kept = json.loads((tmp_path / "[/kept]/small.json").read_text(encoding="utf-8"))
    assert kept["seeds"] == [0, 1]
    assert kept["command"].startswith("taskray study")
    assert kept["runs"] == "4 of 4 finished"
    assert {"commit", "hardware", "date", "seconds", "table"} <= kept.keys()
    text = (tmp_path / "[/kept]/small.md").read_text(encoding="utf-8")
    assert "0.450 ± 0.071" in text
    assert "| commit |" in text
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be a folder of records"):
        study(*arguments[:5], tmp_path / "file")


# ---- searches -----------------------------------------------------------------------------------


def row(name: str, value: float | None, finished: bool = True, **point: float) -> TrialRow:
    return TrialRow(name, Path(name), point, point, value, 40, 1.0, finished=finished)


def test_the_best_trial_is_a_finished_one() -> None:
    rows = [row("default", 0.5), row("a", 0.4, w=1.0), row("b", 0.1, finished=False, w=2.0)]
    assert pick_best(rows, maximise=False).title == "a"
    assert pick_best(rows, maximise=True).title == "default"
    assert verdict(rows[1], rows[0], "depth/val/abs_rel") == (
        "depth/val/abs_rel: 0.400 with a, against 0.500 with the job's own values (−20.0 %)"
    )
    assert pick_best([row("b", 0.4), row("a", 0.4)], maximise=True).title == "b"
    assert "no trial beat" in verdict(rows[0], rows[0], "depth/val/abs_rel")


def test_parameters_are_named_by_their_shortest_own_ending() -> None:
    paths = ["tasks.depth.optimizer.lr", "tasks.normals.optimizer.lr", "mediator.window"]
    assert short_names(paths) == {
        "tasks.depth.optimizer.lr": "depth.optimizer.lr",
        "tasks.normals.optimizer.lr": "normals.optimizer.lr",
        "mediator.window": "window",
    }


def test_optuna_with_the_same_seed_draws_the_same_points_within_their_bounds(
    tmp_path: Path,
) -> None:
    parameters = {
        "consistency.ties.weight": {"log_uniform": [0.1, 10.0]},
        "mediator.visits": {"choice": [1, 2, 3]},
    }
    write(tmp_path, space=changed(SPACE, search="optuna", parameters=parameters))
    config = load_space(tmp_path / "space.yaml")

    def draw() -> list[dict[str, Any]]:
        metric = TaskMetric("depth", "val", "abs_rel")
        settings = tune_settings(config, parse_job(JOB, "job"), metric, maximise=False, at_once=1)
        optuna = settings["search_alg"]
        optuna.set_search_properties("m", "min", domains(config))
        points = []
        for number in range(4):
            points.append(dict(optuna.suggest(str(number))))
            optuna.on_trial_complete(str(number), {"m": float(number), "training_iteration": 1})
        return points

    with quiet():
        points = draw()
        assert points == draw()
    assert len({p["consistency.ties.weight"] for p in points}) == 4
    assert all(0.1 <= p["consistency.ties.weight"] <= 10 for p in points)
    assert {p["mediator.visits"] for p in points} <= {1, 2, 3}


# ---- resources and progress ---------------------------------------------------------------------


def test_a_trial_s_group_holds_what_its_tasks_reserve() -> None:
    job = parse_job(JOB, "job")
    small, large = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}
    assert footprint(job, small).bundles == [{"memory": float(1 << 20)}]
    assert footprint(job, large).bundles == [{"CPU": 1.0}, {"CPU": 1.0}]
    with_gpu = resolve(JOB, [{"tasks.depth.gpus": 1}], "job", Path("/r")).job
    assert {"CPU": 1.0, "GPU": 1.0} in footprint(with_gpu, large).bundles
    with pytest.raises(InputError, match="expected at most the 0 of Ray"):
        footprint(with_gpu, small)


def test_as_many_trials_run_at_once_as_leave_each_task_a_core_and_data_a_cpu() -> None:
    job = parse_job(JOB, "job")
    assert concurrency(job, {"CPU": 2.0}, None) == 1
    assert concurrency(job, {"CPU": 16.0}, None) == 7
    assert concurrency(job, {"CPU": 2.0}, 3) == 3
    with_gpu = resolve(JOB, [{"tasks.depth.gpus": 1}], "job", Path("/r")).job
    assert concurrency(with_gpu, {"CPU": 16.0, "GPU": 4.0}, None) == 4


def test_trials_at_once_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    job = resolve(JOB, [{"tasks.normals.threads": 3}], "job", Path("/r")).job
    shared = share_threads(Run("r", Path("/r"), job), 4).job.tasks
    assert (shared["depth"].threads, shared["normals"].threads) == (2, 3)
    assert share_threads(Run("r", Path("/r"), job), 1).job is job


def test_progress_shows_the_run_the_count_and_the_time_left() -> None:
    now = [0.0]
    console = silent()
    progress = Progress(lambda p: p["run"], 3, console, "depth/val/abs_rel", lambda: now[0])

    def trial(name: str) -> Any:
        return SimpleNamespace(trial_id=name, config={"run": name}, pickled_error_file=None)

    with progress:
        progress.on_trial_start(0, [], trial("a"))
        now[0] = 60.0
        report = {"depth/val/abs_rel": 0.25, "done_part": 1.0}
        progress.on_trial_result(0, [], trial("a"), report)
        progress.on_trial_complete(0, [], trial("a"))
        progress.on_trial_start(0, [], trial("b"))
        now[0] = 90.0
        progress.on_trial_result(0, [], trial("b"), {"done_part": 0.5, "step": 20})
        assert "b 50 % · 1 of 3 done · about 1 min 30 s left" in progress.status().plain
        progress.on_trial_complete(0, [], trial("b"))
        progress.on_trial_start(0, [], trial("c"))
        progress.on_trial_error(0, [], trial("c"))
    lines = text_of(console).splitlines()
    assert lines[:3] == [
        "[1/3] a: started",
        "[1/3] a: 1 min 00 s · depth/val/abs_rel 0.250 · about 2 min 00 s left",
        "[2/3] b: started",
    ]
    assert "stopped early at step 20" in lines[3]
    assert lines[-1] == "[3/3] c: 0.0 s · failed"


class Unpicklable(Exception):
    """An exception that does not unpickle: its text is not its argument."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_an_exception_that_cannot_be_read_is_a_failure_and_trials_keep_their_numbers(
    tmp_path: Path,
) -> None:
    (tmp_path / "error.pkl").write_bytes(pickle.dumps(Unpicklable(1, 2)))
    console = silent()
    progress = Progress(lambda p: p["run"], 2, console)
    a, b = (
        SimpleNamespace(
            trial_id=name, config={"run": name}, pickled_error_file=tmp_path / "error.pkl"
        )
        for name in "ab"
    )
    with progress:
        progress.on_trial_start(0, [], a)
        progress.on_trial_start(0, [], b)
        progress.on_trial_error(0, [], b)
        progress.on_trial_complete(0, [], a)
    assert "b: 0.0 s · failed" in text_of(console)
    assert [(t.title, t.number) for t in progress.trials] == [("b", 2), ("a", 1)]


# ---- on Ray -------------------------------------------------------------------------------------


@pytest.fixture
def stored_job(tmp_path: Path) -> dict[str, Any]:
    """The job on datasets that are Parquet already, so that no cache is needed."""
    data = {}
    for name, config in JOB["data"].items():
        convert(DataConfig(**config), tmp_path / name, name=name, use_ray=False)
        data[name] = {"reader": {"name": "parquet", "path": str(tmp_path / name)}}
    return {**JOB, "data": data}


def interrupt_when_it_trains(folder: Path) -> threading.Thread:
    """Press Ctrl-C once the run in a folder has reported twice."""

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and len(read_metrics(folder)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_study_continues_after_ctrl_c_and_a_failing_variant_is_missing(
    ray_session: ModuleType, stored_job: dict[str, Any], tmp_path: Path
) -> None:
    variants = {"good": {}, "broken": {"set": {"tasks.depth.task.loss": "operator:add"}}}
    content = changed(
        STUDY, variants=variants, seeds=1, metrics=["depth/test/abs_rel"], set={"steps": 60}
    )
    write(tmp_path, job=stored_job, study=content)
    arguments = (tmp_path / "study.yaml", tmp_path / "out", None, [])
    good = tmp_path / "out/runs/good/seed_0"

    before = signal.getsignal(signal.SIGINT)
    presser = interrupt_when_it_trains(good)
    with pytest.raises(KeyboardInterrupt):
        study(*arguments, silent())
    presser.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert (read_result(good) or {})["status"] == "interrupted"
    stopped_at = {n: t["steps"] for n, t in (read_result(good) or {})["tasks"].items()}
    assert max(stopped_at.values()) > 0
    assert min(stopped_at.values()) < 60
    assert not (tmp_path / "out/runs/broken").exists()
    assert "Missing" in (tmp_path / "out/table.md").read_text(encoding="utf-8")

    console = silent()
    assert study(*arguments, console) == 1
    result = read_result(good) or {}
    assert result["status"] == "finished"
    events = [line["event"] for line in read_metrics(good) if "event" in line]
    assert any("goes on from step" in event for event in events)
    table = read_table(tmp_path / "out/table.json")
    constant, finished, broken = (row.cells["depth/test/abs_rel"] for row in table.rows)
    measured = result["tasks"]["depth"]
    assert constant.values == (measured["constant"]["test"]["abs_rel"],)
    assert finished.values == (measured["evaluations"]["test"]["abs_rel"],)
    assert broken.missing == 1
    hole = next(note for note in table.notes if note.startswith("Missing: broken, seed 0"))
    assert "task 'depth' failed at step 0" in hole
    assert run_state(Run("good", good, load_job(good / "config.yaml"))) is RunState.DONE
    assert "[2/2]" in text_of(console)
    assert not list((tmp_path / "out").glob(".[st]*"))  # nothing of Tune's stays


def test_a_search_beats_the_job_and_stops_worse_trials_early(
    ray_session: ModuleType, stored_job: dict[str, Any], tmp_path: Path
) -> None:
    alone = {"depth": {**stored_job["tasks"]["depth"], "cpus": 0.5, "optimizer": {"lr": 1e-5}}}
    job = {**stored_job, "tasks": alone, "consistency": {}, "runtime": {"chunk_steps": 10}}
    space = changed(
        SPACE,
        search="grid",
        scheduler={"name": "asha", "reduction_factor": 2},
        max_concurrent=1,  # so that the worse one is judged by the better one
        metrics=["depth/val/rmse"],
        parameters={"tasks.depth.optimizer.lr": {"grid": [1e-2, 1e-6]}},
    )
    write(tmp_path, job=job, space=space)
    console = silent()
    out = tmp_path / "out"
    assert tune(tmp_path / "space.yaml", None, out, None, ["steps=30"], console) == 0

    trials = json.loads((out / "trials.json").read_text(encoding="utf-8"))
    assert [t["status"] for t in trials] == ["finished", "finished", "stopped early"]
    assert [t["step"] for t in trials] == [30, 30, 10]
    assert trials[0]["trial"] == "default"
    assert trials[1]["metrics"]["depth/val/rmse"] > 0
    best = load_job(out / "best.yaml")
    assert best.tasks["depth"].optimizer.lr == 1e-2
    assert best.steps == 30
    assert dict(best.evaluation.data) == {"test": "test"}
    assert best.evaluation.every is None
    assert "with the job's own values" in text_of(console)
    assert (out / "report.html").stat().st_size > 0
    assert isinstance(best, Job)

    end = time.monotonic() + 15  # a trial that was given up gives back what it reserved
    while ray_session.available_resources().get("CPU", 0) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    assert ray_session.available_resources()["CPU"] == 2
