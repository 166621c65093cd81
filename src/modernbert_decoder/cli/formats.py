"""The weight formats that `mbd info` and `mbd bench` compare, and the bytes a decode step reads in each.

It knows schemes and cost formulas; it measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.quantization import QuantizationScheme, fused_shapes

# As `--dtype` and `--vocabulary-dtype` spell them.
COMPARED: Final = (("float32", None), ("int8", None), ("int4", None), ("int4", "int4"))


def compared_schemes() -> Mapping[str, QuantizationScheme]:
    """Name -> scheme, from the largest to the smallest."""
    schemes = (QuantizationScheme.named(dtype, vocabulary) for dtype, vocabulary in COMPARED)
    return {scheme.name: scheme for scheme in schemes}


def decode_bytes(
    architecture: DecoderArchitecture,
    scheme: QuantizationScheme,
    *,
    context_length: int,
    num_sequences: int = 1,
) -> int:
    """Bytes that one decode step of sequences of this length reads: the weights once for all."""
    body, vocabulary = bytes_per_weight(architecture, scheme)
    single = architecture.decode_bytes(
        body_bytes_per_weight=body,
        vocabulary_bytes_per_weight=vocabulary,
        context_length=context_length,
    )
    others = architecture.kv_cache_bytes(context_length) + math.ceil(architecture.hidden_size * vocabulary)
    return single + (num_sequences - 1) * others


def bytes_per_weight(architecture: DecoderArchitecture, scheme: QuantizationScheme) -> tuple[float, float]:
    """Means over the layers' matrices and over the vocabulary matrix: blocks depend on a matrix's width."""
    num_bytes = {True: 0.0, False: 0.0}
    num_weights = {True: 0, False: 0}
    for name, shape in fused_shapes(architecture).items():
        if len(shape) == 2:
            is_vocabulary = name in (EMBEDDING, VOCABULARY)
            matrix = scheme.format_of(name).fitted(shape[1])
            num_bytes[is_vocabulary] += math.prod(shape) * matrix.bytes_per_weight
            num_weights[is_vocabulary] += math.prod(shape)
    return num_bytes[False] / num_weights[False], num_bytes[True] / num_weights[True]
