"""What a forward pass asks of a Hugging Face cache, and what differs there between releases.

Responsible for the name of the cache in arguments and outputs (`past_key_values`, renamed `cache` in
transformers 5.24) and for the signature of its methods. Must not know masks or the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch.masks import KeySpan

CACHE_FIELD: Final = (
    "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
)
"""What this release of transformers calls the cache, in outputs and in the arguments of `forward`."""

_TAKES_LENGTH: Final = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters


def chosen_cache(past_key_values: object, cache: object) -> Cache | None:
    """The cache under either of its names.

    Raises:
        InputError: a `ValueError`: both names were used, or the old tuple format.
    """
    if past_key_values is not None and cache is not None:
        raise InputError("past_key_values and cache are two names of the same argument; pass only one.")
    chosen = cache if past_key_values is None else past_key_values
    if chosen is not None and not isinstance(chosen, Cache):
        raise InputError(
            f"past_key_values is of type {type(chosen).__name__}, but must be a cache of transformers, for "
            "example DynamicCache(config=model.config)."
        )
    return chosen


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache that grows, in which sliding layers keep what the next token can see."""
    return DynamicCache(config=config)


def seen_tokens(cache: Cache | None) -> int | Tensor:
    """How many tokens the cache has seen, also those that sliding layers have dropped."""
    if cache is None:
        return 0
    seen: int | Tensor = cache.get_seq_length()
    # Static caches return the counter that they advance in place; masks may be evaluated after that.
    return seen.clone() if isinstance(seen, Tensor) else seen


def key_spans(
    cache: Cache | None,
    layer_kinds: Iterable[LayerKind],
    *,
    num_queries: int,
    past: int | Tensor,
    device: Any,
) -> dict[LayerKind, KeySpan]:
    """The key slots that each layer kind will attend to when `num_queries` tokens are added."""
    spans: dict[LayerKind, KeySpan] = {}
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
