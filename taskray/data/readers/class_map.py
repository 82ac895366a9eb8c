"""Class maps: the classes of a segmentation, which of them can move, and the class of each id
that a dataset stores.

A class map is a small YAML file. The built-in ones are in ``class_maps``; a job may name another
by path (``my_classes.yaml``)::

    classes: [person, car, other]     # index 0, 1, 2
    movable: [person, car]            # classes that relations allow to move
    rest: other                       # the class of ids that are not listed; without it: ignored
    ids:
      cityscapes: {24: person, 25: person, 26: car}

A reader converts stored ids to indices with :meth:`ClassMap.table`, as ``schema`` defines them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from taskray.data.readers.reader import first_repeated
from taskray.errors import InputError
from taskray.job.config import Settings, parse
from taskray.job.validation import nearest
from taskray.job.yaml_values import read_yaml
from taskray.schema import IGNORE

FOLDER = Path(__file__).with_name("class_maps")

StoredId = Annotated[int, Field(ge=0, lt=IGNORE)]


class ClassMap(Settings):
    """The classes of a segmentation, in the order of their indices."""

    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=IGNORE)]
    """Names in the order of their indices."""
    movable: tuple[str, ...] = ()
    """The classes that can move (the set M of Taskology eq. 2)."""
    rest: str | None = None
    """The class of ids that are not listed; null: they are ignored."""
    ids: dict[str, dict[StoredId, str]] = Field(default_factory=dict)
    """For each dataset, the ids that it stores and their classes."""

    @model_validator(mode="after")
    def _names_are_known(self) -> ClassMap:
        repeated = first_repeated(self.classes)
        if repeated is not None:
            raise InputError("classes", f"duplicate name {repeated!r}")
        named = {"movable": self.movable, "rest": (self.rest,) if self.rest else ()}
        named |= {f"ids.{dataset}": tuple(ids.values()) for dataset, ids in self.ids.items()}
        for key, names in named.items():
            for name in names:
                if name not in self.classes:
                    raise InputError(key, f"no class {name!r}; {nearest(name, list(self.classes))}")
        return self

    @property
    def movable_indices(self) -> tuple[int, ...]:
        """Indices of the classes that can move, ascending."""
        return tuple(i for i, name in enumerate(self.classes) if name in self.movable)

    def table(self, dataset: str) -> NDArray[np.uint8]:
        """The class index of each stored id 0-255 of a dataset, uint8 ``[256]``: ``table[ids]``.

        255 is ignored in both. Raises InputError if this map has no ids of the dataset.
        """
        if dataset not in self.ids:
            known = ", ".join(self.ids) or "none"
            raise InputError("class_map", f"has no ids of {dataset!r} (it has: {known})")
        rest = IGNORE if self.rest is None else self.classes.index(self.rest)
        table = np.full(256, rest, np.uint8)
        table[IGNORE] = IGNORE
        for stored, name in self.ids[dataset].items():
            table[stored] = self.classes.index(name)
        return table


@lru_cache(maxsize=32)
def class_map(name: str) -> ClassMap:
    """The built-in class map of that name, or that in a YAML file; InputError names its fault."""
    if not name.endswith((".yaml", ".yml")):
        built_in = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        if name not in built_in:
            raise InputError(
                "class_map", f"unknown {name!r}; {nearest(name, built_in)} (or a path to a .yaml)"
            )
        name = str(FOLDER / f"{name}.yaml")
    found: ClassMap = parse(ClassMap, read_yaml(name), name)
    return found


def outside(found: int, count: int) -> str:
    """The message for a label beyond the classes of a segmentation."""
    return f"got class {found} in the labels, expected less than {count} (class_map, num_classes)"
