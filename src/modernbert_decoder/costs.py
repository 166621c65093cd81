"""What a decoder costs: tensors, parameters, FLOPs, cache bytes and bytes read per step, from its shape
alone.

Responsible for the formulas that benchmarks, `mbd info` and tests share. Must not know about files, kernels
or how weights are packed; callers say how many bytes a weight takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from modernbert_decoder.spellings import Head, LayerKind

if TYPE_CHECKING:
    from modernbert_decoder.architecture import DecoderArchitecture

FLOAT32_BYTES: Final = 4


EMBEDDING: Final = "model.embeddings.tok_embeddings.weight"
VOCABULARY: Final = "decoder.weight"  # in an untied model; a tied one computes with the embedding
CLASSIFIER: Final = "classifier.weight"


class ReleasedSize(NamedTuple):
    """The shape of one released Ettin decoder."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int


RELEASED_SIZES: Final[Mapping[str, ReleasedSize]] = {
    "17m": ReleasedSize(7, 256, 384, 4),
    "32m": ReleasedSize(10, 384, 576, 6),
    "68m": ReleasedSize(19, 512, 768, 8),
    "150m": ReleasedSize(22, 768, 1152, 12),
    "400m": ReleasedSize(28, 1024, 2624, 16),
    "1b": ReleasedSize(28, 1792, 3840, 28),
}
RELEASED_CONTEXT: Final = 7999


def tensor_shapes(architecture: DecoderArchitecture) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name -> shape, in the order of the forward pass.

    Linear weights are (outputs, inputs). A tied `decoder.weight` is not listed. The bare model's names carry
    the `model.` prefix too, so that layers are called the same under every head.
    """
    a = architecture
    width = a.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (a.vocab_size, width)}
    shapes |= _norm("model.embeddings.norm", width, bias=a.norm_bias)
    for i in range(a.num_hidden_layers):
        layer = f"model.layers.{i}"
        if i > 0:  # layer 0 follows the norm of the embeddings and has none of its own
            shapes |= _norm(f"{layer}.attn_norm", width, bias=a.norm_bias)
        for name in ("q_proj", "k_proj", "v_proj", "Wo"):
            shapes |= _linear(f"{layer}.attn.{name}", width, width, bias=a.attention_bias)
        shapes |= _norm(f"{layer}.mlp_norm", width, bias=a.norm_bias)
        shapes |= _linear(f"{layer}.mlp.Wi", 2 * a.intermediate_size, width, bias=a.mlp_bias)
        shapes |= _linear(f"{layer}.mlp.Wo", width, a.intermediate_size, bias=a.mlp_bias)
    shapes |= _norm("model.final_norm", width, bias=a.norm_bias)
    return shapes | _head_shapes(a)


def num_parameters(architecture: DecoderArchitecture) -> int:
    """Values in all tensors, a tied vocabulary matrix counted once."""
    return sum(math.prod(shape) for shape in tensor_shapes(architecture).values())


def flops_per_token(architecture: DecoderArchitecture, context_length: int, *, with_head: bool) -> int:
    """Floating-point operations for one token that is the last of `context_length`, 2 per multiply-add.

    Counts the matrix products and attention over visible keys: `context_length` in full layers, at most the
    window in sliding ones. Norms, activations, softmax and rotation are left out: under 1 % at the released
    sizes.
    """
    a = architecture
    width = a.hidden_size
    linear = a.num_hidden_layers * (4 * width * width + 3 * width * a.intermediate_size)
    attention = 2 * width * _visible_keys(a, context_length)  # q @ k and weights @ v
    head = sum(math.prod(shape) for shape in _head_shapes(a).values() if len(shape) == 2)
    if a.head is Head.CAUSAL_LM and a.tie_word_embeddings:
        head += a.vocab_size * width
    return 2 * (linear + attention + (head if with_head else 0))


def kv_cache_bytes(architecture: DecoderArchitecture, length: int, *, bytes_per_value: int) -> int:
    """Bytes of keys and values of one sequence when sliding layers keep at most their window."""
    return 2 * architecture.hidden_size * bytes_per_value * _visible_keys(architecture, length)


def naive_kv_cache_bytes(architecture: DecoderArchitecture, length: int, *, bytes_per_value: int) -> int:
    """Bytes of keys and values of one sequence when every layer keeps every position."""
    return 2 * architecture.hidden_size * bytes_per_value * length * architecture.num_hidden_layers


def decode_bytes(
    architecture: DecoderArchitecture,
    *,
    body_bytes_per_weight: float,
    vocabulary_bytes_per_weight: float,
    context_length: int,
) -> int:
    """Bytes read to decode one token of one sequence, the token itself being the last of `context_length`.

    Matrices of the layers and of the head count `body_bytes_per_weight`, the vocabulary matrix
    `vocabulary_bytes_per_weight` (scales included: 8-bit blocks of 32 with a float32 scale are 1.125). Norms
    and biases are float32, and so are the keys and values of the visible positions. The embedding lookup
    reads one row.
    """
    a = architecture
    vectors = body = vocabulary = 0
    for name, shape in tensor_shapes(a).items():
        if len(shape) == 1:
            vectors += shape[0]
        elif name not in (EMBEDDING, VOCABULARY):
            body += math.prod(shape)
    vocabulary = a.hidden_size  # the embedding row
    if a.head is Head.CAUSAL_LM:
        vocabulary += a.vocab_size * a.hidden_size
    weights = (
        body * body_bytes_per_weight + vocabulary * vocabulary_bytes_per_weight + vectors * FLOAT32_BYTES
    )
    return math.ceil(weights) + kv_cache_bytes(a, context_length, bytes_per_value=FLOAT32_BYTES)


def _visible_keys(architecture: DecoderArchitecture, length: int) -> int:
    """Visible keys of the last of `length` positions, summed over the layers."""
    if length < 0:
        raise ValueError(f"The length is {length}, but must not be negative.")
    return sum(
        length if kind is LayerKind.FULL else min(length, architecture.window)
        for kind in architecture.layer_kinds
    )


def _head_shapes(a: DecoderArchitecture) -> dict[str, tuple[int, ...]]:
    width = a.hidden_size
    if a.head is Head.NONE:
        return {}
    name = "lm_head" if a.head is Head.CAUSAL_LM else "head"
    shapes = _linear(f"{name}.dense", width, width, bias=a.classifier_bias)  # yes, the LM head obeys it too
    shapes |= _norm(f"{name}.norm", width, bias=a.norm_bias)
    if a.head is Head.SEQUENCE_CLASSIFICATION:
        return shapes | _linear("classifier", a.num_labels, width, bias=a.classifier_bias)
    decoder = _linear("decoder", a.vocab_size, width, bias=a.decoder_bias)
    if a.tie_word_embeddings:
        del decoder[VOCABULARY]
    return shapes | decoder


def _linear(name: str, outputs: int, inputs: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    if bias:
        shapes[f"{name}.bias"] = (outputs,)
    return shapes


def _norm(name: str, width: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,)}
    if bias:
        shapes[f"{name}.bias"] = (width,)
    return shapes
