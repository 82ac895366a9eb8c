"""Variants of a study that begin from the checkpoints of other variants.

    variants:
      B: {...}
      C: {set: {tasks.segmentation.frozen: true, tasks.segmentation.checkpoint: ${B}}}

``${B}`` is the folder of the run of variant B with the same seed. So B runs before C, and C runs
again if B has been trained again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskray.errors import InputError
from taskray.job.config import Job
from taskray.job.plugins import nearest
from taskray.tuning.settings import Changes, VariantConfig

REFERENCE = re.compile(r"\$\{([^}]*)\}")


def references(value: Any) -> set[str]:
    """The variants that a value refers to, also in nested values."""
    if isinstance(value, str):
        return set(REFERENCE.findall(value))
    parts = value.values() if isinstance(value, Mapping) else value
    return set().union(*map(references, parts)) if isinstance(value, (Mapping, list)) else set()


def resolved(value: Any, folders: Mapping[str, Path]) -> Any:
    """The value with each reference replaced by the folder of its run."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: str(folders[match[1]]), value)
    if isinstance(value, Mapping):
        return {key: resolved(part, folders) for key, part in value.items()}
    return [resolved(part, folders) for part in value] if isinstance(value, list) else value


def in_waves(variants: Mapping[str, VariantConfig], source: str) -> list[list[str]]:
    """The variants in waves, each variant in a later wave than those it refers to.

    Raises InputError for a reference to an unknown variant, and for circular references.
    """
    needs = {name: references(variant.set) for name, variant in variants.items()}
    for name, needed in needs.items():
        for other in sorted(needed - variants.keys()):
            hint = nearest(other, list(variants))
            raise InputError(f"{source}: variants.{name}", f"${{{other}}}: no such variant; {hint}")
    waves: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(variants):
        wave = [name for name in variants if name not in done and needs[name] <= done]
        if not wave:
            left = ", ".join(name for name in variants if name not in done)
            raise InputError(f"{source}: variants", f"circular references: {left}")
        waves.append(wave)
        done.update(wave)
    return waves


def changes_of(variant: VariantConfig, folders: Mapping[str, Path]) -> Changes:
    """The changes of a variant, with its references resolved."""
    changes: Changes = resolved(variant.set, folders)
    return changes


def check_references(jobs: Mapping[str, Job], folders: Mapping[str, Path], source: str) -> None:
    """Raise InputError for a task that begins from a variant without that task, and for references
    outside a variant's ``set``."""
    names = {str(folder): name for name, folder in folders.items()}
    for name, job in jobs.items():
        for task, config in job.tasks.items():
            for reference in references(config.checkpoint):
                raise InputError(
                    f"{source}: variants.{name}: tasks.{task}.checkpoint",
                    f"got '${{{reference}}}', which is only valid in a variant's own 'set'",
                )
    for name, job in jobs.items():
        for task, config in job.tasks.items():
            place, _, other = (config.checkpoint or "").partition("#")
            if place in names and (other or task) not in jobs[names[place]].tasks:
                raise InputError(
                    f"{source}: variants.{name}: tasks.{task}.checkpoint",
                    f"variant {names[place]!r} has no task {other or task!r}",
                )
