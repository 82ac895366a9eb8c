"""The job file: every field of a job, its type, its default and what it means.

A job is YAML. Unknown keys are fatal; ``--set a.b=value`` overrides any dotted path; the
resolved job is saved as ``config.yaml`` in the run folder and is itself a job file. No
environment variable overrides a field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
"""Names become folders, and parts of the names of metrics."""


class Settings(BaseModel):
    """Base of all sections: unknown keys are fatal, docstrings are the reference."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )


class Plugin(Settings):
    """A name (built-in, or ``package.module:Name``) and the arguments of what it names."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)

    name: str
    """A built-in name or an import path."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataConfig(Settings):
    """One dataset: where it comes from and how it reaches a task."""

    reader: Plugin
    """A built-in reader (``plugins.BUILTIN``) or an import path, with its arguments."""
    materialize: Literal["auto", "always", "never"] = "auto"
    """Hold the decoded dataset in the object store (``auto``: when below ``materialize_bytes``)."""
    materialize_bytes: Positive = 1 << 30
    """The decoded size in bytes up to which ``auto`` materialises."""
    max_corrupt_rows: NonNegative = 10
    """How many unreadable rows are skipped and counted before it is an error."""
    limit: Positive | None = None
    """Use only the first so many rows."""


class OptimizerConfig(Settings):
    """One task's optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimizer."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's averages."""
    momentum: Decay = 0.9
    """Momentum of ``sgd``."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the rate falls from its peak to ``final_fraction`` of it over the task's steps."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises linearly from 0."""
    final_fraction: Fraction = 0.01
    """The rate at the last step as a fraction of the peak."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null for no clipping."""


class AugmentConfig(Settings):
    """Changes of a task's own input, in training only: of its colours, and ``flip``."""

    brightness: Annotated[float, Field(ge=0)] = 0.0
    """Image values are multiplied by a factor from [1 - b, 1 + b]."""
    contrast: Annotated[float, Field(ge=0)] = 0.0
    """Contrast factor from [1 - c, 1 + c]."""
    saturation: Annotated[float, Field(ge=0)] = 0.0
    """Saturation factor from [1 - s, 1 + s]."""
    hue: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Colours are turned about the grey axis by an angle from [-180 h, 180 h] degrees."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of added Gaussian noise (image values lie in [0, 1])."""
    flip: bool = False
    """Mirror labelled samples left to right, half of the time (never mediator batches)."""


class TaskConfig(Settings):
    """One vision task: what it predicts, with which network, from which labels, how it trains."""

    task: Plugin
    """A built-in task (``plugins.BUILTIN``) or an import path, with its arguments."""
    model: Plugin = Plugin(name="unet")
    """The network and its arguments."""
    dedicated: str | None = None
    """Name of the labelled dataset (a key of ``data``); null: no labels, consistency alone."""
    batch_size: Positive = 8
    """Labelled samples a step."""
    checkpoint: str | None = None
    """Initial weights: the folder of a checkpoint (``RUN/checkpoints/depth/step_100``) or a run,
    of which the latest checkpoint of the task of this name is taken, or that of another
    (``RUN#other``); null: random ones. A run that is resumed goes on from its own."""
    frozen: bool = False
    """Predict for the peers and never take a step: a ``checkpoint`` gives the weights, and the
    labels are left alone. Its predictions are always fresh."""
    steps: Positive | None = None
    """Training steps of this task; null: the job's ``steps``."""
    consistency_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on every consistency loss in this task: supervised losses differ in scale. With 0 it
    learns from its labels alone, and goes on predicting for its peers."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of this task's input."""
    weighting: Plugin = Plugin(name="sum")
    """How the losses of one step become one gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network's forward and backward pass (bfloat16: autocast)."""
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    """Memory layout of images and weights."""
    compile: bool = False
    """Run the network through ``torch.compile``."""
    seed: NonNegative | None = None
    """Seed of initial weights and shuffling; null: derived from the job's seed and the name."""
    threads: Positive | None = None
    """CPU threads of this task; null: the machine's cores shared evenly among the tasks."""
    cpus: Annotated[float, Field(ge=0)] | None = None
    """CPUs reserved in Ray; null: one each where that leaves one for data, else none."""
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
    """The mediator: the shared unlabelled dataset on which tasks are tied to each other."""

    data: str
    """Name of the dataset (a key of ``data``); labels in it are never read."""
    batch_size: Positive = 8
    """Samples in each numbered batch."""
    window: Positive | Literal["all"] = "all"
    """Pass over so many batches again and again before moving on; this bounds staleness: a
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

    def has_turn(self, step: int) -> bool:
        """Whether the alternation gives a step to the mediator."""
        return step % (self.supervised_steps + self.consistency_steps) >= self.supervised_steps

    def steps_per_visit(self, labelled: bool) -> float:
        """Training steps for one visit of the mediator; a task without labels spends them all."""
        if not labelled or self.consistency_steps == 0:
            return 1.0
        return (self.supervised_steps + self.consistency_steps) / self.consistency_steps


class RelationConfig(Settings):
    """One consistency loss between quantities."""

    relation: Plugin
    """A built-in relation (``plugins.BUILTIN``) or an import path, with its arguments."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss; 0 switches the relation off."""
    start_step: NonNegative = 0
    """No consistency before this step of the consuming task."""
    warmup_steps: NonNegative = 0
    """Steps, from ``start_step``, over which the weight rises linearly from 0."""


class StalenessConfig(Settings):
    """How old a peer's prediction may be. One beyond the bound is never used silently."""

    max_steps: NonNegative | None = None
    """At most so many steps of its producer ago; null: any age."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """At most so many seconds ago; null: any age."""
    on_stale: Literal["skip", "wait", "forward_server"] = "skip"
    """Beyond the bound: skip the step, wait for a fresh one, or ask the peer's forward server."""
    wait_seconds: Annotated[float, Field(gt=0)] = 60.0
    """``wait`` gives up after this time, and the step is skipped and counted. So does a task
    without labels that waits for a peer's first prediction on a batch."""

    @property
    def synchronous(self) -> bool:
        """Whether all tasks make the same mediator visits at the same time, give or take
        ``max_steps``."""
        return self.on_stale == "wait" and self.max_steps is not None


class CacheConfig(Settings):
    """The prediction cache."""

    max_bytes: Positive = 1 << 30
    """Byte budget; the oldest predictions are evicted beyond it."""
    dtype: Literal["float16", "float32"] = "float16"
    """How predictions travel and are kept. float16 rounds depth by up to a part in 2000: normals
    computed from it turn by 0.2 degrees at 64x96, but by 1 to 2 at 480x640."""


class ForwardServerConfig(Settings):
    """Stale copies of the models that predict on demand (the paper's Figure 4)."""

    refresh_every: Positive = 20
    """Steps of the trainer between two refreshes of its copy."""
    reuse: bool = True
    """Serve a batch already predicted by the same copy from the cache (the paper asks anew)."""


class EvaluationConfig(Settings):
    """What is measured on data that no training step has seen."""

    data: dict[Name, str] = {}
    """Title of each evaluation -> name of the dataset (``{real_test: ...}``); the first is the
    main one, whose values stand in ``result.json`` under ``metrics``."""
    batch_size: Positive = 16
    """Samples a batch."""
    every: Positive | None = None
    """Also evaluate every so many steps, for curves, at the end of the chunk
    (``runtime.chunk_steps``) in which they are done; null: at the end only."""


class CheckpointConfig(Settings):
    """Where and how often each task writes its checkpoint."""

    every: Positive = 100
    """Steps between two checkpoints of a task, written at the end of the chunk
    (``runtime.chunk_steps``) in which they are done."""
    keep: Positive = 2
    """How many of each task are kept."""
    path: str | None = None
    """Folder or URI of any pyarrow filesystem; null: ``checkpoints`` in the run folder."""


class RuntimeConfig(Settings):
    """How the collective runs on Ray."""

    chunk_steps: Positive = 25
    """Steps in each call of the driver to a task: how soon a stop or a failure is noticed."""
    max_restarts: NonNegative = 3
    """How often a task whose process is lost is started again from its checkpoint."""
    publisher: Literal["trainer", "forward_server"] = "trainer"
    """Who fills the cache: each trainer with its own forward pass, or a stale copy on demand."""
    address: str | None = None
    """A Ray cluster's address; null: a Ray of our own on this machine."""
    peer_timeout: Annotated[float, Field(gt=0)] = 0.5
    """Seconds a training step waits for a look-up that is late; then it counts as a miss, and
    no further step waits until the cache answers again."""


class Job(Settings):
    """One collective run."""

    name: Name
    """Name of the run; also of its folder."""
    description: str = ""
    """One line for people."""
    seed: NonNegative = 0
    """Seed of everything that has none of its own."""
    steps: Positive = 1000
    """Training steps of each task that names none of its own."""
    data: dict[Name, DataConfig]
    """The datasets, by name."""
    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    """The tasks, by name."""
    mediator: MediatorConfig | None = None
    """The shared unlabelled dataset; null: each task trains alone."""
    consistency: dict[Name, RelationConfig] = {}
    """The relations that tie tasks together, by name."""
    staleness: StalenessConfig = StalenessConfig()
    """How old a peer's prediction may be."""
    cache: CacheConfig = CacheConfig()
    """The prediction cache."""
    forward_server: ForwardServerConfig = ForwardServerConfig()
    """The forward servers, where they are used."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    runtime: RuntimeConfig = RuntimeConfig()
    """How it runs on Ray."""

    @model_validator(mode="after")
    def _names_exist(self) -> Job:
        def known(where: str, name: str | None) -> None:
            if name is not None and name not in self.data:
                hint = nearest(name, list(self.data))
                raise ValueError(f"@{where}@no dataset {name!r} under 'data'; {hint}")

        refuse_one_folder(self.tasks, "tasks")
        for task_name, task in self.tasks.items():
            known(f"tasks.{task_name}.dedicated", task.dedicated)
        if self.mediator:
            known("mediator.data", self.mediator.data)
            if self.mediator.supervised_steps + self.mediator.consistency_steps == 0:
                raise ValueError("@mediator@supervised_steps and consistency_steps are both 0")
        for title, name in self.evaluation.data.items():
            known(f"evaluation.data.{title}", name)
        for task_name, task in self.tasks.items():
            if task.frozen and task.checkpoint is None:
                raise ValueError(f"@tasks.{task_name}.frozen@a frozen task needs a 'checkpoint'")
            if task.dedicated is None and not self.mediator and not task.frozen:
                raise ValueError(
                    f"@tasks.{task_name}.dedicated@a task without labels needs a mediator"
                )
        return self

    @model_validator(mode="after")
    def _waiting_has_an_end(self) -> Job:
        if self.staleness.on_stale == "wait" and self.runtime.publisher == "forward_server":
            raise ValueError(
                "@staleness.on_stale@'wait' waits for what trainers publish, and with "
                "runtime.publisher 'forward_server' they publish nothing"
            )
        return self

    def steps_of(self, task: str) -> int:
        """Training steps of a task; none where it is frozen."""
        return 0 if self.tasks[task].frozen else self.tasks[task].steps or self.steps

    def labels_of(self, task: str) -> str | None:
        """The labelled dataset that a task trains on; none where it is frozen."""
        return None if self.tasks[task].frozen else self.tasks[task].dedicated

    @property
    def frozen(self) -> frozenset[str]:
        """The tasks that predict and do not train."""
        return frozenset(name for name, task in self.tasks.items() if task.frozen)

    @property
    def active_relations(self) -> dict[str, RelationConfig]:
        """The relations that act: none without a mediator, none of weight 0."""
        on = self.mediator is not None and self.mediator.consistency_steps > 0
        return {n: r for n, r in self.consistency.items() if on and r.weight > 0}

    @property
    def uses_forward_servers(self) -> bool:
        return bool(self.active_relations) and (
            self.runtime.publisher == "forward_server"
            or self.staleness.on_stale == "forward_server"
        )


def refuse_one_folder(names: Iterable[str], where: str) -> None:
    """Names that differ by case alone are one folder on some file systems: ValueError, as our
    validators raise it."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"@{where}.{name}@differs from {other!r} by case alone")


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply ``a.b=value`` overrides, and check every field.

    Raises InputError with one line that names the file, the key and what was expected.
    """
    values = read_yaml(path)
    for key, command in (("variants", "study"), ("parameters", "tune")):
        if key in values and "tasks" not in values:
            raise InputError(f"{path}: not a job; it is for: taskray {command} {path}")
    return parse_job(override(values, overrides), str(path))


def parse_job(values: dict[str, Any], source: str) -> Job:
    """Check a job given as plain values; ``source`` is named in errors."""
    job: Job = parse(Job, values, source)
    return job


def parse(model: type[Any], values: dict[str, Any], source: str) -> Any:
    """Check ``values`` against a settings class, with one-line errors."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {first_problem(error, model)}") from None


def dump_yaml(settings: BaseModel) -> str:
    """The settings as YAML that loads again to the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
