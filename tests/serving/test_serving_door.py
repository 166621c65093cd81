"""`AsyncLLM` is the server's only door to the engine: nothing else of it is imported or called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from modernbert_decoder import serving

SERVING = Path(serving.__file__).parent
PACKAGE = "modernbert_decoder"
ENGINE = f"{PACKAGE}.engine"
# The door, what it is opened with, and the values that go through it.
IMPORTED = {"async_llm", "llm", "outputs", "sampling_params", "speculation", "structured"}
# What an engine's model says of itself, and its release. Nothing here computes.
USED_OF_LLM = {"architecture", "check_structured", "close", "folder", "formats", "max_context", "tokenizer"}
# Where each is made: an LLM is put behind its door at once.
MADE = {"LLM": {"models.py"}, "AsyncLLM": {"models.py"}}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SERVING.rglob("*.py")):
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))


def test_the_server_imports_the_engines_door_and_the_values_that_go_through_it() -> None:
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level
                names = [node.module or ""]
                if node.module in (ENGINE, PACKAGE):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {
                name for name in names if name.startswith((ENGINE, f"{PACKAGE}.LLM", f"{PACKAGE}.Async"))
            }
    assert found == {f"{ENGINE}.{name}" for name in IMPORTED}


def test_the_server_asks_a_model_only_what_it_is() -> None:
    used = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
                if name == "llm":
                    used.add(node.attr)
    assert used == USED_OF_LLM


def test_engines_are_opened_in_one_place() -> None:
    made: dict[str, set[str]] = {name: set() for name in MADE}
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in made:
                made[node.func.id].add(file)
    assert made == MADE


def test_no_engine_is_reached_into() -> None:
    private = {
        f"{file}: {node.attr}"
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in ("engine", "llm")
    }
    assert private == set()
