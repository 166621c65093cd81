"""Small models of every head for tests of reading, and what they are asked one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import PAD, random_ids, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.llm import LLM

# Kernels add up in another order for one row and for many: float32 rounding through a few layers.
TOLERANCE = 1e-5
# Sums of log-probabilities of a few hundred tokens.
LOGPROB_TOLERANCE = 1e-4
CONTEXT = 700
WINDOW = 16
LABELS = {0: "no", 1: "yes", 2: "perhaps"}
DEADLOCK_SECONDS = 60


def folder_for(tmp: Path, head: Head, **changes: Any) -> Path:
    """A random checkpoint with the tokenizer of bytes."""
    labels = {"id2label": LABELS} if head is Head.SEQUENCE_CLASSIFICATION else {}
    architecture = tiny_architecture(window=WINDOW, head=head, **{**labels, **changes})
    return write_checkpoint(tmp / head.value, architecture)


def opened(folder: Path, **arguments: Any) -> LLM:
    """In float32, with the context of these tests."""
    return LLM(folder, **{"dtype": "float32", "threads": 1, "max_context": CONTEXT, **arguments})


def unpadded_ids(llm: LLM, length: int, *, seed: int = 0) -> list[int]:
    """Random ids without padding, which would be dropped at the end."""
    return [
        0 if token_id == PAD else token_id for token_id in random_ids(llm.architecture, length, seed=seed)
    ]


def naive_total(llm: LLM, text: str, candidate: str) -> float:
    """The log-probability of a candidate by scoring it together with its text."""
    whole = llm.tokenizer.encode(text + candidate)
    num_text = min(len(llm.tokenizer.encode(text)), len(whole) - 1)
    (score,) = llm.score([whole])
    return sum(score.logprobs[num_text - 1 :])
