"""What training leaves out without changing its result: padding, other packed sequences, copies of logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_models import PAD, TOLERANCE, error, gradients, ours, random_ids, worst

from modernbert_decoder.pytorch import losses
from modernbert_decoder.pytorch.attention import packed_attention
from modernbert_decoder.pytorch.masks import sequence_lengths
from modernbert_decoder.pytorch.packing import Packing


class Spy:
    """Counts the tokens that reach the first layer, call by call."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        model.model.layers[0].register_forward_pre_hook(self._count)

    def _count(self, _layer: Any, arguments: tuple[Any, ...]) -> None:
        self.tokens.append(arguments[0].shape[:2].numel())


def batch(side: str, lengths: tuple[int, ...] = (300, 170, 40)) -> dict[str, Tensor]:
    rows = [random_ids(length, seed=i)[0] for i, length in enumerate(lengths)]
    longest = max(lengths)
    pads = [(longest - n, 0) if side == "left" else (0, longest - n) for n in lengths]
    ids = torch.stack([F.pad(row, pad, value=PAD) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack(
        [F.pad(torch.ones_like(row), pad, value=0) for row, pad in zip(rows, pads, strict=True)]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def all_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**inputs).loss
    return loss.detach(), gradients(model, loss)


def test_padding_on_the_right_costs_nothing_and_changes_nothing() -> None:
    model = ours(attention="sdpa").train()
    inputs = batch("right")
    spy = Spy(model)
    loss, grads = all_gradients(model, **inputs, skip_logits=True)
    plain_loss, plain_grads = all_gradients(model, **inputs, skip_logits=False)
    assert spy.tokens == [510, 900]
    assert error(loss, plain_loss) < TOLERANCE
    assert worst(grads, plain_grads) < TOLERANCE


@pytest.mark.parametrize("count_first", [True, False])
def test_padding_on_the_left_is_left_out_unless_it_predicts_the_first_token(count_first: bool) -> None:
    model = ours(attention="sdpa").train()
    inputs = batch("left")
    if not count_first:
        first = inputs["attention_mask"].argmax(1)
        inputs["labels"][torch.arange(3), first] = -100
    spy = Spy(model)
    loss, grads = all_gradients(model, **inputs, skip_logits=True)
    plain_loss, plain_grads = all_gradients(model, **inputs, skip_logits=False)
    assert spy.tokens[0] == (900 if count_first else 510)
    assert error(loss, plain_loss) < TOLERANCE
    assert worst(grads, plain_grads) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"output_hidden_states": True}, {"use_cache": True}, {"position_ids": torch.arange(300)[None]}],
    ids=lambda options: next(iter(options)),
)
def test_padding_stays_where_it_would_be_seen(options: dict[str, Any]) -> None:
    model = ours(attention="sdpa").train()
    spy = Spy(model)
    output = model(**batch("right"), skip_logits=True, **options)
    assert spy.tokens == [900]
    if "output_hidden_states" in options:
        assert output.hidden_states[-1].shape[:2] == (3, 300)


def test_embeddings_in_place_of_ids_lose_their_padding_too() -> None:
    model = ours(attention="sdpa").train()
    inputs = batch("right")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    spy = Spy(model)
    loss = model(**inputs, skip_logits=True).loss
    inputs.pop("input_ids")
    assert error(model(inputs_embeds=embeds, **inputs, skip_logits=True).loss, loss) < TOLERANCE
    assert spy.tokens == [510, 510]


@pytest.mark.parametrize(
    ("mask", "counted"),
    [
        ([[1, 0, 1], [1, 1, 1]], []),  # a gap
        ([[0, 0, 0], [1, 1, 1]], []),  # a row of padding alone
        ([[1, 0, 0], [0, 1, 1]], []),  # positions would go on
        ([[1, 1, 1], [1, 1, 1]], []),  # nothing to leave out
        ([[1, 1, 0], [1, 1, 1]], [(0, 2)]),  # padding with a target
    ],
)
def test_batches_whose_padding_matters_are_not_packed(
    mask: list[list[int]], counted: list[tuple[int, int]]
) -> None:
    targets = torch.full((2, 3), -100)
    for place in counted:
        targets[place] = 5
    assert Packing.of(torch.tensor(mask), targets, ignored=-100) is None


def test_packed_attention_is_each_sequences_own() -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64, requires_grad=True).unbind()
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3, 8], [0] * 9])
    mixed = packed_attention(q, k, v, sequence_lengths(starts), dropout=0.0, scaling=0.5)
    slots = torch.arange(9)
    visible = (slots <= slots[:, None]) & (slots >= starts[:, :, None])
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=0.5)
    assert error(mixed, plain.transpose(1, 2)) < 1e-12


@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_beside_logits_equals_the_plain_one_with_all_gradients(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(losses, "_MIN_CHUNK_TOKENS", 7)
    hidden = torch.randn(2, 15, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets = torch.randint(0, 11, (2, 15))
    targets[0, 3:6] = -100
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    loss, logits = losses.causal_lm_loss_and_logits(hidden, targets, weight, bias, transform=torch.tanh)
    plain_logits = F.linear(hidden.tanh(), weight, bias)
    plain = F.cross_entropy(plain_logits.flatten(0, 1), targets.flatten())
    assert error(logits, plain_logits) < 1e-12
    assert error(loss, plain) < 1e-12
    for of_loss, of_logits in ((1.0, 0.0), (3.0, 0.0), (0.0, 1.0), (2.0, 1.0)):

        def total(loss: Tensor, logits: Tensor, a: float = of_loss, b: float = of_logits) -> Tensor:
            parts = [a * loss] * (a != 0) + [b * logits.square().sum()] * (b != 0)
            return torch.stack(parts).sum()

        mine = torch.autograd.grad(total(loss, logits), leaves, retain_graph=True)
        theirs = torch.autograd.grad(total(plain, plain_logits), leaves, retain_graph=True)
        assert all(error(a, b) < 1e-12 for a, b in zip(mine, theirs, strict=True))


def test_a_training_step_with_logits_equals_one_through_a_hooked_projection() -> None:
    model = ours(attention="sdpa").train()
    hooked = copy.deepcopy(model)
    hooked.decoder.register_forward_hook(lambda *_: None)  # the projection is then called, as ever
    inputs = batch("right")
    loss, grads = all_gradients(model, **inputs)
    plain_loss, plain_grads = all_gradients(hooked, **inputs)
    assert error(loss, plain_loss) < TOLERANCE
    assert worst(grads, plain_grads) < TOLERANCE


def test_gradients_of_functional_calls_still_work() -> None:
    model = ours(attention="eager").train()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    ids = random_ids(20)

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(model, parameters, (ids,), {"labels": ids, "use_cache": False})
        loss: Tensor = output.loss
        return loss

    grads = torch.func.grad(loss_of)(parameters)
    expected = all_gradients(model, input_ids=ids, labels=ids)[1]
    assert worst(grads, expected) < TOLERANCE
