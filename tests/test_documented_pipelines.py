"""The programs in docs/pipelines.md run as printed, offline, with a classifier where they expect one.

A python block is marked by `<!-- run -->`, or `<!-- run: torch -->` if it needs the extra `torch`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from modernbert_decoder.checkpoint import BUNDLED_MODEL, Checkpoint, find_checkpoint
from modernbert_decoder.tokenizer import Tokenizer
from pipeline_checkpoints import CLASSIFIER, write_with_tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "pipelines.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^<!-- run(?P<torch>: torch)? -->\n```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
BLOCKS = list(BLOCK.finditer(TEXT))
HAS_TORCH = find_spec("torch") is not None and find_spec("transformers") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs run: it holds `my-classifier`."""
    folder = tmp_path_factory.mktemp("documented")
    write_with_tokenizer(folder / "my-classifier", head=CLASSIFIER, id2label={0: "bad", 1: "good"})
    return folder


@pytest.mark.parametrize(
    "block", BLOCKS, ids=lambda block: f"line-{TEXT.count(chr(10), 0, block.start()) + 1}"
)
def test_a_documented_program_runs_and_prints(block: re.Match[str], folder: Path) -> None:
    if block["torch"] and not HAS_TORCH:
        pytest.skip("needs the extra torch")
    done = subprocess.run(
        [sys.executable, "-c", block["code"]],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{block['code']}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip()
    if 'dtype="float16"' in block["code"]:
        assert "computed as float32 on the CPU" in done.stderr
        check_pipelines(done.stdout)
    if "AutoModelForCausalLM" in block["code"]:
        check_classes(done.stdout)


PROMPT = "The future of artificial intelligence is"


def check_pipelines(printed: str) -> None:
    """What the first program of the model's documentation page prints."""
    generated, classified = map(ast.literal_eval, printed.strip().splitlines())
    ((text,),) = [[record["generated_text"] for record in generated]]
    check_generated(text)
    ((label, score),) = [(record["label"], record["score"]) for record in classified]
    assert label in {"bad", "good"}
    assert 0.5 <= score <= 1


def check_classes(printed: str) -> None:
    """What the second one prints."""
    text, rest = printed.removeprefix("Generated text: ").split("\nPredicted class: ")
    check_generated(text)
    predicted, probabilities = rest.split("\nPrediction probabilities: ")
    numbers = [float(number) for number in re.findall(r"\d\.\d+(?:e[-+]\d+)?", probabilities)]
    assert len(numbers) == 2
    assert sum(numbers) == pytest.approx(1, abs=2e-3)  # in float16
    assert numbers[int(predicted)] == max(numbers)


def check_generated(text: str) -> None:
    """It goes on from the prompt, to 50 tokens at most, both included; encoded anew, a few more or less."""
    tokenizer = bundled_tokenizer()
    assert text.startswith(PROMPT)
    assert len(tokenizer.encode(PROMPT)) <= len(tokenizer.encode(text)) <= 55


def bundled_tokenizer() -> Tokenizer:
    folder = find_checkpoint(BUNDLED_MODEL)
    return Tokenizer.from_folder(folder, Checkpoint.open(folder).architecture)


def test_every_python_program_of_the_page_is_run() -> None:
    assert len(BLOCKS) == TEXT.count("```python") >= 5
    assert any(block["torch"] for block in BLOCKS)
