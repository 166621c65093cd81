"""The arithmetic of a ModernBERT decoder in plain PyTorch, to be read in one sitting.

Parameters and submodules carry the checkpoint's names. A model is `Embeddings`, then `Layer` after `Layer`,
then a LayerNorm called `final_norm`; a language model continues with `PredictionHead` and a projection on the
vocabulary, a classifier with another `PredictionHead` and a small projection. This module knows neither
Hugging Face nor masks, caches and losses: a layer is handed a function that attends.

Shapes: B batch, T query tokens, S key tokens, H heads, D head width, C model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert_decoder.architecture import (
    ACTIVATIONS,
    Activation,
    DecoderArchitecture,
    LayerKind,
    RotaryParameters,
)

_FUNCTIONS: Final[Mapping[Activation, Callable[[Tensor], Tensor]]] = {
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: partial(F.gelu, approximate="tanh"),
    Activation.RELU: F.relu,
    Activation.SILU: F.silu,
}
_DEFAULT_CUTOFF: Final = 3.0  # in standard deviations, where the configuration says None

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of one layer kind, each (B, T, D // 2), float32."""


class Attend(Protocol):
    """What a layer asks for when its queries, keys and values are ready.

    It takes them as (B, H, T, D) and returns the mixed values as (B, T, C) and, from back ends that compute
    them, the weights (B, H, T, S). Masks and cached keys are its business.
    """

    def __call__(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, /
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, T, D) three times to (B, T, C) and, from some, weights (B, H, T, S)."""
        ...


class Embeddings(nn.Module):
    """Token ids (B, T), or vectors in their place, to the normalized input of the first layer (B, T, C)."""

    def __init__(self, architecture: DecoderArchitecture) -> None:
        super().__init__()
        a = architecture
        self.tok_embeddings = nn.Embedding(a.vocab_size, a.hidden_size, padding_idx=a.pad_token_id)
        self.norm = _norm(a)
        self.drop = nn.Dropout(a.embedding_dropout)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """One of the two, (B, T) or (B, T, C), to (B, T, C)."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.tok_embeddings(input_ids)
        x: Tensor = self.drop(self.norm(inputs_embeds))
        return x


class Attention(nn.Module):
    """Multi-head attention with rotated queries and keys."""

    def __init__(self, architecture: DecoderArchitecture, layer_idx: int) -> None:
        super().__init__()
        a = architecture
        self.layer_idx = layer_idx
        self.kind = a.layer_kinds[layer_idx]
        self.window = a.window if self.kind is LayerKind.SLIDING else None
        self.head_dim = a.head_dim
        self.scaling = a.head_dim**-0.5
        self.is_causal = True  # back ends look for it here
        self.config: object = None  # and some for the configuration of the library; the model sets it
        self.dropout = a.attention_dropout
        self.q_proj = _linear(a.hidden_size, a.hidden_size, bias=a.attention_bias, std=a.initializer_range)
        self.k_proj = _linear(a.hidden_size, a.hidden_size, bias=a.attention_bias, std=a.initializer_range)
        self.v_proj = _linear(a.hidden_size, a.hidden_size, bias=a.attention_bias, std=a.initializer_range)
        self.Wo = _linear(a.hidden_size, a.hidden_size, bias=a.attention_bias, std=_residual_std(a))
        self.out_drop = nn.Dropout(a.attention_dropout)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """Normalized states (B, T, C) to what is added to the stream (B, T, C), and any weights."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        mixed, weights = attend(self, rotate(q, rotation), rotate(k, rotation), v)
        x = self.out_drop(self.Wo(mixed))
        return x, weights


class Mlp(nn.Module):
    """The gated feed-forward network: the first half of `Wi` is activated, the second is the gate."""

    def __init__(self, architecture: DecoderArchitecture) -> None:
        super().__init__()
        a = architecture
        std = a.initializer_range
        self.Wi = _linear(a.hidden_size, 2 * a.intermediate_size, bias=a.mlp_bias, std=std)
        self.activation = _FUNCTIONS[ACTIVATIONS[a.hidden_activation]]
        self.drop = nn.Dropout(a.mlp_dropout)
        self.Wo = _linear(a.intermediate_size, a.hidden_size, bias=a.mlp_bias, std=_residual_std(a))

    def forward(self, x: Tensor) -> Tensor:
        """Normalized states (B, T, C) to what is added to the stream (B, T, C)."""
        activated, gate = self.Wi(x).chunk(2, dim=-1)
        x = self.Wo(self.drop(self.activation(activated) * gate))
        return x


class Layer(nn.Module):
    """Attention and feed-forward network, each on the normalized residual stream and added to it."""

    def __init__(self, architecture: DecoderArchitecture, layer_idx: int) -> None:
        super().__init__()
        # The embedding has just been normalized, so layer 0 has no norm of its own (and no weight for one).
        self.attn_norm: nn.Module = nn.Identity() if layer_idx == 0 else _norm(architecture)
        self.attn = Attention(architecture, layer_idx)
        self.mlp_norm = _norm(architecture)
        self.mlp = Mlp(architecture)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """The stream (B, T, C) before and after this layer, and any attention weights."""
        attended, weights = self.attn(self.attn_norm(x), rotation, attend)
        x = x + attended
        x = x + self.mlp(self.mlp_norm(x))
        return x, weights


class PredictionHead(nn.Module):
    """The transformation before either projection: `lm_head` of a language model, `head` of a classifier."""

    def __init__(self, architecture: DecoderArchitecture) -> None:
        super().__init__()
        a = architecture
        self.dense = _linear(a.hidden_size, a.hidden_size, bias=a.classifier_bias, std=_residual_std(a))
        self.activation = _FUNCTIONS[ACTIVATIONS[a.classifier_activation]]
        self.norm = _norm(a)

    def forward(self, x: Tensor) -> Tensor:
        """Final states (..., C) to the input of the projection (..., C)."""
        x = self.norm(self.activation(self.dense(x)))
        return x


class RotaryEmbedding(nn.Module):
    """Cosines and sines for every layer kind, always in float32."""

    def __init__(self, architecture: DecoderArchitecture) -> None:
        super().__init__()
        self.head_dim = architecture.head_dim
        self.parameters_of: dict[LayerKind, RotaryParameters] = {
            kind: architecture.rotary[kind] for kind in LayerKind if kind in architecture.layer_kinds
        }
        for kind in self.parameters_of:
            self.register_buffer(_buffer_name(kind), self._frequencies(kind), persistent=False)

    def forward(self, position_ids: Tensor) -> dict[LayerKind, Rotation]:
        """Rotations for positions (B, T); kinds with equal parameters share one."""
        rotations: dict[LayerKind, Rotation] = {}
        for kind, parameters in self.parameters_of.items():
            twin = next((k for k in rotations if self.parameters_of[k] == parameters), None)
            if twin is not None:
                rotations[kind] = rotations[twin]
                continue
            angles = position_ids[..., None].float() * getattr(self, _buffer_name(kind))
            scaling = parameters.attention_scaling
            rotations[kind] = (angles.cos() * scaling, angles.sin() * scaling)
        return rotations

    def reset_frequencies(self) -> None:
        """Compute the frequencies anew, in float32, on the device where they are."""
        for kind in self.parameters_of:
            name = _buffer_name(kind)
            device = getattr(self, name).device
            setattr(self, name, self._frequencies(kind).to(device))

    def _frequencies(self, kind: LayerKind) -> Tensor:
        return torch.tensor(self.parameters_of[kind].inverse_frequencies(self.head_dim), dtype=torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # `model.to(bfloat16)` would round the frequencies and `to_empty` would leave them undefined.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_frequencies()
        return self


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate (B, H, T, D): element i of a head is paired with element i + D // 2. Computed in float32."""
    cos, sin = (table.unsqueeze(1) for table in rotation)  # (B, 1, T, D // 2)
    first, second = x.float().chunk(2, dim=-1)
    # No fused multiply-add: rounding each product keeps the bits, and small gradients, of the reference.
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def vocabulary_projection(architecture: DecoderArchitecture) -> nn.Linear:
    """`decoder`: C to V. A tied model replaces its weight by the embedding's."""
    a = architecture
    return _linear(a.hidden_size, a.vocab_size, bias=a.decoder_bias, std=_residual_std(a))


def label_projection(architecture: DecoderArchitecture) -> nn.Linear:
    """`classifier`: C to the number of labels."""
    a = architecture
    return _linear(a.hidden_size, a.num_labels, bias=a.classifier_bias, std=a.hidden_size**-0.5)


def initialize(module: nn.Module, *, initializer_range: float, cutoff_factor: float | None) -> None:
    """Initialize one module, not its children: matrices from a truncated normal distribution, biases zero.

    The standard deviation belongs to the role of the matrix and was decided where it was built;
    `initializer_range` is for matrices that others put in, such as a resized embedding.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        std = getattr(module, "initial_std", initializer_range)
        limit = (_DEFAULT_CUTOFF if cutoff_factor is None else cutoff_factor) * std
        nn.init.trunc_normal_(module.weight, mean=0.0, std=std, a=-limit, b=limit)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    elif isinstance(module, RotaryEmbedding):
        module.reset_frequencies()
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Linear | nn.LayerNorm) and bias is not None:
        nn.init.zeros_(bias)


def _linear(inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.initial_std = std  # type: ignore[assignment]
    return linear


def _norm(architecture: DecoderArchitecture) -> nn.LayerNorm:
    a = architecture
    return nn.LayerNorm(a.hidden_size, eps=a.norm_eps, bias=a.norm_bias)


def _residual_std(architecture: DecoderArchitecture) -> float:
    """For matrices that write into the residual stream, of which every layer has two."""
    return architecture.initializer_range / math.sqrt(2.0 * architecture.num_hidden_layers)


def _buffer_name(kind: LayerKind) -> str:
    return f"{kind.value}_inv_freq"


__all__ = [
    "Attend",
    "Attention",
    "Embeddings",
    "Layer",
    "Mlp",
    "PredictionHead",
    "RotaryEmbedding",
    "Rotation",
    "initialize",
    "label_projection",
    "rotate",
    "vocabulary_projection",
]
