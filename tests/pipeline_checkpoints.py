"""Random checkpoints of every head with the bundled model's tokenizer, which transformers loads as well."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import BUNDLED_ARCHITECTURE, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head
from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint

IDS: Mapping[str, Any] = {
    "vocab_size": BUNDLED_ARCHITECTURE.vocab_size,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "eos_token_ids": (2,),
}
CLASSIFIER = Head.SEQUENCE_CLASSIFICATION
NLI_LABELS = {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}


def write_with_tokenizer(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of a tiny architecture with these changes, and the bundled tokenizer beside it."""
    write_checkpoint(folder, tiny_architecture(**{**IDS, **changes}), seed=seed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_checkpoint(BUNDLED_MODEL) / name, folder / name)
    return folder
