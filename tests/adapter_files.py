"""Random LoRA adapters in PEFT's format, written without PEFT. Everything follows from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.safetensors_files import write_safetensors

RANK = 4


def write_adapter(folder: Path, base: Path, *, seed: int = 0, scale: float = 1.0) -> Path:
    """An adapter of all query and value projections of a checkpoint; returns `folder`."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, shape in Checkpoint.open(base).architecture.tensor_shapes().items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for part, own in (("lora_A", (RANK, shape[1])), ("lora_B", (shape[0], RANK))):
                factor = generator.standard_normal(own, np.float32) * np.float32(scale * own[1] ** -0.5)
                tensors[f"{module}.{part}.weight"] = factor
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder
