"""The package works with its base dependencies alone, and importing it loads nothing heavy.

The environment is the one `make demo` uses: `make base-environment` builds it when pyproject.toml has
changed, reinstalls the package when a source has, and does nothing otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modernbert_decoder

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "env" / "base"
WINGS = ("pytorch", "training", "serving", "evaluation")

IMPORT_EVERYTHING = f"""
import importlib, json, pkgutil, sys
import modernbert_decoder
imported = []
for module in pkgutil.walk_packages(modernbert_decoder.__path__, "modernbert_decoder."):
    parts = module.name.split(".")
    if parts[1] not in {WINGS!r} and parts[-1] != "__main__":
        importlib.import_module(module.name)
        imported.append(module.name)
heavy = sorted({{"torch", "transformers"}} & set(sys.modules))
print(json.dumps({{"file": modernbert_decoder.__file__, "imported": imported, "heavy": heavy}}))
"""


def clean_environment() -> dict[str, str]:
    """The environment variables, without those that would reach into another make or Python installation."""
    dropped = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def run(*command: str | Path, cwd: Path, timeout_seconds: float = 60) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def base_python() -> Path:
    """The interpreter of an environment with the package and its base dependencies, and nothing else."""
    run("make", "base-environment", f"PYTHON={sys.executable}", cwd=ROOT, timeout_seconds=600)
    return ENVIRONMENT / "bin" / "python"


@pytest.mark.environment
def test_torch_and_transformers_are_absent_from_the_base_install(base_python: Path, tmp_path: Path) -> None:
    names = ("torch", "transformers", "onnxruntime")
    code = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert run(base_python, "-c", code, cwd=tmp_path).strip() == "['onnxruntime']"


@pytest.mark.environment
def test_floor_engine_and_command_line_import_with_base_dependencies_only(
    base_python: Path, tmp_path: Path
) -> None:
    result = json.loads(run(base_python, "-c", IMPORT_EVERYTHING, cwd=tmp_path))
    assert Path(result["file"]).is_relative_to(ENVIRONMENT), "the installed package was not the one imported"
    assert result["heavy"] == []
    assert set(result["imported"]) == modules_of_floor_and_engine()


def modules_of_floor_and_engine() -> set[str]:
    """Names of all modules in the sources, folders that lack an `__init__.py` included."""
    names = set()
    for path in (ROOT / "src" / "modernbert_decoder").rglob("*.py"):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if len(parts) > 1 and parts[1] not in WINGS and parts[-1] != "__main__":
            names.add(".".join(parts))
    assert {"modernbert_decoder.engine", "modernbert_decoder.cli.generate"} <= names
    return names


@pytest.mark.environment
def test_the_installed_package_holds_the_bundled_model(base_python: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files; "
        "print(sorted(p.name for p in (files('modernbert_decoder') / 'assets' / 'storyteller').iterdir()))"
    )
    listed = run(base_python, "-c", code, cwd=tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert repr(name) in listed


@pytest.mark.environment
def test_the_installed_package_says_that_it_is_typed(base_python: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files; print((files('modernbert_decoder') / 'py.typed').is_file())"
    )
    assert run(base_python, "-c", code, cwd=tmp_path).strip() == "True"


@pytest.mark.environment
def test_pip_finds_nothing_missing_in_the_base_install(base_python: Path, tmp_path: Path) -> None:
    assert "No broken requirements" in run(base_python, "-m", "pip", "check", cwd=tmp_path)


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import modernbert_decoder, sys; print(*sys.modules)"
    loaded = set(run(sys.executable, "-c", code, cwd=tmp_path).split())
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "numpy", "tokenizers", "huggingface_hub"}
    assert not loaded & heavy


@pytest.mark.parametrize("name", modernbert_decoder.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(modernbert_decoder, name) is not None
    assert name in dir(modernbert_decoder)


def test_an_unknown_name_is_an_attribute_error_that_says_which() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Encoder'"):
        modernbert_decoder.__getattr__("Encoder")
