"""Tiny random models of this package and of the installed transformers, with equal weights."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.models.modernbert_decoder import modeling_modernbert_decoder as upstream
from transformers.models.modernbert_decoder.configuration_modernbert_decoder import (
    ModernBertDecoderConfig as UpstreamConfig,
)

import modernbert_decoder.pytorch as wing
from modernbert_decoder.pytorch import ModernBertDecoderConfig

PAD, CLS, SEP = 95, 93, 94
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,  # full, sliding, sliding, full
    "num_attention_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": CLS,
    "cls_token_id": CLS,
    "eos_token_id": SEP,
    "sep_token_id": SEP,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 160000.0,
}
# Of float32; the arithmetic differs in nothing but the order of some sums.
TOLERANCE = 1e-5
NAMES = ("Model", "ForCausalLM", "ForSequenceClassification")
LENGTHS = (65, 130, 300)  # all past the window of 64
SIDES = ("none", "left", "right")
PADDED = 20  # positions, in the first of two rows

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on the CPU needs a C++ compiler",
)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights with which attention is peaked and activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim == 1 or "embeddings" in name:
                parameter.copy_(0.1 * noise)
            else:
                gain = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
                parameter.copy_(gain * parameter.shape[1] ** -0.5 * noise)


def ours(name: str = "ForCausalLM", *, attention: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """A model of this package in evaluation mode."""
    config = ModernBertDecoderConfig(**{**CONFIG, **changes})
    model = getattr(wing, f"ModernBertDecoder{name}")._from_config(config, attn_implementation=attention)
    randomize(model, seed)
    return model.eval()


def pair(name: str = "ForCausalLM", *, attention: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """The same model of this package and of transformers, in evaluation mode."""
    mine = ours(name, attention=attention, **changes)
    try:
        config = UpstreamConfig(**{**CONFIG, **changes})
    except StrictDataclassError as refusal:  # 5.16, where only one kind of layer is used
        pytest.skip(f"this release of transformers cannot express the model: {type(refusal).__name__}")
    theirs = getattr(upstream, f"ModernBertDecoder{name}")._from_config(config, attn_implementation=attention)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs.eval()


def random_ids(length: int, *, rows: int = 2, seed: int = 0) -> Tensor:
    """Ids (rows, length), none of them special."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 90, (rows, length), generator=generator)


def main_output(output: Any) -> Tensor:
    """The states of the bare model, the logits of the others."""
    values: Tensor = output.last_hidden_state if "last_hidden_state" in output else output.logits
    return values


def padded_batch(length: int, side: str) -> dict[str, Tensor]:
    """Two rows, the first one padded; with labels where there are tokens."""
    ids = random_ids(length)
    mask = torch.ones_like(ids)
    if side != "none":
        padding = slice(0, PADDED) if side == "left" else slice(length - PADDED, length)
        mask[0, padding], ids[0, padding] = 0, PAD
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def error(values: Tensor, reference: Tensor) -> float:
    """The largest absolute difference divided by the largest absolute value of the reference."""
    assert values.shape == reference.shape
    largest = reference.abs().max().item()
    return (values.detach() - reference).abs().max().item() / (largest or 1.0)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that is not frozen: all of them must have one."""
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in grads.items() if grad is None]
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


def worst(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest error over tensors of the same names."""
    assert mine.keys() == theirs.keys()
    return max(error(mine[name], theirs[name]) for name in mine)
