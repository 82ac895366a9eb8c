"""Relative paths of a job, made absolute for processes that start in another folder."""

from __future__ import annotations

import os
from pathlib import Path

from taskray.job.config import Job, parse_job
from taskray.runtime import submission


def with_paths_for_workers(job: Job) -> Job:
    """The job with paths that are valid in Ray's workers.

    Workers start in the current folder if this process started Ray, or if ``taskray submit``
    sent the folder with the job. Workers of any other cluster need absolute paths.
    """
    same_folder = job.runtime.address is None or submission.folder_travelled()
    return job if same_folder else absolute_paths(job)


def absolute_paths(job: Job) -> Job:
    """The job with absolute paths in place of relative ones, for initial checkpoints and for the
    arguments of readers, tasks, models and relations.

    A text is a path if that file or folder exists in the current folder; other texts, such as
    URIs, stay as they are. A bare word is a path only under the key ``path``: under any other key
    it is a name, even if a folder has the same name.
    """

    def absolute(path: str) -> str:
        place = os.path.expanduser(path)
        return str(Path(place).absolute()) if os.path.exists(place) else path

    values = job.model_dump(mode="json")
    for task in values["tasks"].values():
        place, mark, other = (task["checkpoint"] or "").partition("#")
        task["checkpoint"] = f"{absolute(place)}{mark}{other}" if place else None
    for data in values["data"].values():
        if (data["labels"] or {}).get("file"):
            data["labels"]["file"] = absolute(data["labels"]["file"])
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
