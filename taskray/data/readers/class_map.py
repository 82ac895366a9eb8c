"""Class maps: which classes a segmentation tells apart, which of them can move, and how the ids
that datasets store become their indices.

A class map is a small YAML file. The built-in ones lie in ``class_maps``; a job may name its own
by path (``my_classes.yaml``)::

    classes: [person, car, other]     # index 0, 1, 2
    movable: [person, car]            # what relations may let move by itself
    rest: other                       # what ids are that are not listed; without it: ignored
    ids:
      cityscapes: {24: person, 25: person, 26: car}

A reader turns stored ids into indices with :meth:`ClassMap.table`, so that labels reach tasks as
``schema`` has them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

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
    """Names; a class's place is its index."""
    movable: tuple[str, ...] = ()
    """The classes that can move by themselves (the set M of Taskology eq. 2)."""
    rest: str | None = None
    """The class of ids that are not listed; null: they are ignored."""
    ids: dict[str, dict[StoredId, str]] = Field(default_factory=dict)
    """For each dataset, the ids that it stores and the class that each is."""

    @model_validator(mode="after")
    def _names_are_known(self) -> ClassMap:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("@classes@a name stands there twice")
        named = {"movable": self.movable, "rest": (self.rest,) if self.rest else ()}
        named |= {f"ids.{dataset}": tuple(ids.values()) for dataset, ids in self.ids.items()}
        for key, names in named.items():
            for name in names:
                if name not in self.classes:
                    raise ValueError(
                        f"@{key}@no class {name!r}; {nearest(name, list(self.classes))}"
                    )
        return self

    @property
    def movable_indices(self) -> tuple[int, ...]:
        """Indices of the classes that can move, ascending."""
        return tuple(i for i, name in enumerate(self.classes) if name in self.movable)

    def table(self, dataset: str) -> NDArray[np.uint8]:
        """What each stored id 0-255 of a dataset becomes, uint8 ``[256]``: ``table[ids]``.

        255 stays ignored. Raises InputError where this map says nothing about the dataset.
        """
        if dataset not in self.ids:
            known = ", ".join(self.ids) or "none"
            raise InputError(f"class_map: has no ids of {dataset!r} (it has: {known})")
        rest = IGNORE if self.rest is None else self.classes.index(self.rest)
        table = np.full(256, rest, np.uint8)
        table[IGNORE] = IGNORE
        for stored, name in self.ids[dataset].items():
            table[stored] = self.classes.index(name)
        return table


@lru_cache(maxsize=32)
def class_map(name: str) -> ClassMap:
    """The class map of that name, or in that YAML file; InputError names what is wrong with it."""
    if not name.endswith((".yaml", ".yml")):
        built_in = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        if name not in built_in:
            raise InputError(
                f"class_map: unknown {name!r}; {nearest(name, built_in)} (or a path to a .yaml)"
            )
        name = str(FOLDER / f"{name}.yaml")
    found: ClassMap = parse(ClassMap, read_yaml(name), name)
    return found


def outside(found: int, count: int) -> str:
    """What to say of a label beyond the classes of a segmentation."""
    return (
        f"the labels hold class {found}, but the segmentation has {count} classes "
        "(class_map, num_classes)"
    )
