"""Losses: float32, averaged over a step's items, chunked with exact gradients; what a classifier pools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_models import PAD, TOLERANCE, error, gradients, ours, padded_batch, random_ids, worst

from modernbert_decoder.pytorch import classification, losses

# Products of bfloat16 are rounded to 8 bits, chunk by chunk or all at once.
BFLOAT16_TOLERANCE = 2e-2


def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return losses.fused_causal_lm_loss(hidden, targets, weight, bias, transform=lambda x: x)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(losses, "_MIN_CHUNK_TOKENS", 7)
    monkeypatch.setattr(losses, "_SOFTMAX_ROWS", 3)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.usefixtures("small_chunks")
def test_fused_loss_equals_the_plain_one_with_its_gradients(has_bias: bool) -> None:
    hidden = torch.randn(2, 15, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets = torch.randint(0, 11, (2, 15))
    targets[0, 3:6] = -100
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    loss = fused(hidden, weight, bias, targets)
    plain = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), targets.flatten())
    assert error(loss, plain) < 1e-12
    for mine, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        assert error(mine, theirs) < 1e-12
    assert torch.autograd.gradcheck(lambda *x: fused(*x, *[None] * (3 - len(x)), targets), leaves)


@pytest.mark.usefixtures("small_chunks")
def test_fused_loss_computes_gradients_only_where_they_are_wanted() -> None:
    hidden, weight, targets = (
        torch.randn(1, 9, 4, requires_grad=True),
        torch.randn(5, 4),
        torch.ones(1, 9).long(),
    )
    fused(hidden, weight, None, targets).backward()
    assert hidden.grad is not None
    assert not fused(hidden.detach(), weight, None, targets).requires_grad


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 1)
    rows: list[int] = []
    original = losses._replace_by_gradient

    def record(logits: Tensor, targets: Tensor) -> Tensor:
        rows.append(logits.shape[0])
        return original(logits, targets)

    monkeypatch.setattr(losses, "_replace_by_gradient", record)
    model, ids = ours(attention="sdpa"), random_ids(130)
    model(ids, labels=ids, skip_logits=True).loss.backward()
    assert sum(rows) == 2 * 129
    assert max(rows) == 64


class Quantized(Tensor):
    """As quantizing libraries do it: the module stays a Linear, the weight becomes another kind of tensor."""


class Adapted(torch.nn.Linear):
    """As adapters do it."""


@pytest.mark.parametrize(
    ("wrapping", "what"),
    [
        ("hook", r"torch\.nn\.modules\.linear\.Linear, its weight a Parameter"),
        ("backward hook", r"torch\.nn\.modules\.linear\.Linear, its weight a Parameter"),
        ("subclass", r"test_torch_losses\.Adapted"),
        ("quantized weight", "its weight a Quantized"),
    ],
)
def test_a_projection_that_must_be_called_is_not_bypassed(wrapping: str, what: str) -> None:
    model, ids = ours(), random_ids(20)
    if wrapping == "hook":
        model.decoder.register_forward_hook(lambda *_: None)
    elif wrapping == "backward hook":
        model.decoder.register_full_backward_hook(lambda *_: None)
    elif wrapping == "subclass":
        model.decoder.__class__ = Adapted
    else:
        weight = model.decoder.weight.detach().as_subclass(Quantized)
        model.decoder.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match=f"{what}.* Set skip_logits=False"):
        model(ids, labels=ids, skip_logits=True)
    assert torch.isfinite(model(ids, labels=ids).loss)


def test_tokens_without_a_label_cost_nothing() -> None:
    model, ids = ours(), random_ids(70)
    labels = ids.clone()
    labels[:, 10:] = -100
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    model(ids, labels=labels, skip_logits=True)
    assert rows == [2 * 9]


def test_skip_logits_follows_the_attribute_only_while_training() -> None:
    model, ids = ours(), random_ids(70)
    model.skip_logits = True
    assert model(ids, labels=ids).logits is not None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids).logits is not None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    with pytest.raises(ValueError, match="Pass labels"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_accumulated_gradients_equal_those_of_the_whole_batch(skip_logits: bool) -> None:
    model, ids = ours(attention="sdpa"), random_ids(80, rows=4)
    labels = ids.clone()
    labels[0, 10:] = -100  # the rows weigh differently
    options = {"skip_logits": skip_logits}
    whole = gradients(model, model(ids, labels=labels, **options).loss)
    num_items = (labels[:, 1:] != -100).sum()
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=num_items, **options).loss
        for i in range(4)
    ]
    assert worst(gradients(model, sum(parts)), whole) < TOLERANCE


@pytest.mark.parametrize(
    ("num_labels", "labels", "num_items"),
    [
        (3, torch.tensor([2, 0, 1, 1]), 4),
        (3, torch.rand(4, 3), 12),
        (1, torch.rand(4), 4),
    ],
    ids=["single label", "multi label", "regression"],
)
def test_accumulated_gradients_of_a_classifier_equal_those_of_the_whole_batch(
    num_labels: int, labels: Tensor, num_items: int
) -> None:
    model, ids = ours("ForSequenceClassification", num_labels=num_labels), random_ids(20, rows=4)
    whole = gradients(model, model(ids, labels=labels).loss)
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=num_items).loss for i in range(4)
    ]
    assert worst(gradients(model, sum(parts)), whole) < TOLERANCE


@pytest.mark.parametrize("skip_logits", [False, True])
def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(skip_logits: bool) -> None:
    model, ids = ours(attention="sdpa").to(torch.bfloat16), random_ids(70)
    output = model(ids, labels=ids, skip_logits=skip_logits)
    logits = model(ids).logits.float()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.dtype == torch.float32
    assert error(output.loss, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (1, torch.tensor([0.5, 2.0]), "regression"),
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.rand(2, 3), "multi_label_classification"),
    ],
)
def test_the_problem_type_follows_from_the_labels_and_is_kept(
    num_labels: int, labels: Tensor, expected: str
) -> None:
    model = ours("ForSequenceClassification", num_labels=num_labels)
    loss = model(random_ids(20), labels=labels).loss
    assert model.config.problem_type == expected
    assert torch.isfinite(loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["ids", "embeddings"])
@pytest.mark.parametrize("has_mask", [True, False])
def test_the_last_token_is_pooled_wherever_the_padding_is(side: str, form: str, has_mask: bool) -> None:
    if form == "embeddings" and not has_mask:
        pytest.skip("there is nothing to tell the padding by")
    model = ours("ForSequenceClassification")
    batch = padded_batch(100, side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    alone = model(ids[:1, mask[0].bool()]).logits
    if form == "ids":
        inputs: dict[str, Any] = {"input_ids": ids}
    else:
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if has_mask or side == "left":  # without it, a causal model sees left padding
        inputs["attention_mask"] = mask
    assert error(model(**inputs).logits[:1], alone) < TOLERANCE


def test_a_batch_without_mask_and_pad_id_is_refused_with_the_fix() -> None:
    model = ours("ForSequenceClassification")
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="attention_mask"):
        model(random_ids(20))
    assert model(random_ids(20, rows=1)).logits.shape == (1, 2)
    assert model(random_ids(20), attention_mask=torch.ones(2, 20)).logits.shape == (2, 2)


def test_the_head_runs_on_the_pooled_rows_only() -> None:
    model, shapes = ours("ForSequenceClassification"), []
    model.head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    model(random_ids(70))
    assert shapes == [(2, 32)]


def test_autocast_gives_the_same_loss_fused_or_not() -> None:
    model, ids = ours(attention="sdpa"), random_ids(70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, chunked = model(ids, labels=ids).loss, model(ids, labels=ids, skip_logits=True).loss
    assert plain.dtype == chunked.dtype == torch.float32
    assert error(chunked, plain) < TOLERANCE
    assert worst(gradients(model, chunked), gradients(model, plain)) < BFLOAT16_TOLERANCE


def test_padding_tokens_have_no_influence_on_the_loss() -> None:
    model = ours(attention="sdpa")
    batch = padded_batch(100, "right")
    other = {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] != PAD, 5)}
    assert error(model(**other).loss, model(**batch).loss) < TOLERANCE


def test_pooling_the_last_position_for_want_of_a_better_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(classification._LOGGER, "warning_once", said.append)
    model, mask = ours("ForSequenceClassification"), torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    embeds = model.get_input_embeddings()(random_ids(20))
    model(inputs_embeds=embeds[:1], attention_mask=mask)
    model(inputs_embeds=embeds, attention_mask=torch.ones(2, 20))
    assert not said
    model(inputs_embeds=embeds, attention_mask=mask)
    assert len(said) == 1
    assert "last position of every row is pooled" in said[0]
