"""Bytes that a decode step has to read, for every peer: the numerator of achieved GB/s.

The engine's figure is the package's own cost formula; a Llama's follows from its file and its cache.
"""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import SHAPES
from benchmarks.summary import ENGINE, LLAMA, Case
from modernbert_decoder.architecture import released_architecture

_LLAMA_CACHE_BYTES_PER_VALUE = 2  # float16 by default


def step_bytes(peer: str, case: Case, loaded: dict[str, Any], *, new_tokens: int) -> int:
    """Bytes of weights (once) and of keys and values (of every sequence) halfway through the new tokens."""
    length = case.prompt_tokens + new_tokens // 2
    if peer == LLAMA:
        shape = SHAPES[case.size]
        cache = 2 * shape.num_layers * shape.hidden_size * length * _LLAMA_CACHE_BYTES_PER_VALUE
        return int(loaded["file_bytes"]) + case.sequences * cache
    architecture = released_architecture(case.size)
    body = loaded["body_bytes_per_weight"] if peer == ENGINE else 4.0
    vocabulary = loaded["vocabulary_bytes_per_weight"] if peer == ENGINE else 4.0
    one = architecture.decode_bytes(
        body_bytes_per_weight=body, vocabulary_bytes_per_weight=vocabulary, context_length=length
    )
    return one + (case.sequences - 1) * architecture.kv_cache_bytes(length)
