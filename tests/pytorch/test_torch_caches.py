"""What continues from a cache of any kind equals the whole pass: narrow windows, gaps, masks of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_models import TOLERANCE, error, ours, pair, random_ids
from transformers import Cache, DynamicCache, StaticCache

CACHES = ("windowed", "unwindowed", "static")
STATIC_LENGTH = 220
KINDS = ("full_attention", "sliding_attention")


def new_cache(kind: str, model: Any) -> Cache:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=STATIC_LENGTH)
    return DynamicCache(config=model.config) if kind == "windowed" else DynamicCache()


def continued(model: Any, ids: Tensor, lengths: Sequence[int], cache: Cache, mask: Tensor) -> Tensor:
    """The logits of ids (B, T) found in chunks, each with its part of a mask (B, T) or (B, 1, T, S)."""
    chunks, stop = [], 0
    for chunk in ids.split(list(lengths), dim=1):
        start, stop = stop, stop + chunk.shape[1]
        if mask.ndim == 2:
            of_chunk = mask[:, :stop]
        else:
            columns = stop if isinstance(cache, DynamicCache) else mask.shape[-1]
            of_chunk = mask[:, :, start:stop, :columns]
        chunks.append(model(chunk, attention_mask=of_chunk, past_key_values=cache).logits)
    return torch.cat(chunks, 1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [1, 2])
def test_the_narrowest_windows_are_kept_through_a_cache(window: int, kind: str, attention: str) -> None:
    mine, theirs = pair(attention=attention, local_attention=2 * window)
    ids = random_ids(40)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = continued(mine, ids, (10, 1, 1, 5, 1, 22), new_cache(kind, mine), mask)
    whole = theirs(ids, attention_mask=mask, use_cache=False).logits
    assert error(logits[mask.bool()], whole[mask.bool()]) < TOLERANCE
    unmasked = mine(ids, use_cache=False).logits
    cache = new_cache(kind, mine)
    chunks = [mine(chunk, past_key_values=cache).logits for chunk in ids.split([10, 1, 7, 22], dim=1)]
    assert error(torch.cat(chunks, 1), unmasked) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_the_narrowest_window_equals_generation_without_a_cache(attention: str) -> None:
    model, ids = ours(attention=attention, local_attention=2), random_ids(10)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "min_new_tokens": 12}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_row_padded_on_the_right_continues_over_the_gap(kind: str, attention: str) -> None:
    mine, theirs = pair(attention=attention)
    ids = random_ids(160)
    mask = torch.ones_like(ids)
    mask[0, 80:100] = 0
    whole = theirs(ids, attention_mask=mask, use_cache=False).logits
    logits = continued(mine, ids, (100, 1, 1, 58), new_cache(kind, mine), mask)
    assert error(logits[mask.bool()], whole[mask.bool()]) < TOLERANCE


@torch.no_grad()
def test_sliding_layers_of_a_static_cache_hold_their_window_only() -> None:
    model = ours(attention="sdpa")
    cache = new_cache("static", model)
    model(random_ids(200), past_key_values=cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [STATIC_LENGTH, 64, 64, STATIC_LENGTH]


def own_mask(length: int, *, window: int | None) -> Tensor:
    """A random causal mask (2, 1, length, length)."""
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None, :]
    chosen = (torch.rand(2, 1, length, length) < 0.5) | (keys == queries)
    visible = chosen & (keys <= queries)
    return visible if window is None else visible & (keys > queries - window)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_a_mask_of_four_dimensions_is_cut_to_the_keys_of_each_layer(
    form: str, kind: str, attention: str
) -> None:
    mine, theirs = pair(attention=attention)
    ids = random_ids(130)
    # what a layer has dropped cannot be seen again; a cache without a window drops nothing
    visible = own_mask(130, window=None if kind == "unwindowed" else 64)
    lowest = torch.finfo(torch.float32).min
    numbers = torch.where(visible, 0.0, lowest)  # eager attention of transformers takes nothing else
    whole = theirs(ids, attention_mask=numbers, use_cache=False).logits
    assert error(mine(ids, use_cache=False).logits, whole) > 0.01
    mask = visible if form == "boolean" else numbers
    if kind == "static":
        rest = (0, STATIC_LENGTH - 130)
        mask = torch.nn.functional.pad(mask, rest, value=False if form == "boolean" else lowest)
    logits = continued(mine, ids, (100, 10, 1, 19), new_cache(kind, mine), mask)
    assert error(logits, whole) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_per_layer_kind_may_state_all_slots_or_only_those_attended_to(attention: str) -> None:
    model, ids = ours(attention=attention), random_ids(130)
    masks = {"full_attention": own_mask(130, window=None), "sliding_attention": own_mask(130, window=30)}
    whole = model(ids, attention_mask=masks).logits[:, 100:]
    for first in (0, 37):  # of the 63 slots that sliding layers keep, slot 37 is the first
        cache = new_cache("windowed", model)
        model(
            ids[:, :100],
            attention_mask={k: m[:, :, :100, :100] for k, m in masks.items()},
            **{"past_key_values": cache},
        )
        of_chunk = {
            "full_attention": masks["full_attention"][:, :, 100:],
            "sliding_attention": masks["sliding_attention"][:, :, 100:, first:],
        }
        logits = model(ids[:, 100:], attention_mask=of_chunk, past_key_values=cache).logits
        assert error(logits, whole) < TOLERANCE


@torch.no_grad()
def test_a_mask_that_states_other_slots_than_a_cache_has_is_refused() -> None:
    model, ids = ours(attention="sdpa"), random_ids(110)
    cache = model(ids[:, :100]).past_key_values
    for columns in (10, 100, 111):
        mask = torch.ones(2, 1, 10, columns, dtype=torch.bool)
        with pytest.raises(ValueError, match=f"{columns} columns, but there are 110 slots"):
            model(ids[:, 100:], attention_mask=mask, past_key_values=cache)
