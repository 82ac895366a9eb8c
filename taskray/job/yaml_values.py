"""Values from YAML files and from ``--set a.b=value``, before anybody knows what they mean."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from taskray.errors import InputError

SECTIONS_OF_NAMES = {("data",), ("tasks",), ("consistency",), ("evaluation", "data")}
"""Sections of a job whose keys are names that the job itself gives."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two differences: ``1e-3`` is a number, and a key may stand only once."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # what PyYAML's constructors let through
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value!r} is no {kind}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} stands there twice",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file; InputError names the line where it is malformed."""
    try:
        values = _load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, expected a YAML file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {_malformed(error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(f"{path}: expected a mapping of keys, got {found}")
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` (the value is YAML) to nested values; returns a new dict."""
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise InputError(f"--set {text!r}: expected dotted.path=value")
        try:
            parsed = _load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {text!r}: the value is not valid YAML") from None
        values = assign(values, keys, parsed, text)
    return values


def assign(values: dict[str, Any], keys: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    """A copy of ``values`` with the nested key set. An entry of a section of names, such as
    ``tasks.depth``, is removed by null; InputError where there is none to remove."""
    *section, name = keys
    if value is not None or tuple(section) not in SECTIONS_OF_NAMES:
        return set_path(values, keys, value, text)
    inner: Any = values
    for key in section:
        inner = inner.get(key) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or name not in inner:
        raise InputError(f"--set {text!r}: there is no {'.'.join(keys)!r} to remove")
    return set_path(values, section, {k: v for k, v in inner.items() if k != name}, text)


def set_path(values: Any, keys: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    """A copy of ``values`` with the nested key set; plain strings on the way become plugins."""
    if values is None:
        values = {}
    elif isinstance(values, str):  # ``model: unet`` is short for ``model: {name: unet}``
        values = {"name": values}
    elif not isinstance(values, dict):
        raise InputError(f"--set {text!r}: {keys[0]!r} lies under a value, not under a section")
    head, *rest = keys
    inner = set_path(values.get(head), rest, value, text) if rest else value
    return {**values, head: inner}


def _load(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _malformed(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{line}malformed YAML: {problem}"
