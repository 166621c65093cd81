"""The files that name versions agree with each other."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN_EXTRAS = "modernbert-decoder"


def pins(file: Path) -> dict[str, str]:
    """Distribution name -> the exact version that a requirements file pins."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    for requirement in requirements:
        assert [clause.operator for clause in requirement.specifier] == ["=="], f"{requirement} is not a pin"
        assert not requirement.extras, f"{requirement}: pip takes no extras in a file of constraints"
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


def bounds(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in requirements if r.name != OWN_EXTRAS}


def test_the_development_environment_pins_what_pyproject_asks_for() -> None:
    pinned = pins(ROOT / "requirements" / "dev.txt")
    extras = set(PROJECT["optional-dependencies"]) - {"bench"}
    for name, requirement in bounds(*sorted(extras)).items():
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} against {requirement}"


def test_the_lowest_versions_are_the_lower_bounds_of_pyproject() -> None:
    lowest = pins(ROOT / "requirements" / "lowest.txt")
    declared = bounds()
    assert lowest.keys() == declared.keys()
    for name, requirement in declared.items():
        (clause,) = requirement.specifier
        assert clause.operator == ">="
        assert Requirement(f"{name}=={clause.version}").specifier.contains(lowest[name])


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_no_dependency_has_an_upper_bound(extra: str) -> None:
    for requirement in bounds(extra).values():
        operators = {clause.operator for clause in requirement.specifier}
        assert operators <= {">=", "=="}, str(requirement)


def test_the_linter_refuses_to_run_in_another_version_than_the_pinned_one() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    pinned = pins(ROOT / "requirements" / "dev.txt")
    assert tools["ruff"]["required-version"] == f"=={pinned['ruff']}"


@pytest.mark.parametrize("release", ["4.57", "5.16"])
def test_older_releases_of_transformers_are_tested_with_otherwise_the_same_versions(release: str) -> None:
    pinned = pins(ROOT / "requirements" / f"transformers-{release}.txt")
    development = pins(ROOT / "requirements" / "dev.txt")
    assert pinned["transformers"].startswith(f"{release}.")
    for name, requirement in bounds("torch", "quantization").items():
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} against {requirement}"
    differing = {name for name in pinned.keys() & development.keys() if pinned[name] != development[name]}
    assert differing <= {"transformers", "huggingface-hub", "tokenizers"}


def test_the_oldest_transformers_allowed_is_tested() -> None:
    (clause,) = bounds("torch")["transformers"].specifier
    pinned = pins(ROOT / "requirements" / f"transformers-{clause.version}.txt")
    assert Requirement(f"transformers~={clause.version}.0").specifier.contains(pinned["transformers"])


def test_the_base_install_depends_on_seven_packages_and_no_others() -> None:
    base = {"click", "tqdm", "huggingface-hub", "numpy", "onnx", "onnxruntime", "tokenizers"}
    assert bounds().keys() == base


def test_every_documented_extra_exists() -> None:
    extras = {"torch", "train", "serve", "data", "ray", "eval", "bench", "dev"}
    assert extras <= PROJECT["optional-dependencies"].keys()
