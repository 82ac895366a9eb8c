"""Checkpoints on any pyarrow filesystem.

    checkpoints/<task>/step_<n>/model.safetensors   the weights
                                state.pt            everything else; loads with weights_only=True
                                manifest.json       written last: sizes of the files
    checkpoints/config.yaml                         the job

A folder whose manifest is missing or disagrees with its files is not a checkpoint: loading falls
back to the one before it. A crash at any moment leaves the previous checkpoint untouched. On a
disk a checkpoint is written atomically. Object stores cannot rename a folder: there the manifest,
written last, is what makes a checkpoint of the files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights
from torch import Tensor, nn

from taskray.errors import InputError, naming_system_errors, one_line
from taskray.files import atomic_write, remove_temporaries
from taskray.job.config import read_yaml
from taskray.loop.learned import Learned, of_network

MODEL, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
JOB = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """The weights and the state of one task, read from a checkpoint."""

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
        """As :meth:`save`, from the bytes of :func:`serialize`: training goes on meanwhile."""
        folder = f"{self.root}/{task}/step_{step}"
        files = {MODEL: weights, STATE: state}
        manifest = {"task": task, "step": step, "files": {n: len(b) for n, b in files.items()}}

        def fill(place: str) -> None:
            self.filesystem.create_dir(place, recursive=True)
            for name, content in (*files.items(), (MANIFEST, json.dumps(manifest).encode())):
                self._put(f"{place}/{name}", content)

        if isinstance(self.filesystem, fs.LocalFileSystem):
            remove_temporaries(Path(self.root, task, "step_*"), dead=True)
        self._write(folder, fill)
        for old in self.steps(task)[: -self.keep]:
            self._delete(f"{self.root}/{task}/step_{old}")
        return folder

    def _write(self, path: str, fill: Callable[[str], None]) -> None:
        """Let ``fill`` make a file or folder at ``path``; atomically if the filesystem can."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            atomic_write(Path(path), lambda temporary: fill(str(temporary)))
        else:
            self._delete(path)  # the same step, saved again
            fill(path)

    def _put(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(path) as out:
            out.write(content)

    def write_job(self, text: str) -> None:
        """Write the job whose checkpoints these are, for a run whose folder is elsewhere.
        InputError if the location cannot be written."""
        try:
            self.filesystem.create_dir(self.root, recursive=True)
            self._write(f"{self.root}/{JOB}", lambda place: self._put(place, text.encode()))
        except OSError as error:
            raise InputError(
                "checkpoint.path", f"cannot write to {self.root}: {one_line(error)}"
            ) from None

    def read_job(self) -> str | None:
        """The text of :meth:`write_job`; None if it was never written."""
        if not _is_file(self.filesystem, f"{self.root}/{JOB}"):
            return None
        return _read(self.filesystem, f"{self.root}/{JOB}").decode(errors="replace")

    def steps(self, task: str) -> list[int]:
        """Steps of the complete checkpoints of a task, oldest first."""
        selector = fs.FileSelector(f"{self.root}/{task}", allow_not_found=True)
        with naming_system_errors(f"{self.root}/{task}"):
            found = self.filesystem.get_file_info(selector)
        names = [i.base_name for i in found if i.type == fs.FileType.Directory]
        numbers = [n.removeprefix("step_") for n in names if n.startswith("step_")]
        steps = sorted(int(n) for n in numbers if n.isdigit())
        return [s for s in steps if self._is_complete(f"{self.root}/{task}/step_{s}")]

    def latest(self, task: str) -> Checkpoint | None:
        """The newest checkpoint that can be read; None if the task has no checkpoint.

        Raises InputError if it has some and none can be read.
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
            if info.base_name.removeprefix(".").startswith("step_"):  # a dot: cut off by a crash
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

    Raises InputError if there is no checkpoint, or if it cannot be read.
    """
    place, _, other = location.partition("#")
    filesystem, folder = open_filesystem(place)
    if _is_file(filesystem, f"{folder}/{MANIFEST}"):
        return read_checkpoint(filesystem, folder)
    found = _checkpoints_of_run(place).latest(other or task)
    if found is None:
        raise InputError(
            location, f"expected a checkpoint, or a run with a checkpoint of task {other or task!r}"
        )
    return found


def written_at(location: str, task: str) -> float | None:
    """When the checkpoint that :func:`find_checkpoint` finds was written, in seconds as
    ``time.time``; None if there is no checkpoint."""
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
    """The checkpoints of a run, in its folder or where its ``config.yaml`` puts them."""
    config = Path(folder).expanduser() / "config.yaml"
    kept = read_yaml(config).get("checkpoint") if config.is_file() else None
    elsewhere = kept.get("path") if isinstance(kept, dict) else None
    return CheckpointStore(elsewhere or f"{folder.rstrip('/')}/checkpoints")


def _is_file(filesystem: fs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def open_filesystem(location: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem of a folder or URI, and the path in it; InputError if it cannot be opened."""
    text = str(location)
    try:
        if "://" in text:
            filesystem, path = fs.FileSystem.from_uri(text)
            return filesystem, path.rstrip("/")
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    except (OSError, ValueError, RuntimeError) as error:  # the last: '~' of an unknown user
        raise InputError(text, f"cannot be opened: {one_line(error)}") from None


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
    """Read one checkpoint folder; InputError names the file that is missing or unreadable."""
    try:
        manifest = json.loads(_read(filesystem, f"{folder}/{MANIFEST}"))
        weights = load_weights(_read(filesystem, f"{folder}/{MODEL}"))
        written = io.BytesIO(_read(filesystem, f"{folder}/{STATE}"))
        # to the CPU: this machine may not have the GPU that it was written on
        state = torch.load(written, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise InputError(folder, f"not a checkpoint: {one_line(error)}") from None
    except Exception as error:  # safetensors and torch raise many types for a damaged file
        raise InputError(folder, f"the checkpoint cannot be read: {one_line(error)}") from None
    return Checkpoint(folder, manifest["step"], weights, state)


def load_into(model: nn.Module | Learned, checkpoint: Checkpoint) -> None:
    """Give a model its weights; InputError when they are those of another model. A network alone
    takes its own, and leaves those of relations and a weighting."""
    own, weights = weights_of(model), checkpoint.weights
    if not isinstance(model, Learned):
        weights = of_network(weights)
    for name in sorted(own.keys() ^ weights.keys()):
        side = "lacks" if name in own else "has an unknown"
        raise InputError(
            checkpoint.location, f"from another model: the file {side} weight {name!r}"
        )
    for name, tensor in own.items():
        got = weights[name]
        if got.shape != tensor.shape:
            raise InputError(
                checkpoint.location,
                f"from another model: weight {name!r} has shape {tuple(got.shape)}, "
                f"expected {tuple(tensor.shape)}",
            )
    if isinstance(model, Learned):
        model.load_weights(weights)
    else:
        model.load_state_dict(weights)


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as file:
        content: bytes = file.read()
        return content
