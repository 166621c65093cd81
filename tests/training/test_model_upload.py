"""The two documented ways of putting a run's model on the Hub, against one on the loopback interface."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_runs import assert_same_weights, phase, tiny_recipe, write_texts
from watched_runs import run

from loopback_hub import REPOSITORY, hub_environment, loopback_hub

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def documented(language: str, containing: str) -> str:
    """The block of the page in a language that contains some text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (block,) = [block for block in blocks if containing in block]
    assert f"{REPOSITORY}" in block
    return str(block)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/model` of a short run."""
    folder = tmp_path_factory.mktemp("short")
    run(tiny_recipe(write_texts(folder / "texts"), phases=[phase(tokens=256)]), folder / "run")
    return folder / "run" / "model"


@pytest.mark.parametrize("way", ["python", "bash"])
def test_the_whole_model_folder_arrives_with_card_recipe_and_curve(
    way: str, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "run" / "model")
    if way == "python":
        command = [sys.executable, "-c", documented("python", "upload_folder")]
    else:
        hf, *arguments = documented("bash", "hf upload").split()
        assert hf == "hf"
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
    pushed = tmp_path / "pushed"
    with loopback_hub(pushed) as endpoint:
        environment = hub_environment(endpoint, home=tmp_path / "home")
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in pushed.iterdir()} == {file.name for file in model.iterdir()}
    names = ["README.md", "recipe.yaml", "curve.csv", "config.json", "tokenizer.json", "evaluation.json"]
    if find_spec("matplotlib") is not None:
        names.append("curve.png")
    for name in names:
        assert (pushed / name).read_bytes() == (model / name).read_bytes(), name
    assert_same_weights(pushed, model)
