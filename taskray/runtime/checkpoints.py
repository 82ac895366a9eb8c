"""Checkpoints on any pyarrow filesystem: on a disk written aside, then renamed.

    checkpoints/<task>/step_<n>/model.safetensors   the weights
                                state.pt            the rest; loads with weights_only=True
                                manifest.json       written last: sizes of the files
    checkpoints/config.yaml                         the job, where they are kept apart from the run

A folder whose manifest is missing or disagrees with its files is not a checkpoint: loading falls
back to the one before it. A crash at any moment leaves the previous checkpoint untouched. Object
stores have no folders to rename: there the manifest alone makes a checkpoint of the files.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.job.config import read_yaml
from taskray.loop.learned import RELATIONS, WEIGHTING, Learned

MODEL, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
JOB = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """One task's weights and everything else, as read back."""

    location: str
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, location: str | Path, keep: int = 2) -> None:
        self.keep = keep
        self.filesystem, self.root = open_filesystem(location)

    def save(
        self, task: str, step: int, model: nn.Module | Learned, state: Mapping[str, Any]
    ) -> str:
        """Write one checkpoint; afterwards the oldest beyond ``keep`` are removed."""
        return self.write(task, step, *serialize(weights_of(model), state))

    def write(self, task: str, step: int, weights: bytes, state: bytes) -> str:
        """As :meth:`save`, from bytes (made while training stood still, written while it runs)."""
        final = f"{self.root}/{task}/step_{step}"
        renames = isinstance(self.filesystem, fs.LocalFileSystem)
        aside = f"{final}.tmp-{os.getpid()}" if renames else final
        self._delete(aside)
        self.filesystem.create_dir(aside, recursive=True)
        files = {MODEL: weights, STATE: state}
        manifest = {"task": task, "step": step, "files": {n: len(b) for n, b in files.items()}}
        for name, content in (*files.items(), (MANIFEST, json.dumps(manifest).encode())):
            with self.filesystem.open_output_stream(f"{aside}/{name}") as out:
                out.write(content)
        if renames:
            self._delete(final)  # the same step, saved again
            self.filesystem.move(aside, final)
        for old in self.steps(task)[: -self.keep]:
            self._delete(f"{self.root}/{task}/step_{old}")
        return final

    def write_job(self, text: str) -> None:
        """Say of which job the checkpoints are, for runs whose folder is elsewhere. InputError
        where nothing can be written there."""
        renames = isinstance(self.filesystem, fs.LocalFileSystem)
        place = f"{self.root}/.{JOB}.{os.getpid()}" if renames else f"{self.root}/{JOB}"
        try:
            self.filesystem.create_dir(self.root, recursive=True)
            with self.filesystem.open_output_stream(place) as out:
                out.write(text.encode())
            if renames:
                self.filesystem.move(place, f"{self.root}/{JOB}")
        except OSError as error:
            raise InputError(f"checkpoint.path: cannot write to {self.root}: {error}") from None

    def read_job(self) -> str | None:
        """What :meth:`write_job` wrote; None where nothing was written."""
        if not _is_file(self.filesystem, f"{self.root}/{JOB}"):
            return None
        return _read(self.filesystem, f"{self.root}/{JOB}").decode(errors="replace")

    def steps(self, task: str) -> list[int]:
        """Steps of the complete checkpoints of a task, oldest first."""
        selector = fs.FileSelector(f"{self.root}/{task}", allow_not_found=True)
        names = [
            i.base_name
            for i in self.filesystem.get_file_info(selector)
            if i.type == fs.FileType.Directory
        ]
        numbers = [n.removeprefix("step_") for n in names if n.startswith("step_")]
        steps = sorted(int(n) for n in numbers if n.isdigit())
        return [s for s in steps if self._is_complete(f"{self.root}/{task}/step_{s}")]

    def latest(self, task: str) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None where the task has none.

        Raises InputError when there are some and none of them can be read.
        """
        damaged: InputError | None = None
        for step in reversed(self.steps(task)):
            try:
                return read_checkpoint(self.filesystem, f"{self.root}/{task}/step_{step}")
            except InputError as error:
                damaged = damaged or error
        if damaged is not None:
            raise damaged
        return None

    def clear(self, task: str) -> None:
        """Remove all checkpoints of a task, complete or not, and nothing else."""
        selector = fs.FileSelector(f"{self.root}/{task}", allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.base_name.startswith("step_"):
                self._delete(info.path)

    def _is_complete(self, folder: str) -> bool:
        try:
            manifest = json.loads(_read(self.filesystem, f"{folder}/{MANIFEST}"))
            infos = self.filesystem.get_file_info([f"{folder}/{n}" for n in manifest["files"]])
        except (OSError, ValueError, KeyError):
            return False
        return [i.size for i in infos] == list(manifest["files"].values())

    def _delete(self, folder: str) -> None:
        if self.filesystem.get_file_info(folder).type == fs.FileType.Directory:
            self.filesystem.delete_dir(folder)


def find_checkpoint(location: str, task: str) -> Checkpoint:
    """The checkpoint that ``tasks.<task>.checkpoint`` names: see ``TaskConfig``.

    Raises InputError where there is none, or it cannot be read.
    """
    place, _, other = location.partition("#")
    filesystem, folder = open_filesystem(place)
    if _is_file(filesystem, f"{folder}/{MANIFEST}"):
        return read_checkpoint(filesystem, folder)
    found = _checkpoints_of_run(place).latest(other or task)
    if found is None:
        raise InputError(
            f"{location}: neither a checkpoint nor a run with one of task {other or task!r}"
        )
    return found


def written_at(location: str, task: str) -> float | None:
    """When the checkpoint that :func:`find_checkpoint` finds was written, in seconds as
    ``time.time``; None where there is none."""
    place, _, other = location.partition("#")
    filesystem, folder = open_filesystem(place)
    if not _is_file(filesystem, f"{folder}/{MANIFEST}"):
        store = _checkpoints_of_run(place)
        steps = store.steps(other or task)
        if not steps:
            return None
        filesystem, folder = store.filesystem, f"{store.root}/{other or task}/step_{steps[-1]}"
    nanoseconds = filesystem.get_file_info(f"{folder}/{MANIFEST}").mtime_ns
    return None if nanoseconds is None else nanoseconds / 1e9


def _checkpoints_of_run(folder: str) -> CheckpointStore:
    """Where a run keeps its checkpoints: its ``config.yaml`` may say so."""
    config = Path(folder).expanduser() / "config.yaml"
    kept = read_yaml(config).get("checkpoint") if config.is_file() else None
    elsewhere = kept.get("path") if isinstance(kept, dict) else None
    return CheckpointStore(elsewhere or f"{folder.rstrip('/')}/checkpoints")


def _is_file(filesystem: fs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def open_filesystem(location: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem and the path in it of a folder or URI; InputError if there is none such."""
    text = str(location)
    try:
        if "://" in text:
            filesystem, path = fs.FileSystem.from_uri(text)
            return filesystem, path.rstrip("/")
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    except (OSError, ValueError, RuntimeError) as error:  # the last: no such user's home
        raise InputError(f"cannot open {text!r}: {error}") from None


def weights_of(model: nn.Module | Learned) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a checkpoint."""
    return model.weights() if isinstance(model, Learned) else dict(model.state_dict())


def serialize(weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Weights and state as the bytes of the two files."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return save_weights(own), buffer.getvalue()


def read_checkpoint(filesystem: fs.FileSystem, folder: str) -> Checkpoint:
    """Read one checkpoint folder; InputError names what is missing or unreadable."""
    try:
        manifest = json.loads(_read(filesystem, f"{folder}/{MANIFEST}"))
        weights = load_weights(_read(filesystem, f"{folder}/{MODEL}"))
        written = io.BytesIO(_read(filesystem, f"{folder}/{STATE}"))
        # to the CPU: the GPU that it was written on may not be here
        state = torch.load(written, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not a checkpoint: {error}") from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: the checkpoint cannot be read: {reason}") from None
    return Checkpoint(folder, manifest["step"], weights, state)


def load_into(model: nn.Module | Learned, checkpoint: Checkpoint) -> None:
    """Give a model its weights; InputError when they are those of another model. A network alone
    takes its own, and leaves those of relations and a weighting."""
    own, weights = weights_of(model), checkpoint.weights
    if not isinstance(model, Learned):
        weights = {k: v for k, v in weights.items() if not k.startswith((RELATIONS, WEIGHTING))}
    for name in sorted(own.keys() ^ weights.keys()):
        side = "lacks" if name in own else "has an unknown"
        raise InputError(
            f"{checkpoint.location}: from another model: the file {side} weight {name!r}"
        )
    for name, tensor in own.items():
        got = weights[name]
        if got.shape != tensor.shape:
            raise InputError(
                f"{checkpoint.location}: from another model: weight {name!r} has shape "
                f"{tuple(got.shape)}, this model has {tuple(tensor.shape)}"
            )
    if isinstance(model, Learned):
        model.load_weights(weights)
    else:
        model.load_state_dict(weights)


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as file:
        content: bytes = file.read()
        return content
