"""What is wrong with a value that a person gave, in the words of that person.

pydantic finds the problem; here it becomes one line: the key as it stands in the file, what was
expected, and what was found.
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
"""What was expected, by pydantic's kind of error; see ``FAMILIES`` for the rest."""

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
"""What was expected, by the first word of pydantic's kind of error."""


def nearest(word: str, known: list[str]) -> str:
    """A hint for an unknown name: ``did you mean 'x'?`` or the list of known ones."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if known else "none is known"


def first_problem(error: ValidationError, annotation: Any, prefix: str = "") -> str:
    """One line, ``key: what was expected (got ...)``, for the most telling of the errors.

    ``annotation`` is the type that was checked against; ``prefix`` stands before its keys.
    """
    problems = error.errors(include_url=False)
    # a misspelt key is why the right one is missing: it comes first
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith("@"):  # our own validators name the key themselves
        _, key, text = message.split("@", 2)
        return f"{key}: {text}"
    keys, place = _walk(annotation, problem["loc"])
    where = ".".join([prefix, *keys] if prefix else keys)
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key; {nearest(keys[-1], _fields(place))}"
        case "missing":
            return f"{where}: required, but not given"
        case "value_error":
            return f"{where}: {message}"
    expected = [_expected(p) for p in problems if _walk(annotation, p["loc"])[0] == keys]
    wanted = " or ".join(dict.fromkeys(expected))
    return f"{where}: expected {wanted} (got {_shown(problem['input'])})"


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
    """The keys in a location that a person wrote, and the type that held the last of them.

    pydantic also puts into a location which member of a union it tried: these are left out.
    """
    keys: list[str] = []
    place = annotation
    for part in location:
        current = _section(annotation)
        if part == "[key]":  # it is the key before it that is wrong
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


def _section(annotation: Any) -> Any:
    """The part of a type that has keys or items of its own."""
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


def _fields(place: Any) -> list[str]:
    is_section = isinstance(place, type) and issubclass(place, BaseModel)
    return list(place.model_fields) if is_section else []
