"""One-line messages for values that fail validation.

pydantic finds the problem; here it becomes a key as written in the file, what was found and what
was expected.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

EXPECTED = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a name of letters, digits, '_', '-' and '.'",
    "none_required": "null",
}
"""The expected value, by pydantic's type of error; see ``FAMILIES`` for the others."""

FAMILIES = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "model": "a section of keys",
    "dict": "a section of keys",
    "list": "a list",
    "tuple": "a list",
    "path": "a path",
}
"""The expected value, by the first word of pydantic's type of error."""


MOST_HINTS = 2
"""Places of an unknown key elsewhere that an error names; more would not help."""


def nearest(word: str, known: list[str]) -> str:
    """A hint for an unknown name: ``did you mean 'x'?`` or the list of known names."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if known else "no name is known"


def first_problem(error: ValidationError, annotation: Any, prefix: str = "") -> tuple[str, str]:
    """The key and the text of an InputError for the most helpful of pydantic's errors.

    ``annotation`` is the type of the validated value; ``prefix`` is the key of that value.
    """
    problems = error.errors(include_url=False)
    # a misspelt key first: it is the reason why the right one is missing
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    keys, place = _walk(annotation, problem["loc"])
    for other in problems:  # of a union: the member that fits as far as possible
        deeper, there = _walk(annotation, other["loc"])
        if len(deeper) > len(keys) and deeper[: len(keys)] == keys:
            problem, keys, place = other, deeper, there
    where = ".".join([prefix, *keys] if prefix else keys)
    match problem["type"]:
        case "extra_forbidden":
            above = [prefix, *keys[:-1]] if prefix else keys[:-1]
            below = _places_of(keys[-1], place, above)
            if not below and not difflib.get_close_matches(keys[-1], _fields(place), 1, 0.5):
                below = _places_of(keys[-1], annotation, [prefix] if prefix else [])
            if 0 < len(below) <= MOST_HINTS:
                return where, f"unknown key; did you mean {' or '.join(map(repr, below))}?"
            return where, f"unknown key; {nearest(keys[-1], _fields(place))}"
        case "missing":
            return where, "required, but not given"
        case "value_error":
            return where, problem["msg"].removeprefix("Value error, ")
    expected = [_expected(p) for p in problems if _walk(annotation, p["loc"])[0] == keys]
    wanted = " or ".join(dict.fromkeys(expected))
    return where, f"got {_shown(problem['input'])}, expected {wanted}"


def _expected(problem: Any) -> str:
    kind = problem["type"]
    if kind in EXPECTED:
        return EXPECTED[kind].format(**problem.get("ctx", {}))
    family = FAMILIES.get(kind.split("_")[0])
    return family or str(problem["msg"][:1].lower() + problem["msg"][1:])


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _walk(annotation: Any, location: Sequence[int | str]) -> tuple[list[str], Any]:
    """The keys of a location as written in the file, and the type that has the last of them.

    A location of pydantic also contains which member of a union it tried: these are left out.
    """
    keys: list[str] = []
    place = annotation
    for part in location:
        current = _section(annotation)
        if part == "[key]" or _is_member(annotation, part):  # the key before it is wrong
            continue
        if isinstance(current, type) and issubclass(current, BaseModel):
            place, field = current, current.model_fields.get(str(part))
            annotation = field.annotation if field else Any
        elif get_origin(current) is dict or current is dict:
            place, annotation = current, (*get_args(current), Any, Any)[1]
        elif get_origin(current) in (list, tuple) and isinstance(part, int):
            place, annotation = current, (*get_args(current), Any)[0]
        else:
            continue
        keys.append(str(part))
    return keys, place


def _is_member(annotation: Any, part: int | str) -> bool:
    """Whether a part of a location is the member of a union that pydantic tried."""
    if get_origin(annotation) is Annotated:
        return _is_member(get_args(annotation)[0], part)
    if get_origin(annotation) not in (Union, types.UnionType):
        return False
    return str(part) in ("str", "int", "float", "bool") or str(part).startswith(("dict[", "list["))


def _section(annotation: Any) -> Any:
    """The part of a type that has keys or items."""
    if get_origin(annotation) is Annotated:
        return _section(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [_section(member) for member in get_args(annotation)]
        return next((member for member in members if _has_keys(member)), None)
    return annotation


def _has_keys(annotation: Any) -> bool:
    if get_origin(annotation) in (dict, list, tuple):
        return True
    return isinstance(annotation, type) and issubclass(annotation, (BaseModel, dict, list, tuple))


def _places_of(name: str, annotation: Any, above: Sequence[str]) -> list[str]:
    """The dotted paths of the keys called ``name`` in all sections below this one."""
    section = _section(annotation)
    if get_origin(section) is dict:
        return _places_of(name, (*get_args(section), Any, Any)[1], [*above, "<name>"])
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    found = [".".join([*above, name])] if name in section.model_fields else []
    for key, field in section.model_fields.items():
        found += _places_of(name, field.annotation, [*above, key])
    return found


def _fields(place: Any) -> list[str]:
    is_section = isinstance(place, type) and issubclass(place, BaseModel)
    return list(place.model_fields) if is_section else []
