"""How a class of torchjd becomes a weighting: its arguments as a job writes them, and its state."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.weighting.weighting import Weighting

PerHead = dict[str, float]
"""An argument that is a vector in torchjd: a number for each head."""
VECTORS = {Tensor: PerHead, Tensor | None: PerHead, float | Tensor: float}
"""What a job writes for an argument of these types. PCD's vector has a number for each head but
the first, and a number for all of them does."""
COUNTS = ("shape", "n_tasks")
"""Arguments that are the number of heads."""
NOT_FROM_A_JOB = ("projector", "f")
"""Arguments that are objects: they keep their defaults."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "CAGrad": {"c": 0.4},
    "COSMOS": {"weights": None},
    "PBI": {"weights": None, "theta": 5.0},
}
"""Defaults that torchjd lacks: of the papers, and equal weights (None)."""
EQUAL = "weights"
"""The argument of which None means 1 / n for each head."""
NOT_KEPT = "step"
"""Attribute of NashMTL: from 0 on it builds its problem, which a checkpoint cannot hold, so a
resumed one has to begin there again. All else that it keeps is restored."""
ON_CPU = ("_phi_t", "_sq_norm_ema", "_n_steps")
"""Tensors of GradVac and PCD, which compute on the CPU for a matrix on any device."""


def borrowed(module: str, name: str, wrap: Callable[..., Weighting]) -> Callable[..., Weighting]:
    """A function that makes a weighting from the class ``name`` of a module of torchjd.

    Its signature is that of the class, but with :data:`PerHead` for a vector, without the number
    of heads, and with ``heads``. AttributeError where the module has no such class.

    Args:
        module: ``torchjd.scalarization`` or ``torchjd.aggregation``.
        name: of the class.
        wrap: makes the weighting of the heads and a function that makes the object for some heads.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    cls = getattr(importlib.import_module(module), name)
    hints, is_scalarizer = get_type_hints(cls.__init__), module.endswith("scalarization")
    given = DEFAULTS.get(name, {})
    parameters = [inspect.Parameter("heads", inspect.Parameter.KEYWORD_ONLY)]
    for parameter in list(inspect.signature(cls).parameters.values()):
        if parameter.name in (*COUNTS, *NOT_FROM_A_JOB):
            continue
        default = given.get(parameter.name, parameter.default)
        hint = VECTORS.get(hints[parameter.name], hints[parameter.name])
        parameters.append(
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=hint | None if default is None else hint,
            )
        )

    def build(*, heads: Sequence[str], **arguments: Any) -> Weighting:
        of_class = {p.name: p.default for p in parameters if p.default is not p.empty} | arguments
        made = partial(make, f"{module}:{name}", of_class)
        if len(heads) > 1:  # torchjd checks some arguments only when it is called
            call_once(
                made(heads), torch.ones(len(heads)) if is_scalarizer else torch.eye(len(heads))
            )
        return wrap(heads, made)

    build.__doc__ = cls.__doc__
    build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    build.__annotations__ = {p.name: p.annotation for p in parameters[1:]}
    return build


def make(path: str, arguments: Mapping[str, Any], heads: Sequence[str]) -> nn.Module:
    """The object of torchjd for some heads; of an argument by head their values are taken."""
    module, _, name = path.partition(":")
    cls = getattr(importlib.import_module(module), name)
    own = dict(arguments)
    for argument, value in own.items():
        if isinstance(value, dict):
            own[argument] = _vector(argument, value, heads)
        elif argument == EQUAL and value is None and name in DEFAULTS:
            own[argument] = torch.full((len(heads),), 1 / len(heads))
    counts = {c: len(heads) for c in COUNTS if c in inspect.signature(cls).parameters}
    built: nn.Module = cls(**own, **counts)
    for part in built.modules():  # a buffer moves with ``to(device)``, an attribute does not
        for attribute, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                delattr(part, attribute)
                part.register_buffer(attribute, value, persistent=False)
    return built


def call_once(made: nn.Module, example: Tensor) -> None:
    """ValueError where torchjd refuses a value of this shape. The random numbers of the run stay
    as they are."""
    with torch.random.fork_rng(devices=[]), quiet():
        made(example)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning of cvxpy that NashMTL's problem is slow to solve."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are solving a parameterized problem")
        yield


def _vector(argument: str, values: Mapping[str, float], heads: Sequence[str]) -> Tensor:
    if missing := [head for head in heads if head not in values]:
        raise InputError(f"{argument}.{missing[0]}", "required, but not given")
    return torch.tensor([values[head] for head in heads], dtype=torch.float32)


# ---- state ----------------------------------------------------------------------------


def hidden_state(module: nn.Module) -> dict[str, Any]:
    """What a module of torchjd keeps between steps outside of its ``state_dict``, by part."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        if not _is_stateful(part):
            continue
        own = {k: v for k, v in _attributes(part).items() if _is_plain(v) and k != NOT_KEPT}
        arrays = {k: v for k, v in _attributes(part).items() if isinstance(v, np.ndarray)}
        own |= {k: torch.from_numpy(v.copy()) for k, v in arrays.items()}
        optimizer = getattr(part, "_optimizer", None)
        found[name] = {
            "values": own,
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
        }
    return found


def load_hidden_state(module: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    """Give it a :func:`hidden_state`, with its tensors on the device, but those :data:`ON_CPU`."""
    for name, part in module.named_modules():
        kept = state.get(name)
        if kept is None:
            continue
        for attribute, value in kept["values"].items():
            before = getattr(part, attribute, None)
            if isinstance(before, np.ndarray):
                value = value.numpy()
            else:
                value = _on(torch.device("cpu") if attribute in ON_CPU else device, value)
            setattr(part, attribute, value)
        if kept["optimizer"] is not None:  # FAMO's: Adam over its logits
            famo: Any = part
            famo._optimizer = torch.optim.Adam(
                [famo._w], lr=famo.lr, weight_decay=famo.weight_decay
            )
            famo._optimizer.load_state_dict(kept["optimizer"])


def _on(device: torch.device, value: Any) -> Any:
    """The value on the device. A device in it becomes this one: torchjd compares the one that it
    has kept with that of its next matrix, and begins again where they differ."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, torch.device):
        return device
    if isinstance(value, (list, tuple)):
        return type(value)(_on(device, each) for each in value)
    return value


def _is_stateful(part: nn.Module) -> bool:
    from torchjd import Stateful

    return isinstance(part, Stateful)


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Its attributes and buffers, without what every module has."""
    of_every_module = vars(nn.Module())
    own = {k: v for k, v in vars(part).items() if k not in of_every_module}
    return own | dict(part._buffers)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    plain = (bool, int, float, str, Tensor, torch.dtype, torch.device)
    return value is None or isinstance(value, plain)
