"""What a forward pass asks of a Hugging Face cache, and what differs there between releases.

Responsible for the name of the cache in arguments and outputs (`past_key_values`, renamed `cache` in
transformers 5.24), for the signatures of its methods, and for the paged cache of `generate_batch`. Must not
know masks or the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch.masks import KeySpan

CACHE_FIELD: Final = (
    "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
)
"""What this release of transformers calls the cache, in outputs and in the arguments of `forward`."""

AnyCache: TypeAlias = Cache | PagedAttentionCache
"""A paged cache holds many requests. Whoever fills it makes the masks, and says by further options of
`forward` where keys and values are read and written."""

_TAKES_LENGTH: Final = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters
# Before 5.24, the library's paged attention functions write the pages themselves.
_LAYERS_WRITE_PAGES: Final = "read_index" not in inspect.signature(PagedAttentionCache.update).parameters


def chosen_cache(past_key_values: object, cache: object) -> AnyCache | None:
    """The cache under either of its names.

    Raises:
        InputError: a `ValueError`: both names were used, or the old tuple format.
    """
    if past_key_values is not None and cache is not None:
        raise InputError("past_key_values and cache are two names of the same argument; pass only one.")
    chosen = cache if past_key_values is None else past_key_values
    if chosen is not None and not isinstance(chosen, AnyCache):
        raise InputError(
            f"past_key_values is of type {type(chosen).__name__}, but must be a cache of transformers, for "
            "example DynamicCache(config=model.config)."
        )
    return chosen


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache that grows, in which sliding layers keep what the next token can see."""
    return DynamicCache(config=config)


def seen_tokens(cache: AnyCache | None) -> int | Tensor:
    """How many tokens the cache has seen, also those that sliding layers have dropped; 0 if it is paged."""
    if not isinstance(cache, Cache):
        return 0
    seen: int | Tensor = cache.get_seq_length()
    # Static caches return the counter that they advance in place; masks may be evaluated after that.
    return seen.clone() if isinstance(seen, Tensor) else seen


def extended(
    cache: AnyCache,
    k: Tensor,
    v: Tensor,
    *,
    layer_idx: int,
    slots: Tensor,
    span: KeySpan | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Add keys and values (B, H, T, D) to one layer, and give all that it attends to: (B, H, S, D) twice.

    Args:
        cache: it is extended in place.
        k: the new keys.
        v: the new values.
        layer_idx: of the layer.
        slots: (T,), of the new tokens; caches of transformers 4 ask for them.
        span: of this layer, from `key_spans`; None if the cache is paged.
        options: of the attention function of this layer; a paged cache reads and replaces some.
    """
    both: tuple[Tensor, Tensor]
    if isinstance(cache, Cache):
        assert span is not None
        k, v = cache.update(k, v, layer_idx, {"cache_position": slots})
        # Layers with a window of 1 give every token they have seen, though they count none of them, and so do
        # layers of some releases that remember tokens to be cropped.
        both = (k, v) if k.shape[2] <= span.length else (k[:, :, -span.length :], v[:, :, -span.length :])
    elif _LAYERS_WRITE_PAGES:
        both = cache.update(k, v, layer_idx, kwargs=options)
    else:
        options["cache"] = cache
        both = k, v
    return both


def key_spans(
    cache: AnyCache | None,
    layer_kinds: Iterable[LayerKind],
    *,
    num_queries: int,
    past: int | Tensor,
    device: Any,
) -> dict[LayerKind, KeySpan]:
    """The key slots that each layer kind will attend to when `num_queries` tokens are added.

    A paged cache has none: who fills it decides.
    """
    spans: dict[LayerKind, KeySpan] = {}
    if isinstance(cache, PagedAttentionCache):
        return spans
    for layer_idx, kind in enumerate(layer_kinds):
        if kind in spans:
            continue
        if cache is None:
            spans[kind] = KeySpan(0, num_queries)
            continue
        query: Any = num_queries if _TAKES_LENGTH else torch.arange(num_queries, device=device) + past
        length, first = cache.get_mask_sizes(query, layer_idx)
        spans[kind] = KeySpan(first, length)
    return spans
