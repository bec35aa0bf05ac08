"""The house's rooms: who may import whom, so that a reader can take one room without the others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "cmdlab"
FLOORS = (  # from the lowest up; a room imports lower floors only, none of its own
    ("errors",),
    ("outputs", "shipped"),
    ("corpora", "evaluation", "records"),
    ("encoders", "reporting"),
    ("retrieval", "sweeps"),
    ("experiment", "search"),
    ("study", "profiling"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(LIBRARY.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """The library's modules that a file imports, and the name that it takes of each."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, "") for name in node.names if name.name.startswith("cmdlab."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are written out"
            for name in node.names:
                if node.module == "cmdlab":
                    yield f"cmdlab.{name.name}", ""
                elif node.module.startswith("cmdlab."):
                    yield node.module, name.name


def others(file: Path) -> Iterator[tuple[list[str], str]]:
    """The same of other rooms alone, each module as its parts below the library."""
    for module, name in imports(file):
        parts = module.split(".")[1:]
        if parts[0] != room_of(file):
            yield parts, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_a_room_imports_lower_floors_only(file):
    if file == LIBRARY / "__init__.py":
        return
    for parts, _ in others(file):
        assert FLOOR[parts[0]] < FLOOR[room_of(file)], f"imports {'.'.join(parts)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_a_room_is_entered_by_its_door(file):
    """Other rooms take what a room's `__init__.py` hands on."""
    for parts, name in others(file):
        assert len(parts) == 1, f"imports {'.'.join(parts)} past its __init__.py"
        door = LIBRARY / parts[0] / "__init__.py"
        if door.exists() and name:
            handed = ast.parse(door.read_text(encoding="utf-8"))
            lists = [n.value for n in handed.body if isinstance(n, ast.Assign)]
            assert name in [n for values in lists for n in ast.literal_eval(values)]


def test_no_two_files_of_a_room_import_each_other():
    own = {
        ".".join(["cmdlab", *file.relative_to(LIBRARY).with_suffix("").parts]): {
            module for module, _ in imports(file)
        }
        for file in FILES
        if file.name != "__init__.py"
    }
    reached = {module: set(to) & set(own) for module, to in own.items()}
    for _ in own:
        for module, to in reached.items():
            reached[module] = to.union(*(reached[other] for other in to))
    assert [module for module, to in reached.items() if module in to] == []


def test_the_model_knows_nothing_of_denoising():
    modules = [module for module, _ in imports(LIBRARY / "retrieval" / "model.py")]
    assert modules == ["cmdlab.errors", "cmdlab.outputs", "cmdlab.shipped"]


def test_nothing_of_the_library_is_imported_by_the_kernels():
    for file in (LIBRARY.parent / "kernels" / "cmdlab_kernels").rglob("*.py"):
        assert list(imports(file)) == []
