"""The names of metrics: one type for each kind of name, which builds it and is parsed from it.

In the ``values`` of a task's report, and so in ``metrics.jsonl`` and TensorBoard::

    loss/supervised                          SupervisedLoss()
    loss/<term>                              SupervisedLoss(term)
    loss/consistency                         ConsistencyLoss()
    loss/consistency/<relation>              ConsistencyLoss(relation)
    loss/consistency/<relation>/<term>       ConsistencyLoss(relation, term)
    eval/<title>/<metric>                    Evaluated(title, metric)
    staleness/<peer>/<figure>                Staleness(peer, figure)
    hit_rate/<peer>                          HitRate(peer)
    grad_norm, lr, steps_per_second ...      Plain(name)

In the tables of studies and searches::

    <task>/<title>/<metric>                  TaskMetric(task, title, metric)
    */<title>/<metric>                       of the one task that measures it (ANY_TASK), so that
                                             separate tasks and one with several heads share columns

``str(key)`` is the name, ``parse(name)`` the key. Names of tasks, relations and evaluations
contain no ``/`` (``job.config.Name``); a term or a metric may (``iou/<class>``).
"""

from __future__ import annotations

from dataclasses import dataclass

GRAD_NORM = "grad_norm"
LR = "lr"
STEPS_PER_SECOND = "steps_per_second"
DATA_WAIT_FRACTION = "data_wait_fraction"
SKIPPED_CONSISTENCY_STEPS = "skipped_consistency_steps"
REPLACED_BY_SUPERVISED = "replaced_by_supervised"
PUBLISHES_DROPPED = "publishes_dropped"

ANY_TASK = "*"
"""As the task of a :class:`TaskMetric`: the task that measures it."""

RESERVED = ("supervised", "consistency")
"""No term of a task's loss has such a name: the sums have them."""


@dataclass(frozen=True)
class SupervisedLoss:
    """One term of a task's supervised loss; None: the sum of all terms.

    Raises ValueError for a term whose name is reserved.
    """

    term: str | None = None

    def __post_init__(self) -> None:
        if self.term is not None and self.term.partition("/")[0] in RESERVED:
            raise ValueError(f"loss term {self.term!r}: the name is reserved, expected another")

    def __str__(self) -> str:
        return f"loss/{self.term or 'supervised'}"


@dataclass(frozen=True)
class ConsistencyLoss:
    """One term of a relation's loss, or (term None) the sum of its terms, both without the
    relation's weight; relation None: the weighted sum over all relations."""

    relation: str | None = None
    term: str | None = None

    def __str__(self) -> str:
        return "/".join(["loss/consistency", *filter(None, (self.relation, self.term))])


@dataclass(frozen=True)
class Evaluated:
    """A metric on the evaluation ``title``."""

    title: str
    metric: str

    def __str__(self) -> str:
        return f"eval/{self.title}/{self.metric}"


@dataclass(frozen=True)
class Staleness:
    """How old the used predictions of a peer were: ``steps_mean``, ``steps_max`` or
    ``seconds_mean``."""

    peer: str
    figure: str

    def __str__(self) -> str:
        return f"staleness/{self.peer}/{self.figure}"


@dataclass(frozen=True)
class HitRate:
    """The fraction of look-ups of a peer that found a prediction."""

    peer: str

    def __str__(self) -> str:
        return f"hit_rate/{self.peer}"


@dataclass(frozen=True)
class Plain:
    """A name without parts."""

    name: str

    def __str__(self) -> str:
        return self.name


MetricKey = SupervisedLoss | ConsistencyLoss | Evaluated | Staleness | HitRate | Plain


def parse(name: str) -> MetricKey:
    """The key of a name in a report. A name of no other kind is ``Plain``."""
    kind, _, rest = name.partition("/")
    first, _, others = rest.partition("/")
    match kind:
        case "loss" if rest == "supervised":
            return SupervisedLoss()
        case "loss" if rest == "consistency":
            return ConsistencyLoss()
        case "loss" if first == "consistency":
            relation, slash, term = others.partition("/")
            if relation and (term or not slash):
                return ConsistencyLoss(relation, term or None)
        case "loss" if rest and first not in RESERVED:
            return SupervisedLoss(rest)
        case "eval" if first and others:
            return Evaluated(first, others)
        case "staleness" if first and others:
            return Staleness(first, others)
        case "hit_rate" if rest:
            return HitRate(rest)
    return Plain(name)


@dataclass(frozen=True)
class TaskMetric:
    """A metric of one task on the evaluation ``title``: a column of a study, a search's aim."""

    task: str
    title: str
    metric: str

    def __str__(self) -> str:
        return f"{self.task}/{self.title}/{self.metric}"

    @property
    def reported(self) -> Evaluated:
        """The key in the task's own reports."""
        return Evaluated(self.title, self.metric)

    @classmethod
    def parse(cls, name: str) -> TaskMetric | None:
        """The key of ``<task>/<title>/<metric>``; None for a name of fewer parts."""
        parts = name.split("/", 2)
        return cls(*parts) if len(parts) == 3 and all(parts) else None


def metric_of(name: str) -> str:
    """The metric at the end of a name of any kind: ``abs_rel``, ``iou/<class>``."""
    *path, last = name.split("/")
    return f"iou/{last}" if path and path[-1] == "iou" else last


def edge_name(consumer: str, producer: str) -> str:
    """An edge of the exchange, as in the ``staleness`` of ``result.json``: ``depth<-normals``."""
    return f"{consumer}<-{producer}"
