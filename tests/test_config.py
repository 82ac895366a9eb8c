"""The job file: what is refused, in which words, and what it means."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from collectives import tiny_job
from pydantic import BaseModel

from taskray.errors import InputError
from taskray.job import config
from taskray.job.config import dump_yaml, load_job, parse_job
from taskray.job.yaml_values import override, read_yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A good job file."""
    file = tmp_path / "job.yaml"
    file.write_text(dump_yaml(tiny_job()))
    return file


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        # unknown keys, at any depth, and the nearest known one
        ("stepps=3", "stepps: unknown key; did you mean 'steps'?"),
        ("tasks.depth.optimiser.lr=1", "tasks.depth.optimiser: unknown key; did you mean 'opt"),
        ("tasks.depth.optimizer.lrr=1", "tasks.depth.optimizer.lrr: unknown key; did you mean 'lr"),
        ("mediator.windw=3", "mediator.windw: unknown key; did you mean 'window'?"),
        ("cache.zzzzz=3", "cache.zzzzz: unknown key; known: dtype, max_bytes"),
        ("data.test.redaer=world", "data.test.redaer: unknown key; did you mean 'reader'?"),
        # a key of another section: that section
        (
            "tasks.depth.lr=1",
            "tasks.depth.lr: unknown key; did you mean 'tasks.depth.optimizer.lr'",
        ),
        ("lr=1", "lr: unknown key; did you mean 'tasks.<name>.optimizer.lr'?"),
        ("tasks.depth.window=3", "tasks.depth.window: unknown key; did you mean 'mediator.window'"),
        # an entry that the file does not contain
        (
            "tasks.depht.optimizer.lr=1",
            "tasks.depht: is not in the job file, and a new one needs "
            "'task'; did you mean 'depth'?",
        ),
        (
            "data.labeled.limit=3",
            "data.labeled: is not in the job file, and a new one needs 'reade",
        ),
        # wrong types
        ("steps=1.5", "steps: got 1.5, expected a whole number"),
        ("tasks.depth.batch_size=many", "tasks.depth.batch_size: got 'many', expected a whole"),
        ("tasks.depth.optimizer.lr=fast", "tasks.depth.optimizer.lr: got 'fast', expected a num"),
        ("tasks.depth=3", "tasks.depth: got 3, expected a section of keys"),
        ("tasks=[depth]", "tasks: got ['depth'], expected a section of keys"),
        ("evaluation.data=test", "evaluation.data: got 'test', expected a section of keys"),
        ("mediator.window=x", "mediator.window: got 'x', expected a whole number or 'all'"),
        ("tasks.depth.optimizer.betas=3", "tasks.depth.optimizer.betas: got 3, expected a list"),
        ("name=", "name: got null, expected text"),
        # impossible values
        ("steps=0", "steps: got 0, expected at least 1"),
        ("mediator.window=0", "mediator.window: got 0, expected at least 1 or 'all'"),
        ("tasks.depth.optimizer.lr=-1", "tasks.depth.optimizer.lr: got -1, expected more than 0"),
        ("tasks.depth.optimizer.lr=.nan", "tasks.depth.optimizer.lr: got nan, expected a finite"),
        ("tasks.depth.optimizer.betas=[0, 2]", "betas.1: got 2, expected less than 1"),
        ("tasks.depth.cpus=-1", "tasks.depth.cpus: got -1, expected at least 0"),
        ("tasks.depth.precision=fp8", "got 'fp8', expected 'float32' or 'bfloat16'"),
        ("tasks.depth.seed=-1", "tasks.depth.seed: got -1, expected at least 0"),
        ("name=" + 101 * "a", "aaa..., expected at most 100 characters"),
        ("tasks={}", "tasks: got {}, expected at least 1 of them"),
        ("name=a/b", "name: got 'a/b', expected a name of letters, digits, '_', '-' and '.'"),
        ("tasks.a/b={task: depth}", "tasks.a/b: got 'a/b', expected a name of letters"),
        # what does not go together
        ("mediator.data=nothing", "mediator.data: no dataset 'nothing' under 'data'; known: label"),
        ("evaluation.data.x=tset", "evaluation.data.x: no dataset 'tset' under 'data'; did you me"),
        ("tasks.depth.dedicated=labeled", "did you mean 'labelled'?"),
        ("mediator={data: unlabelled, supervised_steps: 0, consistency_steps: 0}", "mediator: "),
    ],
)
def test_a_wrong_value_is_told_in_one_line_that_names_file_key_and_expectation(
    job, setting, problem
):
    with pytest.raises(InputError) as error:
        load_job(job, [setting])
    text = str(error.value)
    assert text.startswith(f"{job}: ")
    assert problem in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("steps", "expected dotted.path=value"),
        ("=3", "expected dotted.path=value"),
        ("a..b=3", "expected dotted.path=value"),
        ("steps=[1", "the value is not valid YAML"),
        ("name='a' #b", "the value is not valid YAML"),
        ("tasks.depth.optimizer.betas=[0, 0] #b", "the value is not valid YAML"),
        ("name=a: b #c", "the value is not valid YAML"),
        ("tasks.depht=null", "there is no 'tasks.depht' to remove; did you mean 'depth'?"),
        ("steps=2020-13-45", "the value is not valid YAML"),
        ("steps=0b_", "the value is not valid YAML"),
        ("steps=" + 2000 * "[", "the value is not valid YAML"),
        ("steps.more=3", "'more' is under a value, expected a section"),
        ("tasks.depth.optimizer.betas.0=0.5", "'0' is under a value, expected a section"),
    ],
)
def test_a_malformed_override_is_named(job, setting, problem):
    with pytest.raises(InputError) as error:
        load_job(job, [setting])
    assert str(error.value) == f"--set {setting!r}: {problem}"


def test_overrides_reach_below_what_is_null_and_below_short_forms(job):
    found = load_job(
        job,
        [
            "mediator=null", "mediator.data=unlabelled", "mediator.window=all",
            "tasks.depth.model=unet", "tasks.depth.model.base=16",
            "tasks.depth.optimizer.lr=1e-4", "tasks.depth.task.max_depth=2e1",
        ],
    )  # fmt: skip
    assert found.mediator is not None
    assert found.mediator.window == "all"
    assert found.tasks["depth"].model.arguments == {"base": 16}
    assert found.tasks["depth"].optimizer.lr == 1e-4
    assert found.tasks["depth"].task.arguments == {"max_depth": 20.0}


def test_words_that_look_like_special_numbers_stay_words():
    assert override({}, ["a=nan", "b=infinity", "c=1e3"]) == {"a": "nan", "b": "infinity", "c": 1e3}


@pytest.mark.parametrize("text", ["rooms #2", "#2", "~/a #1/b", "&a b", "5 #", "a:#b"])
def test_plain_text_on_the_command_line_is_taken_whole(text):
    assert override({}, [f"path={text}"]) == {"path": text}


def test_keys_are_text_as_written(tmp_path):
    values = read_yaml_text(tmp_path, "on: 1\noff: yes\n0.10: {null: 2, 1: 3}\n2020-01-01: 4\n")
    assert values == {"on": 1, "off": True, "0.10": {"null": 2, "1": 3}, "2020-01-01": 4}
    assert override({}, ["a={no: 1}"]) == {"a": {"no": 1}}


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("study", "tasks: {}", "is a job file, expected a study file; use it with: taskray train"),
        ("space", "tasks: {}", "is a job file, expected a space file; use it with: taskray train"),
        (
            "job",
            "parameters: {}",
            "is a space file, expected a job file; use it with: taskray tune",
        ),
        (
            "space",
            "variants: {}",
            "is a study file, expected a space file; use it with: taskray st",
        ),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_command(tmp_path, kind, content, expected):
    (tmp_path / "file.yaml").write_text(content)
    with pytest.raises(InputError) as error:
        config.read_kind(tmp_path / "file.yaml", kind)
    assert str(error.value).startswith(f"{tmp_path / 'file.yaml'}: {expected}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: [1, 2", "line 1: malformed YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2", "line 2: malformed YAML: found character '\\t'"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: malformed YAML: duplicate key 'c'"),
        ("", "got nothing, expected a mapping of keys"),
        ("- a\n- b\n", "got list, expected a mapping of keys"),
        ("a: !!python/object:os.system {}", "line 1: malformed YAML: could not determine a const"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("a: 1\nb: 2020-13-45", "line 2: malformed YAML: invalid timestamp '2020-13-45'"),
        ("a: 0b_", "line 1: malformed YAML: invalid int '0b_'"),
        ("a: !!int x", "line 1: malformed YAML: invalid int 'x'"),
        ("a: !!float ''", "line 1: malformed YAML: invalid float ''"),
        ("a: !!bool x", "line 1: malformed YAML: invalid bool 'x'"),
        ("a: !!timestamp x", "line 1: malformed YAML: invalid timestamp 'x'"),
        ("a: !!map x", "line 1: malformed YAML: expected a mapping node"),
        (2000 * "[", "malformed YAML: nested too deeply"),
    ],
)
def test_malformed_yaml_is_named_with_its_line(tmp_path, content, problem):
    file = tmp_path / "job.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read_yaml(file)
    assert str(error.value).startswith(f"{file}: {problem}")


def test_a_file_that_is_not_there_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder, expected a YAML file"):
        read_yaml(tmp_path)


def test_the_resolved_job_is_itself_a_job_file(tmp_path):
    job = tiny_job("tasks.depth.augment.noise=0.1", "staleness.max_steps=0")
    (tmp_path / "config.yaml").write_text(dump_yaml(job))
    assert load_job(tmp_path / "config.yaml") == job


def test_a_shared_key_of_yaml_may_be_overridden(tmp_path):
    values = read_yaml_text(tmp_path, "base: &b {lr: 1e-2, name: sgd}\nmine: {<<: *b, lr: 1}\n")
    assert values["mine"] == {"lr": 1, "name": "sgd"}
    assert values["base"]["lr"] == 0.01


def test_a_merged_mapping_may_itself_be_merged(tmp_path):
    text = "a: &a {lr: 1, steps: 8}\nb:\n  c: &c {<<: *a, steps: 16}\nset: {<<: *c, keep: 1}\n"
    values = read_yaml_text(tmp_path, text)
    assert values["set"] == {"lr": 1, "steps": 16, "keep": 1}


def read_yaml_text(folder: Path, text: str) -> dict:
    (folder / "values.yaml").write_text(text)
    return read_yaml(folder / "values.yaml")


def sections() -> list[type[BaseModel]]:
    classes = [c for _, c in inspect.getmembers(config, inspect.isclass)]
    return [c for c in classes if issubclass(c, config.Settings)]


@pytest.mark.parametrize("section", sections(), ids=lambda c: c.__name__)
def test_every_field_says_what_it_means(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name}"


def test_a_task_without_labels_needs_a_mediator():
    with pytest.raises(InputError, match=r"tasks\.depth\.dedicated: a task without labels"):
        tiny_job("tasks.depth.dedicated=null", "mediator=null")


def test_nobody_waits_for_trainers_that_publish_nothing():
    with pytest.raises(
        InputError, match=r"staleness\.on_stale: 'wait' waits for predictions of trainers"
    ):
        tiny_job("staleness.on_stale=wait", "runtime.publisher=forward_server")


def test_values_need_no_file():
    with pytest.raises(InputError, match=r"^here: data: required, but not given$"):
        parse_job({"name": "x", "tasks": {"a": {"task": "depth"}}}, "here")
