"""The job file: every field of a job, its type, its default and what it means.

A job is YAML. Unknown keys are fatal; ``--set a.b=value`` overrides any dotted path; the
resolved job is saved as ``config.yaml`` in the run folder and is itself a job file. No
environment variable overrides a field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from taskray.errors import InputError
from taskray.job.validation import first_problem, nearest
from taskray.job.yaml_values import assign as assign
from taskray.job.yaml_values import override as override
from taskray.job.yaml_values import read_yaml as read_yaml

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]
"""Names become folders and parts of the names of metrics (``loop.metric_key``)."""


class Settings(BaseModel):
    """Base of all sections: unknown keys are fatal, docstrings are the reference.

    A validator that concerns several keys raises InputError with the key at fault.
    """

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )


class Plugin(Settings):
    """A name (built-in, or ``package.module:Name``) and the arguments of that class."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)

    name: str
    """A built-in name or an import path."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys besides ``name``."""
        return dict(self.model_extra or {})


class LabelsConfig(Settings):
    """Which rows of a dataset keep which of their labels; the others become invalid.

    The split depends on the number of rows and on these keys alone, so all runs with the same keys
    have the same split. A run writes it to ``labels/<dataset>.json`` in its folder. A task reads
    only rows that keep one of its labels; a head has no loss in a batch without one of its labels.
    """

    columns: Annotated[list[str], Field(min_length=1)] | None = None
    """The labels that are split, as quantities: ``[depth, segmentation]``. Each is kept or lost at
    all frames of a row; other labels are kept."""
    protocol: Literal["full", "onelabel", "randomlabels"] = "full"
    """The labels of a labelled row. ``full``: all of ``columns``. ``onelabel``: exactly one.
    ``randomlabels``: a random part of them, at least one and not all (MTPSL, Li et al. 2022).
    Every part is drawn equally often, up to one row."""
    fraction: Fraction = 1.0
    """The fraction of rows that are labelled. The rows of a smaller fraction are among those of a
    larger one; which label a row keeps may differ."""
    seed: NonNegative = 0
    """Seed of the draw."""
    file: str | None = None
    """A split to read instead of drawing one, in the form that a run writes."""

    @model_validator(mode="after")
    def _file_or_columns(self) -> LabelsConfig:
        if (self.file is None) == (self.columns is None):
            raise ValueError("expected either 'columns' or 'file'")
        if self.file is not None and (more := self.model_fields_set - {"file"}):
            raise ValueError(f"'file' has the whole split, got {min(more)!r} as well")
        twice = [c for c in self.columns or [] if (self.columns or []).count(c) > 1]
        if twice:
            raise ValueError(f"duplicate column {twice[0]!r}")
        if self.protocol == "randomlabels" and len(self.columns or []) < 2:
            raise ValueError("randomlabels needs at least two columns")
        return self


class DataConfig(Settings):
    """One dataset: its reader and how it is loaded."""

    reader: Plugin
    """A built-in reader (``plugins.BUILTIN``) or an import path, with its arguments."""
    materialize: Literal["auto", "always", "never"] = "auto"
    """Keep the decoded dataset in memory (``auto``: up to ``materialize_bytes``)."""
    materialize_bytes: Positive = 1 << 30
    """The decoded size in bytes up to which ``auto`` keeps the dataset in memory."""
    max_corrupt_rows: NonNegative = 10
    """The number of unreadable rows that are skipped and counted; more are an error."""
    limit: Positive | None = None
    """Use only the first ``limit`` rows; null: all."""
    labels: LabelsConfig | None = None
    """Which rows keep which of their labels; null: all keep all."""


class OptimizerConfig(Settings):
    """One task's optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimizer."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Factors on the rate of parts of what the task learns, by the beginning of the names of their
    weights: ``{encoder: 0.1}``, ``{decoder.depth: 2}``, ``{weighting: 10}``, ``{relation: 2}``.
    The longest beginning counts; with 0 a part stays as it is."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of Adam's averages of the gradient and of its square."""
    momentum: Decay = 0.9
    """Momentum of ``sgd``."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the rate falls from its peak to ``final_fraction`` of the peak over the task's steps."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises linearly from 0."""
    final_fraction: Fraction = 0.01
    """The rate at the last step as a fraction of the peak."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null for no clipping."""


class AugmentConfig(Settings):
    """Augmentation of a task's input in training: colours, noise and ``flip``."""

    brightness: Annotated[float, Field(ge=0)] = 0.0
    """Image values are multiplied by a factor from [1 - b, 1 + b]."""
    contrast: Annotated[float, Field(ge=0)] = 0.0
    """Contrast factor from [1 - c, 1 + c]."""
    saturation: Annotated[float, Field(ge=0)] = 0.0
    """Saturation factor from [1 - s, 1 + s]."""
    hue: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Colours are rotated about the grey axis by an angle from [-180 h, 180 h] degrees."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of added Gaussian noise (image values are in [0, 1])."""
    flip: bool = False
    """Mirror labelled samples left to right with probability 0.5 (never mediator batches)."""


class RelationConfig(Settings):
    """One consistency loss between quantities."""

    relation: Plugin
    """A built-in relation (``plugins.BUILTIN``) or an import path, with its arguments."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss; 0 switches the relation off."""
    start_step: NonNegative = 0
    """The first step of the consuming task with this loss."""
    warmup_steps: NonNegative = 0
    """Steps, from ``start_step``, over which the weight rises linearly from 0."""


class InnerRelationConfig(RelationConfig):
    """One relation inside a task: between its own predictions, on its labelled batches."""

    blend_into: str | None = None
    """A head of the task: its loss becomes ``(1 - w) loss + w relation``, w the weight (XTasC-Net,
    eq. 11). null: the weighted relation is a loss of its own, with the relation's name."""


class TaskConfig(Settings):
    """One vision task: its quantities, its network, its labels and its training."""

    task: Plugin
    """A built-in task (``plugins.BUILTIN``) or an import path, with its arguments."""
    model: Plugin = Plugin(name="unet")
    """The network and its arguments."""
    dedicated: str | dict[Name, str] | None = None
    """The dedicated dataset: the task's own labelled data (a key of ``data``). For a task with
    several heads it may be a mapping, head -> dataset: a supervised step then takes a batch of each
    dataset, and a head that is not named learns from consistency alone. null: no labels, the task
    learns from consistency alone."""
    batch_size: Positive = 8
    """Labelled samples in a step."""
    checkpoint: str | None = None
    """Initial weights: the folder of a checkpoint (``RUN/checkpoints/depth/step_100``) or of a
    run, whose latest checkpoint of the task of this name is used, or of another task
    (``RUN#other``); null: random weights. A resumed run continues from its own checkpoints."""
    frozen: bool = False
    """Predict for the peers and never take a step, with the weights of ``checkpoint``. Labels are
    not used. Its predictions are always fresh."""
    steps: Positive | None = None
    """Training steps of this task; null: the job's ``steps``."""
    consistency_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on every consistency loss of this task, because supervised losses differ in scale.
    With 0 the task learns from its labels alone, and still predicts for its peers."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of this task's input."""
    relations: dict[Name, InnerRelationConfig] = {}
    """The relations between this task's own predictions on its labelled batches, by name; part of
    every step on labels. Those between tasks are under ``consistency``."""
    weighting: Plugin = Plugin(name="sum")
    """How the losses of one step become one gradient: a built-in weighting (``plugins.BUILTIN``)
    or an import path, with its arguments. It combines the losses of the task's heads; those of
    relations have their own weights and are added."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network's forward and backward pass (bfloat16: autocast)."""
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    """Memory layout of images and weights."""
    compile: bool = False
    """Run the network through ``torch.compile``."""
    seed: NonNegative | None = None
    """Seed of initial weights and shuffling; null: derived from the job's seed and the name."""
    threads: Positive | None = None
    """CPU threads of this task; null: the machine's cores divided evenly among the tasks."""
    cpus: Annotated[float, Field(ge=0)] | None = None
    """CPUs reserved in Ray; null: one for each task if one more is left for data, else none."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs reserved in Ray; above 0 the task trains on CUDA."""

    @model_validator(mode="before")
    @classmethod
    def _arguments_of_the_default_model(cls, value: Any) -> Any:
        model = value.get("model") if isinstance(value, dict) else None
        if isinstance(model, dict) and "name" not in model:
            return {**value, "model": {"name": "unet", **model}}
        return value


class MediatorConfig(Settings):
    """The mediator: the shared unlabelled proxy dataset of the consistency losses."""

    data: str
    """Name of the dataset (a key of ``data``); its labels are never read."""
    batch_size: Positive = 8
    """Samples in each numbered batch."""
    window: Positive | Literal["all"] = "all"
    """Batches that all tasks pass over again and again before they move on; bounds staleness: a
    prediction that is used is at most one pass of its producer old."""
    visits: Positive = 2
    """Passes that every task makes over a window before all move on; a fast task makes more beside
    a slow one."""
    shuffle: bool = False
    """Shuffle the order of batches in a window at each pass, the same way for all tasks."""
    supervised_steps: NonNegative = 1
    """Supervised steps in each round of the alternation."""
    consistency_steps: NonNegative = 1
    """Consistency steps in each round of the alternation."""
    with_labels: bool = False
    """A consistency step of a task with labels takes a labelled batch as well, in the same update:
    the collective then makes as many steps on labels as each task alone, and a consistency step
    costs twice the time. false: the paper's alternation."""

    def has_turn(self, step: int) -> bool:
        """Whether ``step`` is a consistency step of the alternation."""
        return step % (self.supervised_steps + self.consistency_steps) >= self.supervised_steps

    def steps_per_visit(self, labelled: bool) -> float:
        """Training steps for one visit of the mediator; a task without labels spends them all."""
        if not labelled or self.consistency_steps == 0:
            return 1.0
        return (self.supervised_steps + self.consistency_steps) / self.consistency_steps


class StalenessConfig(Settings):
    """The bound on the age of a peer's prediction. A prediction beyond it is never used."""

    max_steps: NonNegative | None = None
    """Maximum age in steps of the producer; null: no bound."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Maximum age in seconds; null: no bound."""
    on_stale: Literal["skip", "wait", "forward_server"] = "skip"
    """Beyond the bound: do without it (a task with labels makes a supervised step instead, one
    without labels skips the step), wait for a fresh one, or ask the peer's forward server."""
    wait_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Time limit of ``wait``, and of a task without labels that waits for a peer's first
    prediction on a batch; after it the task goes on as with ``skip``."""

    @property
    def synchronous(self) -> bool:
        """Whether all tasks make the same mediator visits at the same time, give or take
        ``max_steps``."""
        return self.on_stale == "wait" and self.max_steps is not None


class CacheConfig(Settings):
    """The prediction cache."""

    max_bytes: Positive = 1 << 30
    """Byte budget; beyond it the oldest predictions are evicted."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of published predictions. float16 rounds depth by up to 1/2000: normals computed from
    it change by 0.2 degrees at 64x96, but by 1 to 2 degrees at 480x640."""


class ForwardServerConfig(Settings):
    """Stale copies of the models that predict on demand (the paper's Figure 4)."""

    refresh_every: Positive = 20
    """Steps of the trainer between two refreshes of its copy."""
    reuse: bool = True
    """Take a batch that the same copy has predicted from the cache (the paper predicts again)."""


class EvaluationConfig(Settings):
    """Evaluation on data that no training step has seen."""

    data: dict[Name, str] = {}
    """Title of each evaluation -> name of the dataset (``{real_test: ...}``); the first is the
    main one, whose values are under ``metrics`` in ``result.json``."""
    batch_size: Positive = 16
    """Samples in a batch."""
    energy: str | None = None
    """Title of the evaluation on held-out data of the training domain: also measure the consistency
    energy of every quantity that a relation gives a second time, standardised there, and its
    correlation with the error (``relations.energy``). null: do not."""
    every: Positive | None = None
    """Also evaluate every ``every`` steps, for curves, at the end of the chunk
    (``runtime.chunk_steps``) that contains the step; null: only at the end."""


class CheckpointConfig(Settings):
    """Where and how often each task writes its checkpoint."""

    every: Positive = 100
    """Steps between two checkpoints of a task, written at the end of the chunk
    (``runtime.chunk_steps``) that contains the step."""
    keep: Positive = 2
    """Checkpoints kept for each task."""
    path: str | None = None
    """Folder or URI of any pyarrow filesystem; null: ``checkpoints`` in the run folder."""


class RuntimeConfig(Settings):
    """How the collective runs on Ray."""

    chunk_steps: Positive = 25
    """Steps in each call of the driver to a task: the delay before a stop or a failure is seen."""
    max_restarts: NonNegative = 3
    """Restarts of a task from its checkpoint after its process is lost; one more fails it."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What the error of a task does that has not made its first step, because its network, loss or
    data cannot work: end the run with that error, or let the other tasks train on. They train on
    in any case after an error in a later step."""
    publisher: Literal["trainer", "forward_server"] = "trainer"
    """What fills the cache: each trainer with its own forward pass, or a stale copy on demand."""
    address: str | None = None
    """Address of a Ray cluster; null: a local Ray, started for the run."""
    peer_timeout: Annotated[float, Field(gt=0)] = 0.5
    """Seconds that a training step waits for a look-up; then the look-up counts as a miss, and no
    further step waits until the cache answers again."""


class Job(Settings):
    """One collective run."""

    name: Name
    """Name of the run; also of its folder."""
    description: str = ""
    """One line for reports."""
    seed: NonNegative = 0
    """Seed of everything that has no other seed."""
    steps: Positive = 1000
    """Training steps of each task that sets no ``steps``."""
    data: dict[Name, DataConfig]
    """The datasets, by name."""
    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    """The tasks, by name."""
    mediator: MediatorConfig | None = None
    """The shared unlabelled dataset; null: each task trains alone."""
    consistency: dict[Name, RelationConfig] = {}
    """The relations between tasks, by name."""
    staleness: StalenessConfig = StalenessConfig()
    """The bound on the age of a peer's prediction."""
    cache: CacheConfig = CacheConfig()
    """The prediction cache."""
    forward_server: ForwardServerConfig = ForwardServerConfig()
    """The forward servers, if they are used."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    runtime: RuntimeConfig = RuntimeConfig()
    """The collective on Ray."""

    @model_validator(mode="after")
    def _names_exist(self) -> Job:
        def known(where: str, name: str | None) -> None:
            if name is not None and name not in self.data:
                hint = nearest(name, list(self.data))
                raise InputError(where, f"no dataset {name!r} under 'data'; {hint}")

        refuse_one_folder(self.tasks, "tasks")
        for task_name, task in self.tasks.items():
            if isinstance(task.dedicated, dict):
                for head, dataset in task.dedicated.items():
                    known(f"tasks.{task_name}.dedicated.{head}", dataset)
            else:
                known(f"tasks.{task_name}.dedicated", task.dedicated)
        if self.mediator:
            known("mediator.data", self.mediator.data)
            if self.mediator.supervised_steps + self.mediator.consistency_steps == 0:
                raise InputError(
                    "mediator",
                    "supervised_steps and consistency_steps are both 0, expected one above 0",
                )
        for title, name in self.evaluation.data.items():
            known(f"evaluation.data.{title}", name)
        energy, titles = self.evaluation.energy, list(self.evaluation.data)
        if energy is not None and energy not in titles:
            raise InputError(
                "evaluation.energy", f"no evaluation {energy!r}; {nearest(energy, titles)}"
            )
        for task_name, task in self.tasks.items():
            if task.frozen and task.checkpoint is None:
                raise InputError(f"tasks.{task_name}.frozen", "a frozen task needs a 'checkpoint'")
            if not task.dedicated and not self.mediator and not task.frozen:
                raise InputError(
                    f"tasks.{task_name}.dedicated", "a task without labels needs a mediator"
                )
            self._check_inner_relations(task_name, task)
        return self

    def _check_inner_relations(self, task_name: str, task: TaskConfig) -> None:
        for name, relation in task.relations.items():
            key = f"tasks.{task_name}.relations.{name}"
            if not task.dedicated:
                raise InputError(key, "got a task without labelled batches, expected 'dedicated'")
            if name in self.consistency:
                raise InputError(key, f"duplicate name {name!r}: it is under 'consistency', too")
            if relation.blend_into is not None and relation.weight > 1:
                raise InputError(
                    f"{key}.weight",
                    f"got {relation.weight:g}, expected at most 1 with 'blend_into'",
                )

    @model_validator(mode="after")
    def _waiting_has_an_end(self) -> Job:
        if self.staleness.on_stale == "wait" and self.runtime.publisher == "forward_server":
            raise InputError(
                "staleness.on_stale",
                "'wait' waits for predictions of trainers, and with runtime.publisher "
                "'forward_server' trainers publish nothing; expected 'skip' or 'forward_server'",
            )
        return self

    def steps_of(self, task: str) -> int:
        """Training steps of a task; 0 if it is frozen."""
        return 0 if self.tasks[task].frozen else self.tasks[task].steps or self.steps

    def labels_of(self, task: str) -> tuple[str, ...]:
        """The labelled datasets that a task trains on; none if it is frozen."""
        config = self.tasks[task]
        if config.frozen or not config.dedicated:
            return ()
        by_head = config.dedicated
        return (by_head,) if isinstance(by_head, str) else tuple(dict.fromkeys(by_head.values()))

    @property
    def frozen(self) -> frozenset[str]:
        """The tasks that predict and do not train."""
        return frozenset(name for name, task in self.tasks.items() if task.frozen)

    @property
    def active_relations(self) -> dict[str, RelationConfig]:
        """The relations of weight above 0; empty without consistency steps."""
        on = self.mediator is not None and self.mediator.consistency_steps > 0
        return {n: r for n, r in self.consistency.items() if on and r.weight > 0}

    @property
    def uses_forward_servers(self) -> bool:
        """Whether a task's predictions may come from a forward server."""
        return bool(self.active_relations) and (
            self.runtime.publisher == "forward_server"
            or self.staleness.on_stale == "forward_server"
        )


KINDS = {"job": "tasks", "study": "variants", "space": "parameters"}
"""The kinds of files that are given to commands, and a key that only this kind has."""
COMMANDS = {"job": "taskray train", "study": "taskray study", "space": "taskray tune"}
ENTRIES = {"data": "reader", "tasks": "task", "consistency": "relation"}
"""Sections of names whose entries are sections, and the key that each entry needs."""


def refuse_one_folder(names: Iterable[str], where: str) -> None:
    """Refuse (InputError) names that differ by case alone: on some filesystems they are one
    folder."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(f"{where}.{name}", f"differs from {other!r} by case alone")


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply ``a.b=value`` overrides, and check every field.

    Raises InputError with the file and the key.
    """
    values = read_kind(path, "job")
    return parse_changed(values, override(values, overrides), str(path))


def read_kind(path: str | Path, kind: Literal["job", "study", "space"]) -> dict[str, Any]:
    """The plain values of a job, study or space file; InputError if it is of another kind."""
    values = read_yaml(path)
    others = {key: found for found, key in KINDS.items() if key in values}
    if others and KINDS[kind] not in values:
        found = next(iter(others.values()))
        raise InputError(
            str(path),
            f"is a {found} file, expected a {kind} file; use it with: {COMMANDS[found]} {path}",
        )
    return values


def parse_changed(before: Mapping[str, Any], values: dict[str, Any], source: str) -> Job:
    """As :func:`parse_job`, for the values of a job file that were changed by dotted paths. A path
    below a dataset, task or relation that the file does not contain is usually misspelt."""
    for section, needed in ENTRIES.items():
        known, entries = before.get(section), values.get(section)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            names = list(known) if isinstance(known, dict) else []
            if name not in names and isinstance(entry, dict) and needed not in entry:
                raise InputError(
                    f"{source}: {section}.{name}",
                    f"is not in the job file, and a new one needs {needed!r}; "
                    f"{nearest(name, names)}",
                )
    return parse_job(values, source)


def parse_job(values: dict[str, Any], source: str) -> Job:
    """Check a job given as plain values; ``source`` comes before the key in errors."""
    job: Job = parse(Job, values, source)
    return job


def parse(model: type[Any], values: dict[str, Any], source: str) -> Any:
    """Check ``values`` against a settings class; InputError with ``source`` and the key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        key, text = first_problem(error, model)
    except InputError as error:  # from one of our validators
        key, text = error.key, error.text
    raise InputError(": ".join(filter(None, (source, key))), text)


def dump_yaml(settings: BaseModel) -> str:
    """The settings as YAML that loads again to the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
