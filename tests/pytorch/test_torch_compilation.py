"""Tracing: `torch.compile(fullgraph=True)` and `torch.export` compute what eager execution does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch_models import TOLERANCE, error, gradients, needs_compiler, ours, padded_batch, random_ids, worst
from transformers import StaticCache

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecations inside the compiler


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@needs_compiler
@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_compiled_training_step_equals_the_eager_one(skip_logits: bool) -> None:
    model, batch = ours(attention="sdpa", num_hidden_layers=2).train(), padded_batch(130, "right")
    expected = gradients(model, model(**batch).loss)
    compiled = torch.compile(model, fullgraph=True)
    assert worst(gradients(model, compiled(**batch, skip_logits=skip_logits).loss), expected) < TOLERANCE


@needs_compiler
def test_compiled_decoding_with_a_static_cache_equals_the_whole_forward_pass() -> None:
    model, ids = ours(attention="sdpa", num_hidden_layers=2), random_ids(80)
    cache = StaticCache(config=model.config, max_cache_len=90)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model(ids[:, :60], past_key_values=cache)
        steps = [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(60, 80)]
    assert error(torch.cat(steps, 1), whole[:, 60:]) < TOLERANCE


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_takes_other_lengths(strict: bool) -> None:
    model, batch = ours(attention="sdpa"), padded_batch(130, "left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    rows, length = torch.export.Dim("rows", max=64), torch.export.Dim("length", max=512)
    shape = {0: rows, 1: length}
    exported = torch.export.export(
        model,
        (),
        inputs,
        dynamic_shapes={"input_ids": shape, "attention_mask": shape, "use_cache": None},
        strict=strict,
    ).module()
    for length_now in (40, 130, 200):
        ids = random_ids(length_now, rows=3)
        mask = torch.ones_like(ids)
        values = exported(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert error(values, model(ids).logits) < TOLERANCE
