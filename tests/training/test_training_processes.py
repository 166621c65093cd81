"""Two processes on one machine (gloo): the loss of one, sharded or not, and what they wrote read by one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import phase, recipe_table, weights, write_texts

from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM
from modernbert_decoder.training.building import load_weights
from modernbert_decoder.training.checkpoints import all_checkpoints, latest_checkpoint, log_history_of
from modernbert_decoder.training.pretraining import pretrain
from modernbert_decoder.training.recipe_files import read_recipe

PROGRAM = Path(__file__).with_name("forked_processes.py")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
# Two processes add gradients in another order, and every step starts from the difference of the one before.
TOLERANCE = 2e-4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_program(*command: str, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    phases = [
        phase(tokens=1024),
        phase("decay", tokens=1024, sequence_length=64, batch_sequences=2, rope_base=160_000)
        | {"decay_tokens": 1024, "final_rate": 0.1},
    ]
    table = recipe_table(write_texts(folder / "texts"), phases=phases, run={"log_every_steps": 1})
    table["evaluation"] = {"files": [table["data"]["files"][0]], "window": 32}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(table), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    pretrain(read_recipe(recipe), out, write=lambda line: None)
    return out


def losses(out: Path) -> list[float]:
    newest = latest_checkpoint(out)
    assert newest is not None
    return [entry["loss"] for entry in log_history_of(newest) if "loss" in entry]


def bits_per_byte(out: Path) -> float:
    stored: list[dict[str, Any]] = json.loads((out / "model" / "evaluation.json").read_text(encoding="utf-8"))
    return float(stored[0]["bits_per_byte"])


def check(out: Path, alone: Path) -> Path:
    """The run learned as one process does; returns its last checkpoint."""
    assert losses(out) == pytest.approx(losses(alone), rel=TOLERANCE)
    assert bits_per_byte(out) == pytest.approx(bits_per_byte(alone), rel=TOLERANCE)
    return all_checkpoints(out)[-1]


def test_two_replicas_under_torchrun_learn_as_one_process(recipe: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1")
    command = ("-m", "modernbert_decoder.cli", "train", "pretrain", str(recipe), "--out", str(out))
    run_program(*launcher, f"--master-port={free_port()}", *command, environment={})
    assert (check(out, alone) / "optimizer.pt").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_sharded_model_learns_as_one_and_goes_on_from_its_shards_under_accelerates_launcher(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_program(str(PROGRAM), str(recipe), str(out), str(free_port()), "pretrain", environment=FSDP)
    assert not (out / "model").exists()
    launcher = ("-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2")
    address = ("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    sharding = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    stored = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--mixed_precision", "no")
    command = ("-m", "modernbert_decoder.cli", "train", "pretrain", str(recipe), "--out", str(out))
    run_program(*launcher, *address, *sharding, *stored, *command, environment={})
    newest = check(out, alone)
    assert (newest / "pytorch_model_fsdp_0").is_dir()
    assert not (newest / "optimizer.pt").exists()
    model = ModernBertDecoderForCausalLM.from_pretrained(alone / "model")
    torch.nn.init.zeros_(model.lm_head.dense.weight)
    load_weights(model, newest)  # in this process alone
    whole = weights(out / "model")
    for name, tensor in model.state_dict().items():
        if name in whole:
            assert torch.equal(tensor, whole[name]), name
