"""Tracing: `torch.compile(fullgraph=True)` and `torch.export` compute what eager execution does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch_models import TOLERANCE, error, gradients, needs_compiler, ours, padded_batch, random_ids, worst
from transformers import CompileConfig, StaticCache

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


class Recorder:
    """A back end that runs the graphs that were captured as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any, **_options: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def __deepcopy__(self, _memo: Any) -> Recorder:
        return self  # a copy of a compiler's configuration shares it


@pytest.mark.parametrize("name", ["Model", "ForSequenceClassification"])
def test_a_padded_batch_goes_through_one_graph_of_the_other_models(name: str) -> None:
    model, recorder = ours(name, attention="sdpa", num_hidden_layers=2), Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    for side in ("left", "right"):
        batch = padded_batch(130, side)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            a, b = compiled(**inputs), model(**inputs)
        if name == "Model":
            is_token = batch["attention_mask"].bool()
            assert error(a.last_hidden_state[is_token], b.last_hidden_state[is_token]) < TOLERANCE
        else:
            assert error(a.logits, b.logits) < TOLERANCE
    assert len(recorder.graphs) == 1


def test_generate_decodes_every_token_through_the_same_few_graphs() -> None:
    model, ids = ours(attention="sdpa", num_hidden_layers=2), random_ids(70)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    recorder = Recorder()
    config = CompileConfig(fullgraph=True, backend=recorder, mode="default")
    config._compile_all_devices = True  # the library's own way of compiling on a CPU
    options |= {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(model.generate(ids, **options), expected)
    assert 1 <= len(recorder.graphs) <= 2  # the library's cache counts in Python: first a constant, then any


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
    for length_now, padding in ((40, 10), (130, 70), (200, 10), (200, 0)):
        ids = random_ids(length_now, rows=3)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        values = exported(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():
            expected, unmasked = model(ids, attention_mask=mask).logits, model(ids).logits
        is_token = mask.bool()
        assert error(values[is_token], expected[is_token]) < TOLERANCE
        assert padding == 0 or error(values[is_token], unmasked[is_token]) > 1e-2
