"""The study file and the space file: every field, its default and its meaning.

Both are YAML files that change a job file. Unknown keys are errors, and every change is applied to
the job before the first run, so that a wrong one is found at once.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from taskray.errors import InputError, one_line
from taskray.files import read_text
from taskray.job import plugins
from taskray.job.config import (
    NonNegative,
    Positive,
    Settings,
    parse,
    read_kind,
    read_yaml,
    refuse_one_folder,
)
from taskray.record.formatting import describe

Changes = dict[str, Any]
"""Dotted path of the job -> value."""

OF_EACH_RUN = {
    "seed": "the study sets it: change 'seeds' or give --seeds",
    "name": "the study sets it: to the variant and the seed",
}
"""Fields of the job that the study sets for each run, and the error for setting them."""


class VariantConfig(Settings):
    """One row of a study's table: how it differs from the other rows."""

    label: str | None = None
    """Its name in the table; null: the name of the variant."""
    description: str = ""
    """One line, printed below the table."""
    set: Changes = Field(default_factory=dict)
    """Its changes of the job; they win over the study's ``set`` and over ``--set``. ``${other}`` in
    a value is the run folder of the variant ``other`` with the same seed, which then runs first:
    ``tasks.depth.checkpoint: ${other}``. null removes a dataset, task, relation or evaluation:
    ``tasks.depth: null``."""


class PaperConfig(Settings):
    """The values of a paper, shown beside ours."""

    title: str
    """Name of the paper's columns."""
    rows: dict[str, dict[str, float]]
    """Variant -> metric -> value, in our units: ratios are fractions in [0, 1]."""
    note: str = ""
    """What a reader must know to compare them: the paper's data and models."""


class GainConfig(Settings):
    """The multi-task gain over one of the variants, as a column ``delta_m``."""

    baseline: str
    """The variant to compare with: its mean over seeds."""
    metrics: Annotated[list[str], Field(min_length=1)]
    """The metrics that are averaged (at least one for each task); see ``gain.delta_m``."""
    higher_is_better: dict[str, bool] = Field(default_factory=dict)
    """The direction of metrics that taskray does not know, such as those of your own tasks."""

    def directions(self) -> dict[str, bool | None]:
        """Whether a higher value of each metric is better; None if unknown."""
        given = self.higher_is_better
        return {m: given.get(m, describe(m).higher_is_better) for m in self.metrics}


class StudyConfig(Settings):
    """A table as a set of runs: variants x seeds of one job."""

    name: str
    """Name of the study; also of its folder."""
    title: str = ""
    """Heading of the table; empty: the name."""
    description: str = ""
    """The question that the study answers."""
    job: str
    """The job file, relative to the study file."""
    seeds: Positive | Annotated[list[NonNegative], Field(min_length=1)] = 3
    """The seeds of every variant, or their number (then 0, 1, ...)."""
    set: Changes = Field(default_factory=dict)
    """Changes of the job for all variants."""
    variants: Annotated[dict[str, VariantConfig], Field(min_length=1)]
    """The rows, by name."""
    rows: str | None = None
    """A folder, relative to the study file, each file of which is one more variant, named as the
    file: ``NAME.yaml`` with the keys of a variant, or ``NAME.py``, a module with the same as a
    literal dict, ``VARIANT = {...}``, which may name a class of its own by import path."""
    metrics: Annotated[list[str], Field(min_length=1)]
    """The columns: ``<task>/<evaluation>/<metric>``, or a path of the result file such as
    ``seconds``, ``depth/steps_per_second`` or ``staleness/depth<-normals/steps_mean``."""
    delta_m: GainConfig | None = None
    """The multi-task gain of the other variants over one variant; null: no such column."""
    paper: PaperConfig | None = None
    """The values of a paper, beside ours."""
    max_concurrent: Positive | None = None
    """Runs at the same time; null: as many as leave one core to each task."""

    @property
    def columns(self) -> list[str]:
        """The metrics that the table shows."""
        return [*self.metrics, *(["delta_m"] if self.delta_m else [])]

    @model_validator(mode="after")
    def _names_exist(self) -> StudyConfig:
        refuse_one_folder(self.variants, "variants")
        changes = {
            "set": self.set,
            **{f"variants.{n}.set": v.set for n, v in self.variants.items()},
        }
        for where, paths in changes.items():
            for path in OF_EACH_RUN.keys() & paths.keys():
                raise InputError(f"{where}.{path}", OF_EACH_RUN[path])
        if self.delta_m and self.delta_m.baseline not in self.variants:
            hint = plugins.nearest(self.delta_m.baseline, list(self.variants))
            raise InputError("delta_m.baseline", f"no such variant; {hint}")
        for variant, row in (self.paper.rows if self.paper else {}).items():
            if variant not in self.variants:
                hint = plugins.nearest(variant, list(self.variants))
                raise InputError(f"paper.rows.{variant}", f"no such variant; {hint}")
            for metric in row:
                if metric not in self.columns:
                    hint = plugins.nearest(metric, self.columns)
                    raise InputError(f"paper.rows.{variant}.{metric}", f"not in 'metrics'; {hint}")
        seeds = self.seeds
        if isinstance(seeds, list) and len({*seeds}) < len(seeds):
            twice = next(s for s in seeds if seeds.count(s) > 1)
            raise InputError("seeds", f"duplicate seed {twice}")
        return self

    def seed_list(self, count: int | None = None) -> list[int]:
        """The first ``count`` seeds, continued upwards if there are fewer; None: all of them."""
        seeds = list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)
        if count is None:
            return seeds
        above = range(max(seeds) + 1, max(seeds) + 1 + count)
        return [*seeds, *above][:count]


class ParameterConfig(Settings):
    """The values of one searched field; exactly one key."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these values, with equal probability."""
    grid: Annotated[list[Any], Field(min_length=1)] | None = None
    """Every one of these (``search: grid`` or ``random``)."""
    uniform: tuple[float, float] | None = None
    """A number between two bounds."""
    log_uniform: tuple[float, float] | None = None
    """A number between two positive bounds, uniform in its logarithm."""

    @model_validator(mode="after")
    def _one_kind(self) -> ParameterConfig:
        kinds = [n for n in type(self).model_fields if getattr(self, n) is not None]
        if len(kinds) != 1:
            raise ValueError("expected exactly one of choice, grid, uniform, log_uniform")
        low, high = self.uniform or self.log_uniform or (1.0, 2.0)
        if low >= high or (self.log_uniform and low <= 0):
            raise ValueError(f"{kinds[0]}: expected two bounds, [lower, higher]")
        return self

    @property
    def examples(self) -> list[Any]:
        """The values, or the two bounds."""
        return [*(self.choice or self.grid or self.uniform or self.log_uniform or ())]


class SchedulerConfig(Settings):
    """Which trials are stopped before their last step."""

    name: Literal["none", "asha"] = "none"
    """``none``: none. ``asha``: at step ``grace_steps`` and at each ``reduction_factor`` times the
    step before, only the best 1/``reduction_factor`` of the trials continue (Li et al. 2020);
    needs ``evaluation.every``."""
    grace_steps: Positive | None = None
    """No trial is stopped before this step; null: ``evaluation.every``."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """One of this many trials continues."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class SpaceConfig(Settings):
    """A search: which fields of a job vary, and the metric to optimize."""

    name: str
    """Name of the search; also of its folder."""
    description: str = ""
    """The question that the search answers."""
    job: str
    """The job file, relative to the space file."""
    metric: str
    """``<task>/<evaluation>/<metric>``, measured on a *validation* split."""
    mode: Literal["min", "max"] | None = None
    """Whether the metric is minimized or maximized; null: the metric's known direction."""
    metrics: list[str] = Field(default_factory=list)
    """Further metrics in the table of trials."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How points are chosen: at random, every point of a grid, or by Optuna's TPE."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Which trials are stopped early."""
    num_samples: Positive = 8
    """Number of trials, besides the one of the job's own values; a grid ignores it."""
    max_concurrent: Positive | None = None
    """Trials at the same time; null: as many as leave one core to each task."""
    seed: NonNegative = 0
    """Seed of the search; the trials use the job's seed."""
    set: Changes = Field(default_factory=dict)
    """Changes of the job for the search only, such as its evaluation; not in ``best.yaml``."""
    parameters: Annotated[dict[str, ParameterConfig], Field(min_length=1)]
    """The searched fields: dotted path of the job -> values."""

    @model_validator(mode="after")
    def _kinds_fit_the_search(self) -> SpaceConfig:
        for path, parameter in self.parameters.items():
            if self.search == "grid" and not (parameter.grid or parameter.choice):
                raise InputError(
                    f"parameters.{path}", "expected 'grid' or 'choice' for a grid search"
                )
            if self.search == "optuna" and parameter.grid:
                raise InputError(f"parameters.{path}", "got 'grid', expected 'choice' for optuna")
        return self


def load_study(path: Path) -> StudyConfig:
    """Read a study file. Raises InputError for a wrong one."""
    values = read_kind(path, "study")
    folder = values.get("rows")
    if isinstance(folder, str) and isinstance(values.get("variants"), dict):
        rows = read_rows(path.parent / folder)
        for name in rows.keys() & values["variants"].keys():
            raise InputError(
                f"{path}: variants.{name}", f"is also a file in {path.parent / folder}"
            )
        # they are variants from here on: the study that a run folder keeps is complete without them
        values = {**values, "variants": {**values["variants"], **rows}, "rows": None}
    config: StudyConfig = parse(StudyConfig, values, str(path))
    return config


def read_rows(folder: Path) -> dict[str, Any]:
    """The variants in the files of a folder, by name, in the order of their names. InputError for
    a folder without one, and for a file that contains none."""
    files = [f for f in sorted(folder.glob("[!_.]*")) if f.suffix in (".yaml", ".py")]
    if not files:
        raise InputError(str(folder), "no row (*.yaml or *.py) in this folder")
    rows: dict[str, Any] = {}
    for file in files:
        values = read_yaml(file) if file.suffix == ".yaml" else _variant_in(file)
        parse(VariantConfig, values, str(file))  # an error names the file
        if file.stem in rows:
            raise InputError(str(file), "another file in this folder has the same name")
        rows[file.stem] = values
    return rows


def _variant_in(file: Path) -> dict[str, Any]:
    """The dict ``VARIANT`` of a module, read without running the module."""
    text = read_text(file)
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANT":
                values = ast.literal_eval(node.value)
                if isinstance(values, dict):
                    return values
    except (SyntaxError, ValueError) as error:
        raise InputError(str(file), one_line(error)) from None
    raise InputError(str(file), "expected VARIANT = {...}, a dict of literals")


def load_space(path: Path) -> SpaceConfig:
    """Read a space file. Raises InputError for a wrong one."""
    config: SpaceConfig = parse(SpaceConfig, read_kind(path, "space"), str(path))
    return config
