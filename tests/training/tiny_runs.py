"""Runs of seconds for tests: text to train on, a recipe to change, and what they leave behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.strict_reading import read_section

WORDS = [
    *("the", "fox", "and", "a", "hen", "went", "over", "old", "hills", "to", "see", "what", "moon"),
    *("made", "of", "cheese", "or", "bread", "for", "them", "all"),
]
VOCAB_SIZE = 300


def write_texts(folder: Path, *, num_files: int = 3, num_lines: int = 60, seed: int = 0) -> list[str]:
    """Files of made-up sentences; returns their paths."""
    chosen = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(num_files):
        lines = [" ".join(chosen.choices(WORDS, k=chosen.randint(3, 20))) + "." for _ in range(num_lines)]
        file = folder / f"book-{i}.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files.append(str(file))
    return files


def phase(name: str = "pretrain", **changes: Any) -> dict[str, Any]:
    """A phase of 16 steps of 4 sequences of 32 tokens, unless changed."""
    base = {"name": name, "tokens": 2048, "sequence_length": 32, "batch_sequences": 4}
    return {**base, **changes}


def recipe_table(
    files: list[str], *, phases: list[dict[str, Any]] | None = None, **sections: Any
) -> dict[str, Any]:
    """What YAML would give for a tiny recipe; sections are merged into the defaults."""
    table: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "window": 8,
        },
        "tokenizer": {"train": {"vocab_size": VOCAB_SIZE}},
        "data": {"files": files, "text_documents": "line", "shuffle_documents": 50},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 1e-4},
        "phases": [phase()] if phases is None else phases,
        "run": {
            "micro_batch_tokens": 128,
            "checkpoint_every_steps": 5,
            "log_every_steps": 4,
            "peak_flops": 1e9,
            "sequence_multiple": 2,
        },
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section} if isinstance(section, dict) else section
    return table


def tiny_recipe(files: list[str], *, phases: list[dict[str, Any]] | None = None, **sections: Any) -> Recipe:
    """A tiny recipe."""
    return read_section(Recipe, recipe_table(files, phases=phases, **sections), source="tiny.yaml")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model or checkpoint folder."""
    return load_file(folder / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    """Bit for bit."""
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
