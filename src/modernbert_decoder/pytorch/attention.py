"""From queries, keys and values to mixed values: the cache, then the attention back end by its library name.

Responsible for handing each layer its mask and its cached keys, and for the eager back end; the others are
the library's own functions, or a band of one. Must not know how masks are made.

Shapes: B batch, T query tokens, S key tokens, H heads, D head width, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.pytorch.banded import banded_attention
from modernbert_decoder.pytorch.masks import BandMask, Mask, additive
from modernbert_decoder.pytorch.network import Attention

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class BackEnd:
    """Attends for every layer of one forward pass; the network's `Attend`.

    Attributes:
        implementation: the library's name of the attention function.
        masks: one per layer kind, in the form this implementation takes.
        cache: where keys and values of earlier tokens are, and where the new ones go.
        cache_position: slots of the new tokens (T,), which caches of transformers 4 ask for.
        options: further arguments of the attention function, such as those of FlashAttention.
    """

    implementation: str
    masks: Mapping[LayerKind, Mask]
    cache: Cache | None
    cache_position: Tensor | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, /
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, T, D) three times to mixed values (B, T, C), and to weights (B, H, T, S) if eager."""
        if self.cache is not None:
            position = {"cache_position": self.cache_position}
            k, v = self.cache.update(k, v, attention.layer_idx, position)
        mask = self.masks[attention.kind]
        dropout = attention.dropout if attention.training else 0.0
        if isinstance(mask, BandMask):
            numbers = mask.numbers.to(q.device)
            mixed = banded_attention(q, k, v, numbers, dropout=dropout, scaling=attention.scaling)
            return mixed.flatten(2), None  # (B, T, C)
        if isinstance(mask, Tensor):
            mask = mask.to(q.device)  # layers may be spread over devices
        mixed, weights = attention_function(self.implementation)(
            attention,
            q,
            k,
            v,
            mask,
            dropout=dropout,
            scaling=attention.scaling,
            sliding_window=attention.window,
            **self.options,
        )
        return mixed.flatten(2), weights  # (B, T, C)


def attention_function(implementation: str) -> AttentionFunction:
    """The function that the library, or whoever registered one with it, calls by this name.

    Raises:
        KeyError: nobody registered that name.
    """
    if implementation == "eager":
        return eager_attention
    function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[implementation]
    return function


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step: (B, H, T, D) to (B, T, H, D) and the weights (B, H, T, S)."""
    scores = (query @ key.transpose(-1, -2)) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        is_boolean = attention_mask.dtype == torch.bool
        scores = scores + (additive(attention_mask, scores.dtype) if is_boolean else attention_mask)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
