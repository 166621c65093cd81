"""The architecture's arrows point down: who may import whom, and what the base install may rely on."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "modernbert_decoder"
SOURCE = ROOT / "src" / PACKAGE

# A module directly in the package belongs to the floor, except these; every folder with code is a room.
NOT_FLOOR = frozenset({"__init__", "__main__", "pipelines"})
FLOOR = frozenset(file.stem for file in SOURCE.glob("*.py")) - NOT_FLOOR
# room -> the rooms it may import, besides itself
ALLOWED: dict[str, frozenset[str]] = {
    **dict.fromkeys(FLOOR, FLOOR),
    "conversion": FLOOR,
    "engine": FLOOR,
    "jobs": FLOOR | {"engine"},
    "pytorch": FLOOR,
    "training": FLOOR | {"conversion", "jobs", "pytorch"},
    "pipelines": FLOOR | {"engine", "pytorch"},
    "serving": FLOOR | {"engine"},
    "evaluation": FLOOR | {"engine", "jobs", "pytorch"},
    "cli": FLOOR
    | {"conversion", "engine", "jobs", "pytorch", "training", "pipelines", "serving", "evaluation"},
}
WITHOUT_TORCH = FLOOR | {"conversion", "engine"}
TORCH = frozenset({"torch", "transformers"})
# Packages that one file imports when they are asked for, and says by name when they are missing.
OPTIONAL = {"engine/structured.py": frozenset({"llguidance"})}


def room_of(file: Path) -> str:
    """The room a source file belongs to; `__init__` and `__main__` of the package are rooms of that name."""
    parts = file.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else file.stem


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names of everything that `source` imports, inside functions and type-checking blocks too.

    `from a.b import c` yields `a.b.c`: whether c is a module or a name in one makes no difference to a room.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imports_of(file: Path) -> set[str]:
    module = ".".join([PACKAGE, *file.relative_to(SOURCE).with_suffix("").parts])
    is_package = file.name == "__init__.py"
    return set(
        imported_modules(
            file.read_text(encoding="utf-8"), module.removesuffix(".__init__"), is_package=is_package
        )
    )


def base_dependencies() -> set[str]:
    """Import names of the base dependencies (each is its distribution's name with underscores)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}


FILES = sorted(SOURCE.rglob("*.py"))
ROOM_FILES = [file for file in FILES if room_of(file) not in {"__init__", "__main__"}]


@pytest.mark.parametrize("file", ROOM_FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_module_imports_only_the_rooms_below_it(file: Path) -> None:
    room = room_of(file)
    assert room in ALLOWED, f"{room} is in no row of ALLOWED: decide what it may import"
    inside = [name for name in imports_of(file) if name.split(".")[0] == PACKAGE]
    rooms = {name.split(".")[1] if "." in name else "__init__" for name in inside}
    forbidden = rooms - ALLOWED[room] - {room, "__version__"}
    assert not forbidden, f"{file.relative_to(ROOT)} ({room}) may not import {sorted(forbidden)}"


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if room_of(file) in WITHOUT_TORCH | {"__init__", "cli"}],
    ids=lambda file: str(file.relative_to(SOURCE)),
)
def test_floor_engine_and_command_line_import_nothing_but_the_base_dependencies(file: Path) -> None:
    top_level = {name.split(".")[0] for name in imports_of(file)}
    assert not top_level & TORCH
    third_party = top_level - sys.stdlib_module_names - {PACKAGE}
    optional = OPTIONAL.get(file.relative_to(SOURCE).as_posix(), frozenset())
    undeclared = third_party - base_dependencies() - optional
    assert not undeclared, f"{file.relative_to(ROOT)} imports {sorted(undeclared)}, not a base dependency"


def test_only_the_command_line_knows_the_command_line_library() -> None:
    users = {
        room_of(file) for file in FILES if any(name.split(".")[0] == "click" for name in imports_of(file))
    }
    assert users <= {"cli"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("def f():\n    from transformers import AutoModel", {"transformers.AutoModel"}),
        ("from . import graph", {"modernbert_decoder.engine.graph"}),
        ("from ..architecture import Head", {"modernbert_decoder.architecture.Head"}),
        ("from .. import tokenizer", {"modernbert_decoder.tokenizer"}),
        ("import importlib\nimportlib.import_module('torch')", {"importlib", "torch"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str]) -> None:
    assert set(imported_modules(source, "modernbert_decoder.engine.llm", is_package=False)) == expected


def test_relative_imports_of_a_package_start_at_the_package_itself() -> None:
    names = set(imported_modules("from .llm import LLM", "modernbert_decoder.engine", is_package=True))
    assert names == {"modernbert_decoder.engine.llm.LLM"}
