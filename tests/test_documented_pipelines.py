"""The programs in docs/pipelines.md run as printed, offline, with a classifier where they expect one.

A python block is marked by `<!-- run -->`, or `<!-- run: torch -->` if it needs the extra `torch`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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


def test_every_python_program_of_the_page_is_run() -> None:
    assert len(BLOCKS) == TEXT.count("```python") >= 5
    assert any(block["torch"] for block in BLOCKS)
