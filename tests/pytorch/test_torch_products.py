"""Attention by matrix products: PyTorch's own in float32, with its gradients, up to bfloat16's rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert_decoder.architecture import Head
from modernbert_decoder.pytorch import ModernBertDecoderConfig, ModernBertDecoderForCausalLM, products
from modernbert_decoder.pytorch.attention import packed_attention
from modernbert_decoder.pytorch.banded import Band, additive_band, banded_attention

SCALING = 0.3
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def products_are_used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Products also where the processor has no instructions for them; returns their uses as they happen."""
    used: list[str] = []

    def is_faster(q: Tensor, *, dropout: float) -> bool:
        is_used = original(q, dropout=dropout)
        used.extend(["products"] * is_used)
        return is_used

    original = products.is_faster
    monkeypatch.setattr(products, "_has_bfloat16_products", lambda: True)
    for module in ("attention", "banded"):
        monkeypatch.setattr(f"modernbert_decoder.pytorch.{module}.is_faster", is_faster)
    return used


def _inputs(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


def _assert_alike(
    attend: Callable[..., Tensor], inputs: list[Tensor], reference: Callable[..., Tensor]
) -> None:
    """The outputs and gradients of `attend`, against those of `reference` on the same numbers in float32."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    mixed, expected = attend(*inputs), reference(*wide)
    upstream = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    actual = [mixed, *torch.autograd.grad(mixed, inputs, upstream)]
    wanted = [expected, *torch.autograd.grad(expected, wide, upstream.float())]
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("num_tokens", [2, 5, 128, 129, 300])
def test_causal_attention_equals_the_fused_kernel(num_tokens: int) -> None:
    _assert_alike(
        lambda q, k, v: products.causal_attention(q, k, v, scaling=SCALING),
        _inputs(2, 3, num_tokens, 16),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING),
    )


@pytest.mark.parametrize("num_tokens", [160, 171])
def test_a_band_of_packed_sequences_equals_the_fused_kernel(
    num_tokens: int, products_are_used: list[str]
) -> None:
    starts = (torch.arange(num_tokens) // 50 * 50).expand(2, -1)
    band = Band.of(num_tokens, window=8, padding=None, starts=starts, device=torch.device("cpu"))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        numbers = additive_band(band, batch_size=2, dtype=q.dtype)
        return banded_attention(q, k, v, numbers, dropout=0.0, scaling=SCALING)

    _assert_alike(attend, _inputs(2, 3, num_tokens, 16), attend)
    assert products_are_used == ["products"]  # not for the reference


def test_padding_leaves_no_trace_in_a_bands_gradients(products_are_used: list[str]) -> None:
    padding = torch.ones(2, 160, dtype=torch.bool)
    padding[0, :40] = False
    band = Band.of(160, window=8, padding=padding, starts=None, device=torch.device("cpu"))
    numbers = additive_band(band, batch_size=2, dtype=torch.bfloat16)
    inputs = _inputs(2, 3, 160, 16)
    mixed = banded_attention(*inputs, numbers, dropout=0.0, scaling=SCALING)
    gradients = torch.autograd.grad((mixed * padding[:, :, None, None]).sum(), inputs)
    assert products_are_used
    assert mixed.isfinite().all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[0, :, :40].any()
        assert gradient[0, :, 40:].any()


def test_packed_attention_by_products_is_each_sequences_own(products_are_used: list[str]) -> None:
    lengths = [(40,), (10, 30), (40,), (10, 30), (1, 38, 1)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, lengths, dropout=0.0, scaling=SCALING)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for row, of_row in enumerate(lengths):
            parts = [x[row : row + 1].split(of_row, dim=2) for x in (q, k, v)]
            mixed = [
                F.scaled_dot_product_attention(*part, is_causal=True, scale=SCALING)
                for part in zip(*parts, strict=True)
            ]
            rows.append(torch.cat(mixed, dim=2))
        return torch.cat(rows).transpose(1, 2)

    _assert_alike(attend, _inputs(5, 3, 40, 16), one_by_one)
    assert products_are_used


@pytest.mark.parametrize("form", ["whole", "packed", "padded"])
def test_a_models_loss_and_gradients_are_those_of_the_fused_kernel(
    form: str, products_are_used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = ModernBertDecoderConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=8,
        pad_token_id=0,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
    )
    assert config.to_architecture(Head.CAUSAL_LM).head_dim == 32
    model = ModernBertDecoderForCausalLM(config).train()
    ids = torch.randint(1, 97, (2, 160))
    arguments = {"input_ids": ids, "labels": ids}
    if form == "packed":
        arguments["position_ids"] = torch.arange(160) % 70 + torch.zeros_like(ids)
    if form == "padded":
        arguments["attention_mask"] = (torch.arange(160) >= torch.tensor([[0], [30]])).long()
        arguments["labels"] = ids.masked_fill(arguments["attention_mask"] == 0, -100)
    results, uses = [], []
    for has_products in (True, False):
        monkeypatch.setattr(products, "_has_bfloat16_products", lambda has=has_products: has)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**arguments, skip_logits=True, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        uses.append(len(products_are_used))
    assert uses[0] == uses[1] > 0  # in the first pass alone
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("reason", ["float32", "no gradients", "dropout", "no instructions"])
def test_the_fused_kernel_stays_where_it_is_better(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bfloat16_products", lambda: reason != "no instructions")
    q = torch.ones(1, 1, 4, 8, dtype=torch.float32 if reason == "float32" else torch.bfloat16)
    q.requires_grad_(reason != "no gradients")
    assert not products.is_faster(q, dropout=0.1 if reason == "dropout" else 0.0)


def test_products_are_chosen_for_training_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bfloat16_products", lambda: True)
    q = torch.ones(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert products.is_faster(q, dropout=0.0)
    with torch.no_grad():
        assert not products.is_faster(q, dropout=0.0)


def test_functional_transforms_get_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bfloat16_products", lambda: True)
    q = torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)

    def total(x: Tensor) -> Tensor:
        return packed_attention(x, x, x, [(4,)], dropout=0.0, scaling=1.0).float().sum()

    assert torch.func.grad(total)(q).isfinite().all()
    assert not torch.func.vmap(lambda x: x * products.is_faster(x, dropout=0.0))(q.requires_grad_()).any()
