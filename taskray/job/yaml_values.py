"""Plain values from YAML files and from ``--set a.b=value``, not yet checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from taskray.errors import InputError
from taskray.files import read_text
from taskray.job.validation import nearest

SECTIONS_OF_NAMES = {("data",), ("tasks",), ("consistency",), ("evaluation", "data")}
"""Sections of a job whose keys are names chosen by the job."""

TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with three differences: ``1e-3`` is a number, keys are text as written (``on``,
    ``no``, ``1``), and duplicate keys are refused."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            AttributeError,
        ):  # PyYAML's constructors do not catch these
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                problem=f"invalid {kind} {node.value!r}", problem_mark=node.start_mark
            ) from None

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, because construct_mapping sees the pairs that a merge (<<) has already added.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"duplicate key {key.value!r}",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
                if key.tag not in (MERGE, TEXT):
                    key.tag = TEXT
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file; InputError names the line that is malformed."""
    if Path(path).is_dir():
        raise InputError(str(path), "is a folder, expected a YAML file")
    try:
        values = load_yaml(read_text(Path(path)))
    except yaml.YAMLError as error:
        raise InputError(str(path), _malformed(error)) from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(str(path), f"got {found}, expected a mapping of keys")
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` (the value is YAML) to nested values; returns a new dict."""
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise InputError(f"--set {text!r}", "expected dotted.path=value")
        values = assign(values, keys, _value(value, text), text)
    return values


def _value(value: str, text: str) -> Any:
    """The value of ``a.b=value``. YAML would drop what it takes for a comment or an anchor: plain
    text is taken whole, and after any other value this is an error."""
    try:
        node = yaml.compose(value, Loader=_Loader)
        plain = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
        start, end = (node.start_mark.index, _end(node)) if node else (0, 0)
        if plain and (value[end:].strip() or value[start : start + 1] == "&"):
            return value.strip()
        if value[end:].strip():
            raise yaml.YAMLError
        return load_yaml(value)
    except (yaml.YAMLError, RecursionError):
        raise InputError(f"--set {text!r}", "the value is not valid YAML") from None


def _end(node: yaml.Node) -> int:
    """Where the last character of a node is. That of a block ends where its last item does."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def assign(values: dict[str, Any], keys: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    """A copy of ``values`` with the nested key set. Null removes an entry of a section of names,
    such as ``tasks.depth``; InputError if there is no such entry."""
    *section, name = keys
    if value is not None or tuple(section) not in SECTIONS_OF_NAMES:
        return set_path(values, keys, value, text)
    inner: Any = values
    for key in section:
        inner = inner.get(key) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or name not in inner:
        known = list(inner) if isinstance(inner, dict) else []
        hint = nearest(name, known)
        raise InputError(f"--set {text!r}", f"there is no {'.'.join(keys)!r} to remove; {hint}")
    return set_path(values, section, {k: v for k, v in inner.items() if k != name}, text)


def set_path(values: Any, keys: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    """A copy of ``values`` with the nested key set; strings along the path become plugins."""
    if values is None:
        values = {}
    elif isinstance(values, str):  # ``model: unet`` is short for ``model: {name: unet}``
        values = {"name": values}
    elif not isinstance(values, dict):
        raise InputError(f"--set {text!r}", f"{keys[0]!r} is under a value, expected a section")
    head, *rest = keys
    inner = set_path(values.get(head), rest, value, text) if rest else value
    return {**values, head: inner}


def load_yaml(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError if it is malformed."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _malformed(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{line}malformed YAML: {problem}"
