"""The two wings compute the same: a checkpoint saved by one is run by the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch_models import SIDES, error, randomize
from transformers import DynamicCache

from checkpoints import open_runtime, random_ids, tiny_architecture, whole_logits, write_checkpoint
from modernbert_decoder.architecture import LayerKind, RotaryParameters
from modernbert_decoder.pytorch import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

# Both wings are float32, but the engine's kernels sum in another order. Measured: at most 4e-6, but 1.3e-5
# with yarn, where it grows with the length.
TOLERANCE = 1e-5
YARN_TOLERANCE = 2e-5

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "two bases": {
        "rotary": {
            LayerKind.FULL: RotaryParameters(),
            LayerKind.SLIDING: RotaryParameters(theta=10000.0),
        }
    },
    "untied, window of 16": {"tie_word_embeddings": False, "window": 16},
    "yarn": {
        "rotary": dict.fromkeys(
            LayerKind,
            RotaryParameters("yarn", 10000.0, factor=4.0, original_max_position_embeddings=256),
        )
    },
}


@pytest.mark.parametrize("length", [65, 130, 300])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_the_engine(tmp_path: Path, name: str, length: int) -> None:
    architecture = tiny_architecture(**ARCHITECTURES[name])
    folder = write_checkpoint(tmp_path / "model", architecture)
    ids = random_ids(architecture, length)
    model = ModernBertDecoderForCausalLM.from_pretrained(folder)
    assert model.model.architecture.rotary == architecture.rotary
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    reference = torch.tensor(whole_logits(open_runtime(folder), ids))
    assert error(logits, reference) < (YARN_TOLERANCE if name == "yarn" else TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_padded_rows_and_their_cached_chunks_equal_the_engine(tmp_path: Path, side: str) -> None:
    architecture = tiny_architecture(**ARCHITECTURES["two bases"])
    folder = write_checkpoint(tmp_path / "model", architecture)
    model, runtime = ModernBertDecoderForCausalLM.from_pretrained(folder), open_runtime(folder)
    lengths = (130, 130, 130) if side == "none" else (130, 90, 31)
    rows = [random_ids(architecture, length, seed=i) for i, length in enumerate(lengths)]
    ids, mask = torch.zeros(2, len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(-len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    cache, chunks, stop = DynamicCache(config=model.config), [], 0
    for chunk in ids.split([70, 1, ids.shape[1] - 71], dim=1):
        stop += chunk.shape[1]
        chunks.append(model(chunk, attention_mask=mask[:, :stop], past_key_values=cache).logits)
    for logits in (model(ids, attention_mask=mask).logits, torch.cat(chunks, 1)):
        for i, row in enumerate(rows):
            reference = torch.tensor(whole_logits(runtime, row))
            assert error(logits[i][mask[i].bool()], reference) < TOLERANCE


@pytest.mark.filterwarnings("ignore:transformers 4 will use:UserWarning")
def test_the_engine_runs_what_save_pretrained_wrote(tmp_path: Path) -> None:
    base = tiny_architecture(window=8, **ARCHITECTURES["two bases"])
    stated = {k: v for k, v in base.to_config(warn=False).items() if k != "architectures"}
    model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**stated)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    runtime = open_runtime(tmp_path)
    assert runtime.architecture.window == 8
    ids = random_ids(base, 130)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert error(logits, torch.tensor(whole_logits(runtime, ids))) < TOLERANCE
