"""Weights that are on this machine (a file, or a folder with one; never a download), and the
normalisation of the input that comes with them."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from taskray.errors import InputError, one_line

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Mean and deviation of each colour that most networks trained on ImageNet expect."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Files of weights: safetensors, or a state dict that torch has written."""
COUNTER = "num_batches_tracked"
"""A counter of BatchNorm that is no weight, and that some files leave out."""


def load_weights(network: nn.Module, source: str, key: str) -> None:
    """Load all weights of ``network`` from a file, or from the one file of weights in a folder.

    The file may be of a larger network that contains this one: further weights are left out, and
    so is what precedes the names of these (``encoder.``, ``module.`` ...). Raises InputError
    (``key``) for a missing path, an unreadable file, and the weights of another network.
    """
    stored = read_weights(weights_file(source, key), key)
    wanted = {n: w for n, w in network.state_dict().items() if not n.endswith(COUNTER)}
    longest = max(wanted, key=len)
    prefix = min((n.removesuffix(longest) for n in stored if n.endswith(longest)), default="")
    found = {name: stored[prefix + name] for name in wanted if prefix + name in stored}
    wrong = [n for n, w in wanted.items() if n not in found or found[n].shape != w.shape]
    if wrong:
        raise InputError(
            key,
            f"got {source}, expected the weights of this network: {len(wrong)} of its "
            f"{len(wanted)} are missing or have another shape, for example {wrong[0]}",
        )
    network.load_state_dict(found, strict=False)


def weights_file(source: str, key: str) -> Path:
    """The file itself, or the one file of weights in a folder, the first kind of ``SUFFIXES`` that
    it contains; InputError (``key``) otherwise."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    by_kind = [sorted(path.glob("*" + suffix)) for suffix in SUFFIXES] if path.is_dir() else []
    files: list[Path] = next(filter(None, by_kind), [])
    if len(files) != 1:
        found = f"a folder with {len(files)} of them" if path.is_dir() else "which does not exist"
        raise InputError(
            key, f"got {source}, {found}, expected one file of weights ({', '.join(SUFFIXES)})"
        )
    return files[0]


def read_weights(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file by name; of a torch file also those in its ``state_dict`` or
    ``model``. Only tensors and plain values are unpickled."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise InputError(key, f"cannot read the weights in {file}: {one_line(error)}") from None
    for inner in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict):
        raise InputError(
            key, f"got {file}, which contains {type(content).__name__}, expected a state dict"
        )
    return {n: value for n, value in content.items() if isinstance(value, Tensor)}


def freeze_statistics(network: nn.Module) -> None:
    """Make BatchNorm layers use their stored statistics in training, too."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


class Standardize(nn.Module):
    """``(image - mean) / std`` with the statistics that a stored model was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std
