"""`push_to_hub` against a Hub that is a small server on the loopback interface, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch_models import ours, random_ids

from loopback_hub import hub_environment, loopback_hub
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM

PUSH = """
import sys
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM
model = ModernBertDecoderForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("org/model", token="hf_made_up")
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a Hub, and the folder in which it keeps what is pushed."""
    with loopback_hub(tmp_path / "pushed") as endpoint:
        yield endpoint, tmp_path / "pushed"


def test_a_pushed_model_arrives_whole(hub: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, pushed = hub
    model, ids = ours(local_attention=20), random_ids(70)
    model.save_pretrained(tmp_path / "model")
    environment = hub_environment(endpoint, home=tmp_path / "home")
    command = [sys.executable, "-W", "ignore", "-c", PUSH, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = {file.name for file in pushed.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= names
    loaded = ModernBertDecoderForCausalLM.from_pretrained(pushed)
    assert loaded.config.sliding_window == 10
    saved = ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, saved(ids).logits)
