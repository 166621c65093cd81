"""Which keys each query sees, in the form that each attention back end wants.

One rule decides: key slot j is visible to query slot i iff `start <= j <= i`, in sliding layers also
`j > i - window`, and slot j is no padding; `start` is where the query's own sequence begins, which differs
from 0 only for packed sequences. Slots count from the first token a cache has ever seen. Must not know the
network.

Shapes: B batch, T query tokens, S key tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch.banded import Band, additive_band


class BandMask(NamedTuple):
    """What `banded_attention` takes instead of a mask (B or 1, 1, T, S)."""

    numbers: Tensor


class PackedMask(NamedTuple):
    """What `packed_attention` takes instead of a mask: the lengths of each row's sequences, in turn."""

    lengths: tuple[tuple[int, ...], ...]


Mask = Tensor | BlockMask | BandMask | PackedMask | None
"""None: the back end needs none, since causality (queries and keys aligned at slot 0) says everything."""


class KeySpan(NamedTuple):
    """The key slots that a layer kind attends to in this call: `length` of them, from slot `first` on."""

    first: int
    length: int


@dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """Everything that decides which keys are seen in one forward pass.

    Attributes:
        batch_size: B.
        num_queries: T.
        past: slots before the first query; a tensor in caches made for compilation.
        spans: the keys of each layer kind.
        window: visible keys of a sliding layer, self included.
        padding: (B, past + T or more), True where a slot holds a token; None when there is no padding.
        starts: (B, T), the slot at which each query's sequence begins; None when none begins after slot 0.
        dtype: of additive masks.
        device: of every mask.
    """

    batch_size: int
    num_queries: int
    past: int | Tensor
    spans: Mapping[LayerKind, KeySpan]
    window: int
    padding: Tensor | None
    starts: Tensor | None
    dtype: torch.dtype
    device: torch.device

    def window_of(self, kind: LayerKind) -> int | None:
        """How many keys a layer of this kind sees; None: all."""
        return self.window if kind is LayerKind.SLIDING else None

    def num_slots(self) -> int:
        """Slots up to the last one that is filled now or that a layer attends to, empty ones included."""
        ends = [span.first + span.length for span in self.spans.values()]
        return max(ends if isinstance(self.past, Tensor) else [self.past + self.num_queries, *ends])


def build_masks(request: MaskRequest, implementation: str) -> dict[LayerKind, Mask]:
    """One mask per layer kind for an attention implementation by the library's name.

    Eager attention gets an additive mask (B or 1, 1, T, S), FlexAttention a block mask, FlashAttention the
    padding (B, S) or None, every other implementation a boolean mask (B or 1, 1, T, S). "sdpa" gets None
    wherever its own causal flag, or no mask at all, has the same meaning, a band where a sliding layer
    runs over a whole sequence much longer than its window, and lengths where packed sequences are whole.
    """
    masks: dict[LayerKind, Mask] = {}
    for kind, span in request.spans.items():
        window = request.window_of(kind)
        if "flash" in implementation:
            masks[kind] = _padding_of(request, span)
        elif implementation == "flex_attention":
            masks[kind] = _block_mask(request, span, window)
        elif implementation == "sdpa" and is_implied(request, kind):
            masks[kind] = None
        elif implementation == "sdpa" and window is not None and _is_banded(request, span):
            masks[kind] = _band(request, span)
        elif implementation == "sdpa" and window is None and _is_packed(request, span):
            assert request.starts is not None
            masks[kind] = PackedMask(sequence_lengths(request.starts.expand(request.batch_size, -1)))
        elif implementation == "eager":
            masks[kind] = additive(_visible(request, span, window), request.dtype)
        else:
            masks[kind] = _visible(request, span, window)
    return masks


def sequence_starts(position_ids: Tensor, past: int | Tensor) -> Tensor:
    """The slot at which each query's sequence begins (B, T), from positions that start anew in each sequence.

    A sequence ends where positions do not go up by one. The first one may continue what the cache holds: a
    query at position p has p earlier tokens, so its sequence began p slots before it.

    >>> sequence_starts(torch.tensor([[0, 1, 2, 0, 1]]), 0)
    tensor([[0, 0, 0, 3, 3]])
    >>> sequence_starts(torch.tensor([[2, 3, 0]]), 5)  # slots 5, 6, 7; the first sequence began at slot 3
    tensor([[3, 3, 7]])
    """
    indices = torch.arange(position_ids.shape[1], device=position_ids.device)
    is_continued = position_ids[:, 1:] == position_ids[:, :-1] + 1
    last_break = torch.where(is_continued, 0, indices[1:]).cummax(dim=1).values
    last_break = torch.nn.functional.pad(last_break, (1, 0))
    return torch.where(last_break > 0, past + last_break, past - position_ids[:, :1])


def sequence_lengths(starts: Tensor) -> tuple[tuple[int, ...], ...]:
    """The lengths of the sequences of each row, from `sequence_starts` of all slots from 0 on.

    >>> sequence_lengths(torch.tensor([[0, 0, 0, 3, 3], [0, 0, 0, 0, 0]]))
    ((3, 2), (5,))
    """
    return tuple(
        tuple(torch.unique_consecutive(row, return_counts=True)[1].tolist()) for row in starts.unbind()
    )


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers to add to the scores: 0 where visible, the lowest number elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)


def check_flash(request: MaskRequest) -> None:
    """Refuse what FlashAttention would compute as something else.

    It aligns the last query with the last key, so no key may be an empty slot; the library separates packed
    sequences for it in a single row, without cached tokens.

    Raises:
        InputError: a `ValueError`: empty slots, or packed sequences elsewhere.
    """
    is_tracing = torch.compiler.is_compiling()
    is_unknown = is_tracing and isinstance(request.past, Tensor)
    past = 0 if is_unknown else int(request.past)
    if is_unknown or request.num_slots() > past + request.num_queries:
        raise InputError(
            "FlashAttention would see the empty slots of a static cache. Use a DynamicCache, or "
            "attn_implementation='sdpa'."
        )
    if request.starts is not None and not is_tracing and (request.batch_size > 1 or past > 0):
        raise InputError(
            "FlashAttention separates packed sequences in one row without cached tokens, but there are "
            f"{request.batch_size} rows and {past} cached tokens. Pass all sequences in one row and no "
            "cache, or use attn_implementation='sdpa'."
        )


def sequence_positions(request: MaskRequest) -> Tensor:
    """The position of each query in its own sequence (B or 1, T), by which FlashAttention separates them."""
    slots = torch.arange(request.num_queries, device=request.device) + request.past
    return slots[None] if request.starts is None else slots - request.starts.clamp(min=0)


def is_implied(request: MaskRequest, kind: LayerKind) -> bool:
    """Whether `scaled_dot_product_attention` needs no mask: one query that sees every key, or plain causality
    from slot 0.
    """
    span, window = request.spans[kind], request.window_of(kind)
    if request.padding is not None or request.starts is not None or torch.compiler.is_exporting():
        return False
    if isinstance(request.past, Tensor):
        if torch.compiler.is_compiling():
            return False
        past = int(request.past)
    else:
        past = request.past
    if request.num_queries == 1:
        return span.first + span.length == past + 1 and (window is None or span.length <= window)
    return past == 0 and span.first == 0 and (window is None or request.num_queries <= window)


def _is_banded(request: MaskRequest, span: KeySpan) -> bool:
    """Whether queries and keys are the same tokens, and enough of them."""
    if torch.compiler.is_compiling() or isinstance(request.past, Tensor):
        return False
    is_whole = request.past == 0 and span == (0, request.num_queries)
    return is_whole and Band.is_worth_it(request.num_queries, window=request.window)


def _is_packed(request: MaskRequest, span: KeySpan) -> bool:
    """Whether whole sequences stand one after another, and nothing but their ends needs a mask."""
    if torch.compiler.is_compiling() or isinstance(request.past, Tensor) or request.padding is not None:
        return False
    return request.starts is not None and request.past == 0 and span == (0, request.num_queries)


def _band(request: MaskRequest, span: KeySpan) -> BandMask:
    band = Band.of(
        request.num_queries,
        window=request.window,
        padding=_padding_of(request, span),
        starts=request.starts,
        device=request.device,
    )
    return BandMask(additive_band(band, batch_size=request.batch_size, dtype=request.dtype))


def _visible(request: MaskRequest, span: KeySpan, window: int | None) -> Tensor:
    """The rule as a boolean tensor (B or 1, 1, T, S)."""
    queries = (torch.arange(request.num_queries, device=request.device) + request.past)[:, None]
    keys = (torch.arange(span.length, device=request.device) + span.first)[None, :]
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys > queries - window)
    visible = visible[None, None]
    if request.starts is not None:
        visible = visible & (keys >= request.starts[:, None, :, None])
    padding = _padding_of(request, span)
    if padding is not None:
        # The row of a query in left padding is then empty. Back ends take that as they do upstream: eager
        # attention weighs all keys alike, the others return zeros. Nobody reads these outputs.
        visible = visible & padding[:, None, None, :]
    return visible


def _block_mask(request: MaskRequest, span: KeySpan, window: int | None) -> BlockMask:
    """The rule as FlexAttention evaluates it, one pair of slots at a time."""
    padding, starts, past = _padding_of(request, span), request.starts, request.past
    if starts is not None:
        starts = starts.expand(request.batch_size, -1)

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = q + past, k + span.first
        visible = key <= query
        if window is not None:
            visible = visible & (key > query - window)
        if starts is not None:
            visible = visible & (key >= starts[b, q])
        if padding is not None:
            visible = visible & padding[b, k]
        return visible

    mask_mod: Callable[..., Any] = is_visible
    sizes = (request.batch_size, None, request.num_queries, span.length)
    return create_block_mask(mask_mod, *sizes, device=str(request.device))


def _padding_of(request: MaskRequest, span: KeySpan) -> Tensor | None:
    """The padding of a span (B, S); slots that no mask covers yet hold nothing."""
    padding = request.padding
    if padding is None:
        return None
    missing = span.first + span.length - padding.shape[1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing))
    return padding[:, span.first : span.first + span.length]
