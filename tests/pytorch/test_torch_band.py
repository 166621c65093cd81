"""Banded attention of sliding layers: equal to the dense mask, used where it pays, never T by T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_models import PADDED, TOLERANCE, error, gradients, ours, random_ids, worst
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modernbert_decoder.pytorch.banded import Band, additive_band, banded_attention


@pytest.mark.parametrize("length", [256, 257, 300, 319])
@pytest.mark.parametrize("window", [1, 5, 32, 33, 64])
def test_a_band_equals_attention_with_the_dense_mask(length: int, window: int) -> None:
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3))
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, -PADDED:] = False
    starts = torch.tensor([[0] * 100 + [100] * (length - 100), [0] * length])
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None, :]
    visible = ((keys <= queries) & (keys > queries - window))[None, None]
    visible = visible & padding[:, None, None, :] & (keys >= starts[:, None, :, None])
    band = Band.of(length, window=window, padding=padding, starts=starts, device=q.device)
    numbers = additive_band(band, batch_size=2, dtype=q.dtype)
    mixed = banded_attention(q, k, v, numbers, dropout=0.0, scaling=8**-0.5)
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~visible, torch.finfo(q.dtype).min)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    sees_something = visible.any(-1).squeeze(1)
    assert error(mixed[sees_something], expected[sees_something]) < TOLERANCE
    loss, reference = mixed[sees_something].square().sum(), expected[sees_something].square().sum()
    for mine, theirs in zip(
        torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(reference, (q, k, v)), strict=True
    ):
        assert error(mine, theirs) < TOLERANCE


def test_a_band_holds_two_blocks_of_keys_for_each_query() -> None:
    band = Band.of(8192, window=64, padding=None, starts=None, device=torch.device("cpu"))
    assert band.visible.shape == (1, 128, 64, 128)


def test_sliding_layers_use_the_band_from_four_windows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kinds = ours(attention="sdpa"), []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module: Any, *arguments: Any, **options: Any) -> Any:
        kinds.append(module.kind.value)
        return original(module, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", record)
    model(random_ids(255))
    assert kinds == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    kinds.clear()
    model(random_ids(256))
    assert kinds == ["full_attention", "full_attention"]


@pytest.mark.parametrize("lengths", [(70, 60), (180, 70, 150)])
def test_packed_sequences_need_no_dense_mask_in_full_layers(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    model, kinds, shapes = ours(attention="sdpa"), [], []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(module: Any, *arguments: Any, **options: Any) -> Any:
        kinds.append(module.kind.value)
        return original(module, *arguments, **options)

    def record_mask(*arguments: Any, attn_mask: Any = None, **options: Any) -> Any:
        shapes.append(None if attn_mask is None else tuple(attn_mask.shape[-2:]))
        return attend(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", record)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record_mask)
    ids = random_ids(sum(lengths))
    model(ids, position_ids=torch.cat([torch.arange(n) for n in lengths])[None], use_cache=False)
    is_banded = len(ids[0]) >= 256
    assert kinds == ([] if is_banded else ["sliding_attention"] * 2)
    of_full, of_sliding = [None] * len(lengths), (64, 128) if is_banded else (130, 130)
    assert shapes == [*of_full, of_sliding, of_sliding, *of_full]


def test_packed_sequences_in_a_band_are_separated() -> None:
    lengths = [180, 70, 150]
    ids = random_ids(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    eager, banded = ours(), ours(attention="sdpa")
    a = banded(ids, position_ids=positions, labels=ids)
    b = eager(ids, position_ids=positions, labels=ids)
    assert error(a.logits, b.logits) < TOLERANCE
    assert worst(gradients(banded, a.loss), gradients(eager, b.loss)) < TOLERANCE
