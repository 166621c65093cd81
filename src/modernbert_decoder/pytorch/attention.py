"""From queries, keys and values to mixed values: the cache, then the attention back end by its library name.

Responsible for handing each layer its mask and its cached keys, and for the eager back end; the others are
the library's own functions, or a band of one. Must not know how masks are made.

Shapes: B batch, T query tokens, S key tokens, H heads, D head width, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.pytorch.banded import banded_attention
from modernbert_decoder.pytorch.caches import AnyCache, extended
from modernbert_decoder.pytorch.masks import BandMask, KeySpan, Mask, PackedMask, additive
from modernbert_decoder.pytorch.network import Attention
from modernbert_decoder.pytorch.products import causal_attention, is_faster

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class BackEnd:
    """Attends for every layer of one forward pass; the network's `Attend`.

    Attributes:
        implementation: the library's name of the attention function.
        masks: one per layer kind, in the form this implementation takes.
        cache: where keys and values of earlier tokens are, and where the new ones go.
        slots: of the new tokens (T,).
        options: further arguments of the attention function, such as those of FlashAttention.
        spans: the keys of each layer kind, for a cache that is not paged.
    """

    implementation: str
    masks: Mapping[LayerKind, Mask]
    cache: AnyCache | None
    slots: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[LayerKind, KeySpan] = field(default_factory=dict)
    _moved: dict[tuple[LayerKind, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, /
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, T, D) three times to mixed values (B, T, C), and to weights (B, H, T, S) if eager."""
        options = dict(self.options)
        if self.cache is not None:
            k, v = extended(
                self.cache,
                k,
                v,
                layer_idx=attention.layer_idx,
                slots=self.slots,
                span=self.spans.get(attention.kind),
                options=options,
            )
        mask = self.masks[attention.kind]
        dropout = attention.dropout if attention.training else 0.0
        if isinstance(mask, BandMask):
            numbers = self._moved_to(q.device, mask.numbers, attention.kind)
            mixed = banded_attention(q, k, v, numbers, dropout=dropout, scaling=attention.scaling)
            return mixed.flatten(2), None  # (B, T, C)
        if isinstance(mask, PackedMask):
            mixed = packed_attention(q, k, v, mask.lengths, dropout=dropout, scaling=attention.scaling)
            return mixed.flatten(2), None  # (B, T, C)
        is_causal = mask is None and self.implementation == "sdpa" and q.shape[2] == k.shape[2] > 1
        if is_causal and is_faster(q, dropout=dropout):
            return _causal(q, k, v, dropout=dropout, scaling=attention.scaling).flatten(2), None
        if isinstance(mask, Tensor):
            mask = self._moved_to(q.device, mask, attention.kind)
        mixed, weights = attention_function(self.implementation)(
            attention,
            q,
            k,
            v,
            mask,
            dropout=dropout,
            scaling=attention.scaling,
            sliding_window=attention.window,
            **options,
        )
        return mixed.flatten(2), weights  # (B, T, C)

    def _moved_to(self, device: torch.device, mask: Tensor, kind: LayerKind) -> Tensor:
        """A mask on the device of a layer, moved once for all layers that are there."""
        if mask.device == device:
            return mask
        key = (kind, device)
        if key not in self._moved:
            self._moved[key] = mask.to(device)
        return self._moved[key]


def attention_function(implementation: str) -> AttentionFunction:
    """The function that the library, or whoever registered one with it, calls by this name.

    Raises:
        KeyError: nobody registered that name.
    """
    if implementation == "eager":
        return eager_attention
    function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[implementation]
    return function


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[Sequence[int]], *, dropout: float, scaling: float
) -> Tensor:
    """Causal attention of each sequence to itself: (B, H, T, D) three times to (B, T, H, D).

    The work is the sum of the squares of the lengths, not the square of their sum, and no mask exists.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, of_row in enumerate(lengths):
        rows_of.setdefault(tuple(of_row), []).append(row)
    order = torch.tensor([row for rows in rows_of.values() for row in rows], device=q.device)
    if len(rows_of) > 1:
        q, k, v = (x.index_select(0, order) for x in (q, k, v))
    # The backward pass of one split is one concatenation; slices would each fill a whole gradient.
    sizes = [len(rows) for rows in rows_of.values()]
    groups = zip(*(x.split_with_sizes(sizes) for x in (q, k, v)), strict=True)
    mixed = []
    for of_rows, group in zip(rows_of, groups, strict=True):  # rows that are cut alike attend together
        pieces = zip(*(x.split_with_sizes(list(of_rows), dim=2) for x in group), strict=True)
        parts = [_causal(*piece, dropout=dropout, scaling=scaling) for piece in pieces]
        mixed.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
    return torch.cat(mixed).index_select(0, order.argsort()) if len(mixed) > 1 else mixed[0]


def _causal(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, scaling: float) -> Tensor:
    """(B, H, T, D) three times to (B, T, H, D)."""
    if is_faster(q, dropout=dropout):
        return causal_attention(q, k, v, scaling=scaling).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scaling
    ).transpose(1, 2)


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step: (B, H, T, D) to (B, T, H, D) and the weights (B, H, T, S)."""
    scores = (query @ key.transpose(-1, -2)) * scaling  # (B, H, T, S)
    is_boolean = attention_mask.dtype == torch.bool
    scores = scores + (additive(attention_mask, scores.dtype) if is_boolean else attention_mask)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
