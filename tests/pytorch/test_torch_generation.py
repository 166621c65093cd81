"""Caches and `generate`: however they are found, the tokens are those of the whole forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_models import PAD, TOLERANCE, error, ours, random_ids
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from modernbert_decoder.pytorch.caches import CACHE_FIELD

PROMPT, NEW = 50, 60  # together past the window of 64
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": PAD,
}


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **options})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["windowed", "unwindowed", "static"])
def test_logits_through_a_cache_equal_those_without(kind: str, attention: str) -> None:
    model, ids = ours(attention=attention, local_rope_theta=10000.0), random_ids(200)
    caches = {
        "windowed": lambda: DynamicCache(config=model.config),
        "unwindowed": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=220),
    }
    cache = caches[kind]()
    with torch.no_grad():
        chunks = [
            model(chunk, past_key_values=cache).logits for chunk in ids.split([100, 1, 1, 30, 1, 67], dim=1)
        ]
        whole = model(ids, use_cache=False).logits
    assert error(torch.cat(chunks, 1), whole) < TOLERANCE


def test_sliding_layers_keep_only_what_the_next_token_sees() -> None:
    model = ours()
    cache = model(random_ids(200)).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [200, 63, 63, 200]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_cache_cropped_past_the_window_continues_exactly() -> None:
    model, ids = ours(), random_ids(200)
    cache = DynamicCache(config=model.config)
    if not hasattr(cache, "activate_past_recording"):
        pytest.skip("this release of transformers cannot crop sliding layers past their window")
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
        cache.crop(-10)
        continued = model(ids[:, 140:], past_key_values=cache).logits
        whole = model(ids, use_cache=False).logits[:, 140:]
    assert error(continued, whole) < TOLERANCE


def test_both_names_of_the_cache_work_in_arguments_and_outputs() -> None:
    model, ids = ours(), random_ids(70)
    output = model(ids)
    assert output.past_key_values is output["past_key_values"] is output[CACHE_FIELD]
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        assert model(ids, **{name: cache})[CACHE_FIELD] is cache
    with pytest.raises(ValueError, match="two names of the same argument"):
        model(ids, past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match="of type tuple"):
        model(ids, past_key_values=((ids, ids),))


def test_packed_sequences_are_separated_with_and_without_a_cache() -> None:
    lengths = [80, 70, 50]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    ids = random_ids(sum(lengths))
    for attention in ("eager", "sdpa"):
        model = ours(attention=attention)
        with torch.no_grad():
            alone = torch.cat([model(x, use_cache=False).logits for x in ids.split(lengths, dim=1)], 1)
            for use_cache in (False, True):
                packed = model(ids, position_ids=positions, use_cache=use_cache).logits
                assert error(packed, alone) < TOLERANCE
            for stop in (170, 150, 100):  # inside the last sequence, between two, inside the second
                cache = model(ids[:, :stop], position_ids=positions[:, :stop]).past_key_values
                rest = model(ids[:, stop:], position_ids=positions[:, stop:], past_key_values=cache)
                assert error(rest.logits, alone[:, stop:]) < TOLERANCE


def test_greedy_tokens_equal_those_of_the_whole_forward_pass() -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT)
    expected = ids
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(expected, use_cache=False).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated(model, ids), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_greedy_tokens_do_not_depend_on_how_they_are_found(options: dict[str, Any]) -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT, rows=1)
    assert torch.equal(generated(model, ids, **options), generated(model, ids))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("draft_layers", [1, 4], ids=["weak draft", "perfect draft"])
def test_assisted_generation_past_the_window_equals_greedy(draft_layers: int) -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT, rows=1)
    draft = ours(attention="sdpa", num_hidden_layers=draft_layers)
    options = {"min_new_tokens": None}  # some releases refuse it here
    expected = generated(model, ids, **options)
    assert expected.shape[1] > 64
    assert torch.equal(generated(model, ids, assistant_model=draft, **options), expected)


def test_left_padding_does_not_change_the_tokens() -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT)
    padded = torch.cat([torch.full((2, 9), PAD), ids], 1)
    mask = (padded != PAD).long()
    assert torch.equal(generated(model, padded, attention_mask=mask)[:, 9:], generated(model, ids))


def test_beams_equal_beams_without_a_cache() -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT)
    cached = generated(model, ids, num_beams=3)
    assert torch.equal(cached, generated(model, ids, num_beams=3, use_cache=False))


def test_sampling_with_a_seed_is_reproducible_and_returns_several_sequences() -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT)
    options = {"do_sample": True, "top_k": 5, "num_return_sequences": 2}
    torch.manual_seed(1)
    first = generated(model, ids, **options)
    torch.manual_seed(1)
    assert torch.equal(generated(model, ids, **options), first)
    assert first.shape == (4, PROMPT + NEW)


def test_a_custom_processor_and_a_streamer_see_every_token() -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill(torch.arange(scores.shape[1]) != 7, -torch.inf)

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens.extend(value.flatten().tolist())

        def end(self) -> None:
            self.tokens.append(-1)

    model, ids, streamer = ours(), random_ids(PROMPT, rows=1), Streamer()
    processors = LogitsProcessorList([Only()])
    generated(model, ids, logits_processor=processors, streamer=streamer, max_new_tokens=5, min_new_tokens=5)
    assert streamer.tokens == [*ids[0].tolist(), 7, 7, 7, 7, 7, -1]


def test_generation_from_embeddings_equals_generation_from_ids() -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT)
    embeds = model.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(tokens, generated(model, ids)[:, PROMPT:])


def test_logits_to_keep_gives_the_last_or_the_chosen_positions() -> None:
    model, ids = ours(), random_ids(70)
    whole = model(ids).logits
    assert error(model(ids, logits_to_keep=3).logits, whole[:, -3:]) < TOLERANCE
    chosen = torch.tensor([0, 5, 69])
    assert error(model(ids, logits_to_keep=chosen).logits, whole[:, chosen]) < TOLERANCE
    rows: list[int] = []
    handle = model.decoder.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    model(ids, logits_to_keep=3)
    handle.remove()
    assert rows == [3]  # the others are never computed
    kept = model(ids, labels=ids, logits_to_keep=1)
    assert kept.logits.shape[1] == 1
    assert error(kept.loss, model(ids, labels=ids).loss) < TOLERANCE
