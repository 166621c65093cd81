"""Equal to the installed transformers in float32: logits, states, attentions, losses and every gradient."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch_models import (
    LENGTHS,
    NAMES,
    PADDED,
    SIDES,
    TOLERANCE,
    error,
    gradients,
    main_output,
    needs_compiler,
    ours,
    padded_batch,
    pair,
    random_ids,
    worst,
)
from transformers import DynamicCache, StaticCache

BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "two bases": {"local_rope_theta": 10000.0},
    "narrow window": {"local_attention": 10},
    "biases": BIASES,
    "untied": {"tie_word_embeddings": False, "decoder_bias": False},
    "relu and tanh": {"hidden_activation": "relu", "classifier_activation": "gelu_new"},
    "full layers only": {"layer_types": ["full_attention"] * 4},
    "sliding layers only": {"layer_types": ["sliding_attention"] * 4},
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_language_model_equals_upstream(attention: str, length: int, side: str, use_cache: bool) -> None:
    mine, theirs = pair(attention=attention)
    batch = {**padded_batch(length, side), "use_cache": use_cache}
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    a, b = mine(**batch, **options), theirs(**batch, **options)
    assert error(a.logits, b.logits) < TOLERANCE
    assert error(a.loss, b.loss) < TOLERANCE
    assert (a.past_key_values is not None) == use_cache
    assert len(a.hidden_states) == 5
    assert all(error(x, y) < TOLERANCE for x, y in zip(a.hidden_states, b.hidden_states, strict=True))
    if attention == "eager":
        assert all(error(x, y) < TOLERANCE for x, y in zip(a.attentions, b.attentions, strict=True))
    assert worst(gradients(mine, a.loss), gradients(theirs, b.loss)) < TOLERANCE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("length", LENGTHS)
def test_fused_loss_and_its_gradients_equal_upstream(length: int, side: str) -> None:
    mine, theirs = pair(attention="sdpa")
    batch = padded_batch(length, side)
    a, b = mine(**batch, skip_logits=True), theirs(**batch)
    assert a.logits is None
    assert error(a.loss, b.loss) < TOLERANCE
    assert worst(gradients(mine, a.loss), gradients(theirs, b.loss)) < TOLERANCE


@pytest.mark.parametrize("length", [130, 300])  # dense masks and bands
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_architecture_equals_upstream(variant: str, length: int) -> None:
    if variant == "two bases" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 uses the global base in every layer")
    mine, theirs = pair(attention="sdpa", **VARIANTS[variant])
    batch = padded_batch(length, "left")
    a, b = mine(**batch), theirs(**batch)
    assert error(a.logits, b.logits) < TOLERANCE
    assert worst(gradients(mine, a.loss), gradients(theirs, b.loss)) < TOLERANCE


CHUNKS = {65: (40, 1, 24), 130: (70, 1, 59), 300: (100, 1, 1, 63, 1, 134)}


@pytest.mark.filterwarnings("ignore::UserWarning")  # a warning of the library's about running uncompiled
@pytest.mark.parametrize(
    ("attention", "kind", "total", "side"),
    [
        *product(("eager", "sdpa"), ("windowed",), (65, 130, 300), SIDES),
        *product(("eager", "sdpa"), ("unwindowed", "static"), (130,), SIDES),
        *product(("eager", "sdpa"), ("static",), (300,), ("left",)),
        *product(("flex_attention",), ("windowed", "static"), (65,), SIDES),
    ],
)
def test_cached_chunks_equal_upstream_without_a_cache(
    attention: str, kind: str, total: int, side: str
) -> None:
    _, theirs = pair(attention="sdpa" if attention == "flex_attention" else attention)
    mine = ours(attention=attention)
    batch = padded_batch(total, side)
    caches = {
        "windowed": lambda: DynamicCache(config=mine.config),
        "unwindowed": DynamicCache,
        "static": lambda: StaticCache(config=mine.config, max_cache_len=total + 20),
    }
    cache = caches[kind]()
    chunks, start = [], 0
    # FlexAttention would be compiled anew for every chunk.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for length in CHUNKS[total]:
            stop = start + length
            output = mine(
                batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                past_key_values=cache,
            )
            chunks.append(output.logits)
            start = stop
        whole = theirs(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    is_token = batch["attention_mask"].bool()
    assert error(torch.cat(chunks, 1)[is_token], whole[is_token]) < TOLERANCE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_through_a_cache_continued_in_chunks_equal_upstream(attention: str, side: str) -> None:
    mine, theirs = pair(attention=attention)
    batch = padded_batch(130, side)

    def loss(model: Any, lengths: tuple[int, ...]) -> torch.Tensor:
        cache, chunks, start = DynamicCache(config=mine.config), [], 0
        for length in lengths:
            stop = start + length
            inputs = {"attention_mask": batch["attention_mask"][:, :stop], "past_key_values": cache}
            chunks.append(model(batch["input_ids"][:, start:stop], **inputs).logits)
            start = stop
        logits, labels = torch.cat(chunks, 1)[:, PADDED:-1], batch["labels"][:, PADDED + 1 :]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    expected = gradients(theirs, loss(theirs, (130,)))
    continued = gradients(mine, loss(mine, (70, 1, 20, 39)))
    assert worst(continued, expected) < TOLERANCE
    if side != "left":  # upstream's own chunks; there it counts the positions of a chunk without its padding
        assert worst(continued, gradients(theirs, loss(theirs, (70, 1, 20, 39)))) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Model", "ForSequenceClassification"])
def test_states_and_weights_of_every_layer_equal_upstream(
    name: str, attention: str, length: int, side: str
) -> None:
    mine, theirs = pair(name, attention=attention)
    batch = padded_batch(length, side)
    del batch["labels"]
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    a, b = mine(**batch, **options), theirs(**batch, **options)
    assert error(main_output(a), main_output(b)) < TOLERANCE
    for field, count in (("hidden_states", 5), ("attentions", 4 * (attention == "eager"))):
        of_mine, of_theirs = a.get(field) or (), b.get(field) or ()
        assert len(of_mine) == count
        assert all(error(x, y) < TOLERANCE for x, y in zip(of_mine, of_theirs, strict=True))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([2, 0])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        ("regression", torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.25, -0.5]])),
    ],
)
def test_classifier_equals_upstream(
    problem_type: str, labels: torch.Tensor, attention: str, side: str
) -> None:
    changes = {"num_labels": 3, "problem_type": problem_type}
    mine, theirs = pair("ForSequenceClassification", attention=attention, **changes)
    batch = {**padded_batch(130, side), "labels": labels}
    a, b = mine(**batch), theirs(**batch)
    assert error(a.logits, b.logits) < TOLERANCE
    assert error(a.loss, b.loss) < TOLERANCE
    assert worst(gradients(mine, a.loss), gradients(theirs, b.loss)) < TOLERANCE


def test_packed_sequences_equal_upstream_without_a_cache() -> None:
    mine, theirs = pair(attention="sdpa")
    ids = random_ids(200)
    positions = torch.cat([torch.arange(80), torch.arange(70), torch.arange(50)])[None]
    a = mine(ids, position_ids=positions, use_cache=False)
    b = theirs(ids, position_ids=positions, use_cache=False)
    assert error(a.logits, b.logits) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_a_mask_of_four_dimensions_equals_upstream(form: str, heads: int, attention: str) -> None:
    mine, theirs = pair(attention=attention)
    visible = (torch.rand(2, heads, 80, 80) < 0.5) | torch.eye(80, dtype=torch.bool)
    visible = visible.tril()
    numbers = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    ids = random_ids(80)
    expected = theirs(ids, attention_mask=numbers).logits
    assert (
        error(mine(ids, attention_mask=visible if form == "boolean" else numbers).logits, expected)
        < TOLERANCE
    )
    assert error(mine(ids).logits, expected) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mask_per_layer_kind_equals_upstream(name: str, attention: str) -> None:
    mine, theirs = pair(name, attention=attention)
    queries, keys = torch.arange(80)[:, None], torch.arange(80)[None, :]
    causal = (keys <= queries)[None, None]
    chosen = (torch.rand(2, 1, 80, 80) < 0.5) | torch.eye(80, dtype=torch.bool)
    masks = {"full_attention": causal & chosen, "sliding_attention": causal & (keys > queries - 10)}
    lowest = torch.finfo(torch.float32).min
    numbers = {kind: torch.where(mask, 0.0, lowest) for kind, mask in masks.items()}
    ids = random_ids(80)
    expected = main_output(theirs(ids, attention_mask=numbers))
    for given in (masks, numbers):
        assert error(main_output(mine(ids, attention_mask=given)), expected) < TOLERANCE
    assert error(main_output(mine(ids)), expected) > 0.01
    swapped = dict(zip(numbers, reversed(numbers.values()), strict=True))
    assert error(main_output(mine(ids, attention_mask=swapped)), expected) > 0.01


@needs_compiler
@pytest.mark.parametrize(
    ("length", "side", "use_cache"), [(65, "left", True), (130, "none", False), (300, "right", True)]
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # a warning of the library's about running uncompiled
def test_flex_attention_equals_upstream_eager(length: int, side: str, use_cache: bool) -> None:
    mine = ours(attention="flex_attention")
    _, theirs = pair()
    batch = padded_batch(length, side)
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        a = mine(**batch, use_cache=use_cache, output_hidden_states=True)
        b = theirs(**batch, output_hidden_states=True)
    assert (a.past_key_values is not None) == use_cache
    for of_mine, of_theirs in zip([a.logits, *a.hidden_states], [b.logits, *b.hidden_states], strict=True):
        assert error(of_mine[is_token], of_theirs[is_token]) < TOLERANCE
