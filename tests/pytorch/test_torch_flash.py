"""FlashAttention through the library's own path: unpadding, windows, packing, with its kernels computed here.

The kernels need a GPU; what stands in for them computes, on the CPU, what their documentation says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_models import LENGTHS, PAD, SIDES, TOLERANCE, error, ours, padded_batch, random_ids
from transformers import DynamicCache, StaticCache
from transformers import modeling_flash_attention_utils as library


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, window: tuple[int, int]
) -> Tensor:
    """(T, H, D) and twice (S, H, D) to (T, H, D): the last query stands at the last key."""
    queries = torch.arange(len(q))[:, None] + len(k) - len(q)
    keys = torch.arange(len(k))[None, :]
    visible = keys <= queries if causal else keys >= 0
    if window[0] >= 0:
        visible = visible & (keys >= queries - window[0])
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=visible, scale=scale).transpose(0, 1)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Puts the stand-ins where the library looks for the kernels; gives the names of those called."""
    called: set[str] = set()

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float = 1.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert dropout_p == 0.0
        called.add("dense")
        rows = zip(q, k, v, strict=True)
        return torch.stack(
            [one_sequence(*row, causal=causal, scale=softmax_scale, window=window_size) for row in rows]
        )

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: float = 0.0,
        softmax_scale: float = 1.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert dropout_p == 0.0
        called.add("of several lengths")
        of_q, of_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(of_q), max(of_k)) == (int(max_seqlen_q), int(max_seqlen_k))
        rows = zip(q.split(of_q), k.split(of_k), v.split(of_k), strict=True)
        return torch.cat(
            [one_sequence(*row, causal=causal, scale=softmax_scale, window=window_size) for row in rows]
        )

    functions = [flash_attn_func, flash_attn_varlen_func, library._pad_input, library._unpad_input]
    if hasattr(library, "_flash_with_kvcache_fn"):
        functions.insert(2, None)
    monkeypatch.setattr(library, "_lazy_imports", lambda *_, **__: functions)
    loaded = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn")
    for name in (*loaded, "_process_flash_kwargs_fn"):
        if hasattr(library, name):
            monkeypatch.setattr(library, name, None)  # it would keep what it found before
    return called


def flash_and_eager() -> tuple[Any, Any]:
    flash = ours(local_rope_theta=10000.0)
    flash.config._attn_implementation = "flash_attention_2"  # stated earlier, the library would ask for a GPU
    return flash, ours(local_rope_theta=10000.0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("length", LENGTHS)
def test_flash_attention_equals_eager(kernels: set[str], length: int, side: str) -> None:
    flash, eager = flash_and_eager()
    batch = padded_batch(length, side)
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        a = flash(**batch, output_hidden_states=True)
        b = eager(**batch, output_hidden_states=True)
    assert kernels == {"dense" if side == "none" else "of several lengths"}
    for mine, expected in zip([a.logits, *a.hidden_states], [b.logits, *b.hidden_states], strict=True):
        assert error(mine[is_token], expected[is_token]) < TOLERANCE


@pytest.mark.parametrize("side", SIDES)
def test_flash_attention_through_a_cache_equals_eager(kernels: set[str], side: str) -> None:
    flash, eager = flash_and_eager()
    batch = padded_batch(131, side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, chunks, stop = DynamicCache(config=flash.config), [], 0
    with torch.no_grad():
        for chunk in ids.split([100, 1, 30], dim=1):
            stop += chunk.shape[1]
            chunks.append(flash(chunk, attention_mask=mask[:, :stop], past_key_values=cache).logits)
        expected = eager(ids, attention_mask=mask).logits
    assert kernels
    assert error(torch.cat(chunks, 1)[mask.bool()], expected[mask.bool()]) < TOLERANCE


@pytest.mark.parametrize("firsts", [(0, 0, 0), (0, 90, 0), (5, 0, 3)], ids=str)
def test_packed_sequences_are_separated_for_flash_attention_as_for_others(
    kernels: set[str], firsts: tuple[int, ...]
) -> None:
    flash, eager = flash_and_eager()
    lengths = (80, 70, 50)
    ids = random_ids(sum(lengths), rows=1)
    positions = torch.cat([first + torch.arange(n) for first, n in zip(firsts, lengths, strict=True)])[None]
    with torch.no_grad():
        packed = flash(ids, position_ids=positions).logits
        expected = eager(ids, position_ids=positions).logits
        alone = [eager(each).logits for each in ids.split(lengths, dim=1)]
    assert kernels == {"of several lengths"}
    assert error(packed, expected) < TOLERANCE
    assert error(packed, torch.cat(alone, 1)) < 10 * TOLERANCE  # rotated by other angles


def test_a_mask_of_ones_joins_sequences_for_flash_attention_as_for_others(kernels: set[str]) -> None:
    flash, eager = flash_and_eager()
    ids = random_ids(110, rows=1)
    inputs = {"position_ids": torch.cat([torch.arange(80), torch.arange(30)])[None]}
    joined = {**inputs, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        mine, expected = flash(ids, **joined).logits, eager(ids, **joined).logits
        separated = eager(ids, **inputs).logits
    assert kernels == {"dense"}
    assert error(mine, expected) < TOLERANCE
    assert error(mine, separated) > 0.01


def test_lengths_beside_a_mask_are_refused(kernels: set[str]) -> None:
    flash, _ = flash_and_eager()
    ids, lengths = random_ids(110, rows=1), torch.tensor([0, 80, 110], dtype=torch.int32)
    stated = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 80, "max_length_k": 80}
    with torch.no_grad():
        alone = torch.cat([flash(each).logits for each in ids.split([80, 30], dim=1)], 1)
        assert error(flash(ids, **stated).logits, alone) < TOLERANCE
    with pytest.raises(ValueError, match="and no attention_mask"):
        flash(ids, **stated, attention_mask=torch.ones_like(ids))


def test_generation_with_flash_attention_gives_the_tokens_of_eager(kernels: set[str]) -> None:
    flash, eager = flash_and_eager()
    ids = random_ids(50)
    ids[1, :19] = PAD
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": PAD}
    options["attention_mask"] = (ids != PAD).long()
    assert torch.equal(flash.generate(ids, **options), eager.generate(ids, **options))
    assert kernels


def test_masks_and_caches_that_flash_attention_cannot_heed_are_refused(kernels: set[str]) -> None:
    flash, ids = flash_and_eager()[0], random_ids(70)
    with pytest.raises(ValueError, match="takes the padding alone"):
        flash(ids, attention_mask=torch.ones(2, 1, 70, 70, dtype=torch.bool).tril())
    for filled in (0, 30):
        cache = StaticCache(config=flash.config, max_cache_len=100)
        if filled:
            ours(attention="sdpa", local_rope_theta=10000.0)(ids[:, :filled], past_key_values=cache)
        with pytest.raises(ValueError, match="empty slots of a static cache"):
            flash(ids[:, filled:], past_key_values=cache)
    assert not kernels


def test_padding_per_layer_kind_is_heeded_by_flash_attention(kernels: set[str]) -> None:
    flash, eager = flash_and_eager()
    batch = padded_batch(100, "left")
    kinds = dict.fromkeys(("full_attention", "sliding_attention"), batch["attention_mask"])
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        mine = flash(batch["input_ids"], attention_mask=kinds).logits
        assert error(mine[is_token], eager(**batch).logits[is_token]) < TOLERANCE
    with pytest.raises(ValueError, match="takes the padding alone"):
        flash(batch["input_ids"], attention_mask={kind: mask[:1] for kind, mask in kinds.items()})
