"""`generate` past the window: every method as upstream has it, the outputs of every step, continuing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_models import PAD, TOLERANCE, error, ours, pair, random_ids
from transformers import DynamicCache, StaticCache

from modernbert_decoder.pytorch.caches import CACHE_FIELD

PROMPT, NEW, WINDOW = 50, 60, 64
KINDS = ("full_attention", "sliding_attention")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def generated(model: Any, ids: torch.Tensor, *, new: int = NEW, **options: Any) -> Any:
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    stated = {"do_sample": False, "pad_token_id": PAD, **lengths, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **stated)


METHODS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 30, "top_p": 0.9, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "sampling with beams": {"do_sample": True, "num_beams": 3, "top_k": 20},
    "repetition penalty": {"repetition_penalty": 1.5},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_tokens_of_upstream(method: str) -> None:
    tokens = []
    for model in pair(attention="sdpa"):
        torch.manual_seed(1)
        tokens.append(generated(model, random_ids(PROMPT), new=NEW // 2, **METHODS[method]))
    assert tokens[0].shape[1] == PROMPT + NEW // 2 > WINDOW
    assert torch.equal(tokens[0], tokens[1])
    if method != "greedy":  # and the options change something
        greedy = generated(ours(attention="sdpa"), random_ids(PROMPT), new=NEW // 2)
        assert not torch.equal(tokens[0], greedy)


def test_every_step_returns_scores_states_and_weights_and_at_the_end_the_cache() -> None:
    model, ids = ours(local_rope_theta=10000.0), random_ids(PROMPT)
    wanted = ("scores", "logits", "hidden_states", "attentions")
    out = generated(model, ids, return_dict_in_generate=True, **{f"output_{name}": True for name in wanted})
    assert torch.equal(out.sequences, generated(model, ids))
    assert [len(out[name]) for name in wanted] == [NEW] * 4
    with torch.no_grad():
        whole = model(
            out.sequences[:, :-1], use_cache=False, output_hidden_states=True, output_attentions=True
        )
    assert error(torch.stack(out.logits, 1), whole.logits[:, PROMPT - 1 :]) < TOLERANCE
    assert torch.equal(torch.stack(out.scores, 1).argmax(-1), out.sequences[:, PROMPT:])
    for of_steps, expected in zip(zip(*out.hidden_states, strict=True), whole.hidden_states, strict=True):
        assert error(torch.cat(of_steps, 1), expected) < TOLERANCE
    assert all(weights.shape == (2, 2, PROMPT, PROMPT) for weights in out.attentions[0])
    for step in (1, 30, NEW - 1):
        row = PROMPT + step - 1
        for weights, expected, kind in zip(
            out.attentions[step], whole.attentions, model.config.layer_types, strict=True
        ):
            width = row + 1 if kind == "full_attention" else min(WINDOW, row + 1)
            assert weights.shape == (2, 2, 1, width)
            assert error(weights, expected[:, :, row : row + 1, row + 1 - width : row + 1]) < TOLERANCE
    cache = out[CACHE_FIELD]
    assert cache.get_seq_length() == PROMPT + NEW - 1
    assert [layer.keys.shape[-2] for layer in cache.layers] == [109, WINDOW - 1, WINDOW - 1, 109]


def counting(model: Any) -> list[int]:
    """The number of tokens of each forward pass."""
    lengths: list[int] = []

    def record(_: Any, __: Any, options: dict[str, Any], ___: Any) -> None:
        lengths.append(options["input_ids"].shape[1])

    model.model.register_forward_hook(record, with_kwargs=True)
    return lengths


def repeating() -> Any:
    """A model that mostly counts within its ten: after 37 comes 38, after 39 comes 30."""
    model = ours(attention="sdpa", tie_word_embeddings=False)
    following = torch.arange(96)
    following[:90] = following[:90] // 10 * 10 + (following[:90] + 1) % 10
    with torch.no_grad():
        model.lm_head.dense.weight.copy_(torch.eye(32))
        model.decoder.weight[following] = model.get_input_embeddings().weight
        for layer in model.model.layers:
            layer.attn.Wo.weight.mul_(0.3)
            layer.mlp.Wo.weight.mul_(0.3)
    return model


def test_prompt_lookup_spares_calls_and_changes_no_token() -> None:
    model, ids = repeating(), random_ids(PROMPT, rows=1)
    expected = generated(model, ids)
    lengths = counting(model)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), expected)
    assert len(lengths) < NEW / 2
    assert set(lengths[1:]) >= {4}  # candidates are checked three at a time, behind the last token
    assert len(expected[0, PROMPT:].unique()) > 5  # it does not just repeat one token


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["returned", "windowed", "unwindowed", "static"])
def test_generation_continues_from_the_cache_of_an_earlier_one(kind: str, attention: str) -> None:
    model, ids = ours(attention=attention, local_rope_theta=10000.0), random_ids(PROMPT)
    expected = generated(model, ids)
    options: dict[str, Any] = {"disable_compile": True, "return_dict_in_generate": True}
    if kind == "windowed":
        options[CACHE_FIELD] = DynamicCache(config=model.config)
    elif kind == "unwindowed":
        options[CACHE_FIELD] = DynamicCache()
    elif kind == "static":
        options[CACHE_FIELD] = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    first = generated(model, ids, new=NEW // 2, **options)
    lengths = counting(model)
    options[CACHE_FIELD] = first[CACHE_FIELD]
    second = generated(model, first.sequences, new=NEW // 2, **options)
    assert torch.equal(second.sequences, expected)
    assert lengths == [1] * (NEW // 2)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_cropped_past_the_window_twice_continues_exactly(attention: str, side: str) -> None:
    model, ids = ours(attention=attention, local_rope_theta=10000.0), random_ids(200)
    cache = DynamicCache(config=model.config)
    if not hasattr(cache, "activate_past_recording"):
        pytest.skip("this release of transformers cannot crop sliding layers past their window")
    cache.activate_past_recording()
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :20] = 0

    def run(start: int, stop: int) -> torch.Tensor:
        assert cache.get_seq_length() == start
        return model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits

    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        run(0, 150)
        cache.crop(-10)
        assert error(run(140, 165), whole[:, 140:165]) < TOLERANCE
        cache.crop(-20)
        assert error(run(145, 146), whole[:, 145:146]) < TOLERANCE
        cache.crop(0)
        assert error(run(146, 200), whole[:, 146:]) < TOLERANCE
