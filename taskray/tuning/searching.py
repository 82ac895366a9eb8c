"""A space as Ray Tune's objects: domains, search algorithm, scheduler."""

from __future__ import annotations

import math
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from taskray.job.config import Job
from taskray.loop.metric_key import TaskMetric
from taskray.tuning.settings import ParameterConfig, SpaceConfig


def domains(config: SpaceConfig) -> dict[str, Any]:
    """The ``param_space``: dotted path -> domain."""
    return {path: _domain(p, config.search) for path, p in config.parameters.items()}


def _domain(parameter: ParameterConfig, search: str) -> Any:
    if parameter.grid is not None or (search == "grid" and parameter.choice is not None):
        return tune.grid_search(parameter.examples)
    if parameter.choice is not None:
        return tune.choice(parameter.choice)
    if parameter.uniform is not None:
        return tune.uniform(*parameter.uniform)
    assert parameter.log_uniform is not None
    return tune.loguniform(*parameter.log_uniform)


def tune_settings(
    config: SpaceConfig, job: Job, metric: TaskMetric, maximise: bool, at_once: int
) -> dict[str, Any]:
    """The arguments of ``TuneConfig``; the same seed gives the same points."""
    settings: dict[str, Any] = {
        "metric": str(metric),
        "mode": "max" if maximise else "min",
        "num_samples": 1 if config.search == "grid" else config.num_samples,
    }
    if config.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        settings["search_alg"] = OptunaSearch(seed=config.seed)
        settings["max_concurrent_trials"] = at_once
    else:
        settings["search_alg"] = BasicVariantGenerator(
            random_state=config.seed, max_concurrent=at_once
        )
    if config.scheduler.name == "asha":
        last = job.steps_of(metric.task)
        grace = config.scheduler.grace_steps or job.evaluation.every or last
        settings["scheduler"] = ASHAScheduler(
            time_attr="step",
            max_t=last,
            grace_period=min(math.ceil(grace), last),
            reduction_factor=config.scheduler.reduction_factor,
        )
    return settings
