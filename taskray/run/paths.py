"""The paths of a job, as processes that start in another folder need them."""

from __future__ import annotations

import os
from pathlib import Path

from taskray.job.config import Job, parse_job
from taskray.runtime import submission


def with_paths_for_workers(job: Job) -> Job:
    """The job with paths that mean in Ray's workers what they mean here: they start in our folder
    only where we started Ray, or where the folder travelled with the job (``taskray submit``)."""
    travelled = submission.folder_travelled()
    return job if job.runtime.address is None or travelled else absolute_paths(job)


def absolute_paths(job: Job) -> Job:
    """The job with every initial checkpoint, and every argument of a reader, task, model or
    relation that names what is there, seen from the present folder, as an absolute path.

    Whatever else stands there (a URI) is left alone. A bare word is a path only as ``path``:
    elsewhere it is a name, whatever folder is called the same.
    """

    def absolute(path: str) -> str:
        place = os.path.expanduser(path)
        return str(Path(place).absolute()) if os.path.exists(place) else path

    values = job.model_dump(mode="json")
    for task in values["tasks"].values():
        place, mark, other = (task["checkpoint"] or "").partition("#")
        task["checkpoint"] = f"{absolute(place)}{mark}{other}" if place else None
    plugins = [data["reader"] for data in values["data"].values()]
    plugins += [task[kind] for task in values["tasks"].values() for kind in ("task", "model")]
    plugins += [relation["relation"] for relation in values["consistency"].values()]
    for plugin in plugins:
        for key, value in plugin.items():
            is_path = isinstance(value, str) and (
                key == "path" or os.sep in value or bool(Path(value).suffix)
            )
            if key != "name" and is_path:
                plugin[key] = absolute(value)
    return parse_job(values, job.name)
