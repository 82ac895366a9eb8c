"""The datasets of a run: converted once, then opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from taskray.data.storage.parquet import columns_of
from taskray.data.storage.source import Handle, open_source
from taskray.data.storage.store import prepare
from taskray.job.config import Job
from taskray.loop.assembly import build_tasks, relations_of
from taskray.loop.wiring import wire
from taskray.report.progress import dataset_progress


def prepare_datasets(job: Job, use_ray: bool, console: Console) -> dict[str, Path]:
    """Convert the job's datasets to Parquet, those not yet in the cache; returns name -> folder."""
    used = {dataset for name in job.tasks for dataset in job.labels_of(name)}
    used |= set(job.evaluation.data.values())
    if job.mediator and job.active_relations:
        used.add(job.mediator.data)
    paths = {}
    for name, config in job.data.items():
        if name in used:
            with dataset_progress(console, name) as progress:
                paths[name] = prepare(config, name=name, use_ray=use_ray, progress=progress)
    return paths


class Opener:
    """Opens the datasets of a job, each with the columns that its tasks need.

    Training waits for the datasets it trains on; those of the evaluations are opened in the
    background meanwhile.
    """

    def __init__(self, job: Job, paths: Mapping[str, Path], use_ray: bool) -> None:
        self.job, self.paths, self.use_ray = job, paths, use_ray
        self.tasks = build_tasks(job)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="open")

    def for_training(self) -> dict[str, Handle]:
        """The dedicated datasets and the mediator, by name."""
        needed = wire(self.job, self.tasks).columns_of_datasets()
        return {name: self._open(name, columns) for name, columns in needed.items()}

    def for_evaluation(self) -> Future[dict[str, Handle]]:
        """The datasets of the evaluations, by title, opened in the background."""
        return self._pool.submit(self._open_evaluations)

    def _open_evaluations(self) -> dict[str, Handle]:
        wanted = {c for task in self.tasks.values() for c in (*task.inputs, *task.labels)}
        if self.job.evaluation.energy is not None:
            for name, task in self.tasks.items():
                related = relations_of(self.job, name, task)
                wanted |= {c for weighted in related for c in weighted.relation.inputs}
        handles: dict[str, Handle] = {}
        for title, name in self.job.evaluation.data.items():
            columns = [c for c in columns_of(self.paths[name]) if c in wanted]
            handles[title] = self._open(name, columns)
        return handles

    def _open(self, name: str, columns: Sequence[str]) -> Handle:
        return open_source(self.job.data[name], self.paths[name], columns, self.use_ray, name=name)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
