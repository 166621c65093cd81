"""Writes transformers_4_57.npz: inputs, weights and outputs of transformers 4.57.6's own classes.

Run it where that release is installed; the tests only read the file:

    pip install torch==2.13.0 transformers==4.57.6
    python tests/golden/make_transformers_4_57.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertDecoderForSequenceClassification,
)

RELEASE = "4.57.6"
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # full, sliding, sliding
    "num_attention_heads": 2,
    "pad_token_id": 95,
    "bos_token_id": 93,
    "cls_token_id": 93,
    "eos_token_id": 94,
    "sep_token_id": 94,
    "local_attention": 128,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 160000.0,  # this release uses the global one in every layer
    "num_labels": 3,
}
LENGTHS = (65, 130, 300)
PADDED = 20  # positions, in the first of two rows
STRIDE = 7  # every so many positions, logits and states are kept


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights with which attention is peaked and activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim == 1 or "embeddings" in name:
                parameter.copy_(0.1 * noise)
            else:
                gain = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
                parameter.copy_(gain * parameter.shape[1] ** -0.5 * noise)


def inputs(length: int, side: str) -> dict[str, torch.Tensor]:
    """Two rows of ids, the first padded on the given side ("none", "left" or "right")."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 90, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    if side != "none":
        padding = slice(0, PADDED) if side == "left" else slice(length - PADDED, length)
        mask[0, padding] = 0
        ids[0, padding] = CONFIG["pad_token_id"]
    return {"input_ids": ids, "attention_mask": mask}


def language_model(arrays: dict[str, Any]) -> None:
    model = ModernBertDecoderForCausalLM._from_config(
        ModernBertDecoderConfig(**CONFIG), attn_implementation="eager"
    )
    randomize(model, seed=0)
    arrays |= {f"causal_lm/weights/{name}": value.detach() for name, value in model.named_parameters()}
    for length in LENGTHS:
        for side in ("none", "left", "right"):
            batch = inputs(length, side)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model.zero_grad()
            output = model(**batch, labels=labels, output_hidden_states=True, output_attentions=True)
            output.loss.backward()
            prefix = f"causal_lm/{length}/{side}"
            arrays |= {f"{prefix}/{name}": value for name, value in batch.items()}
            arrays |= {f"{prefix}/labels": labels, f"{prefix}/loss": output.loss}
            arrays[f"{prefix}/logits"] = output.logits[:, ::STRIDE]
            arrays[f"{prefix}/hidden_states"] = torch.stack(output.hidden_states)[:, :, ::STRIDE]
            if length == LENGTHS[1] and side != "right":
                arrays[f"{prefix}/attentions"] = torch.stack(output.attentions)[:, :, :, ::STRIDE, ::STRIDE]
                arrays |= {f"{prefix}/gradients/{n}": p.grad.clone() for n, p in model.named_parameters()}


def classifier(arrays: dict[str, Any]) -> None:
    labels = {
        "single_label_classification": torch.tensor([2, 0]),
        "multi_label_classification": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        "regression": torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.25, -0.5]]),
    }
    for problem_type, of_type in labels.items():
        config = ModernBertDecoderConfig(**CONFIG, problem_type=problem_type)
        model = ModernBertDecoderForSequenceClassification._from_config(config, attn_implementation="eager")
        randomize(model, seed=1)
        if problem_type == "regression":
            arrays |= {f"classifier/weights/{n}": p.detach() for n, p in model.named_parameters()}
        for side in ("none", "left", "right"):
            batch = inputs(LENGTHS[1], side)
            output = model(**batch, labels=of_type)
            prefix = f"classifier/{problem_type}/{side}"
            arrays |= {f"{prefix}/{name}": value for name, value in batch.items()}
            arrays |= {f"{prefix}/labels": of_type, f"{prefix}/loss": output.loss}
            arrays[f"{prefix}/logits"] = output.logits


def main() -> None:
    if transformers.__version__ != RELEASE:
        raise SystemExit(f"transformers is {transformers.__version__}; install {RELEASE}")
    torch.set_num_threads(1)
    arrays: dict[str, Any] = {}
    language_model(arrays)
    classifier(arrays)
    numbers = {name: value.detach().numpy() for name, value in arrays.items()}
    numbers["config"] = np.array(json.dumps(CONFIG))
    np.savez_compressed(Path(__file__).with_name("transformers_4_57.npz"), **numbers)


if __name__ == "__main__":
    main()
