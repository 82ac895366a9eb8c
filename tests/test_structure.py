"""The rooms of the project, and the one direction in which they may know each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "taskray"

ROOMS = [
    {"errors", "schema"},
    {"files"},
    {"job"},
    {"geometry"},
    {"data"},
    {"models"},
    {"tasks"},
    {"relations"},
    {"weighting"},
    {"loop"},
    {"exchange"},
    {"record"},
    {"runtime"},
    {"report"},
    {"run"},
    {"tuning"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]
"""A room may import from those before it and from itself, never from one after it."""

RAY_MAY_BE_IMPORTED_IN = {"runtime", "tuning"}
RAY_DATA_IS_IMPORTED_IN = "data/storage/ray_data.py"


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


def imports(file: Path) -> list[str]:
    """Every module that a file imports, wherever in the file."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules.append(node.module or "")
            if node.module == "taskray":
                modules += [f"taskray.{alias.name}" for alias in node.names]
    return modules


def own_room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down_the_table_of_rooms(file):
    here = level(own_room(file))
    for module in imports(file):
        if module.startswith("taskray."):
            room = room_of(module)
            assert room == own_room(file) or level(room) < here, f"{file} imports {module}"


def test_ray_is_imported_in_the_runtime_the_tuning_and_one_file_of_the_data():
    for file in files():
        if any(module.split(".")[0] == "ray" for module in imports(file)):
            place = str(file.relative_to(PACKAGE))
            assert place == RAY_DATA_IS_IMPORTED_IN or own_room(file) in RAY_MAY_BE_IMPORTED_IN


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("taskray.cli", "ray"),
        ("taskray.commands.evaluate", "ray"),
        ("taskray.exchange.cache", "ray"),
        ("taskray.loop.trainer", "ray"),
        ("taskray.loop.wiring", "ray"),
        ("taskray.run.train", "ray"),
        ("taskray.runtime.answering", "ray"),
        ("taskray.runtime.inline", "ray"),
        ("taskray.runtime.cache_actor", "torch"),
        ("taskray.models.encoder_decoder", "transformers"),
    ],
)
def test_what_takes_long_to_import_is_imported_only_where_it_is_needed(module, package):
    look = f"print(*{{name.split('.')[0] for name in sys.modules}} & {{{package!r}}})"
    command = [sys.executable, "-c", f"import sys, {module}; {look}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_actors_are_made_in_one_place():
    users = [
        str(file.relative_to(PACKAGE))
        for file in files()
        if "ray.remote" in file.read_text(encoding="utf-8").replace("``ray.remote``", "")
    ]
    assert users == ["runtime/placement.py"]


def test_every_public_class_and_function_has_a_docstring():
    without = []
    for file in files():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            public = isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if public and not node.name.startswith("_") and not ast.get_docstring(node):
                without.append(f"{file.relative_to(PACKAGE)}: {node.name}")
    assert without == []
