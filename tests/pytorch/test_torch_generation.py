"""Caches and `generate`: however they are found, the tokens are those of the whole forward pass."""

from __future__ import annotations

from importlib.metadata import version
from threading import Thread
from typing import Any

import pytest
import torch
from torch_models import PAD, TOLERANCE, error, ours, random_ids
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)

from checkpoints import byte_tokenizer
from modernbert_decoder.architecture import released_architecture
from modernbert_decoder.pytorch import ModernBertDecoderConfig, ModernBertDecoderForCausalLM
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_17m_draft_spares_a_32m_model_calls_and_changes_no_token() -> None:
    draft, model = (_of_released_size(size) for size in ("17m", "32m"))
    with torch.no_grad():  # so that some drafts are right: both mostly repeat what they read
        for each in (draft, model):
            each.model.embeddings.tok_embeddings.weight.mul_(4)
            each.lm_head.dense.weight.copy_(torch.eye(each.config.hidden_size))
    ids, calls = random_ids(PROMPT, rows=1), []
    model.register_forward_hook(lambda *_: calls.append(1))
    options = {"min_new_tokens": None, "max_new_tokens": 20, "eos_token_id": None}
    expected = generated(model, ids, **options)
    num_alone = len(calls)
    assert torch.equal(generated(model, ids, assistant_model=draft, **options), expected)
    assert len(calls) - num_alone < num_alone == 20


def _of_released_size(size: str) -> ModernBertDecoderForCausalLM:
    shape = released_architecture(size)
    config = ModernBertDecoderConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
    )
    torch.manual_seed(0)
    return ModernBertDecoderForCausalLM(config).eval()


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


def contrastive_search(
    model: Any, input_ids: torch.Tensor, *, candidates: int, alpha: float, max_length: int, **state: Any
) -> torch.Tensor:
    """A decoding loop for `custom_generate`: likely tokens whose state resembles no earlier one."""
    cache = state[CACHE_FIELD]
    output = model(input_ids, past_key_values=cache, output_hidden_states=True)
    states = output.hidden_states[-1]
    while input_ids.shape[1] < max_length:
        likely = output.logits[:, -1].softmax(-1).topk(candidates)
        cache.batch_repeat_interleave(candidates)
        output = model(likely.indices.view(-1, 1), past_key_values=cache, output_hidden_states=True)
        last = output.hidden_states[-1].view(len(input_ids), candidates, -1)
        chosen = best_candidate(likely.values, last, states, alpha)
        rows = torch.arange(len(input_ids))
        kept = rows * candidates + chosen
        cache.batch_select_indices(kept)
        output.logits = output.logits[kept]
        states = torch.cat([states, last[rows, chosen][:, None]], 1)
        input_ids = torch.cat([input_ids, likely.indices[rows, chosen][:, None]], 1)
    return input_ids


def best_candidate(
    likelihoods: torch.Tensor, last: torch.Tensor, states: torch.Tensor, alpha: float
) -> torch.Tensor:
    similarity = torch.cosine_similarity(last[:, :, None], states[:, None], dim=-1).max(-1).values
    return ((1 - alpha) * likelihoods - alpha * similarity).argmax(-1)


def test_contrastive_search_past_the_window_equals_the_one_without_a_cache() -> None:
    model, ids = ours(attention="sdpa"), random_ids(PROMPT)
    expected = ids
    for _ in range(NEW):
        output = model(expected, use_cache=False, output_hidden_states=True)
        likely = output.logits[:, -1].softmax(-1).topk(3)
        longer = torch.cat([expected.repeat_interleave(3, 0), likely.indices.view(-1, 1)], 1)
        last = model(longer, use_cache=False, output_hidden_states=True).hidden_states[-1][:, -1]
        states = output.hidden_states[-1]
        chosen = best_candidate(likely.values, last.view(2, 3, -1), states, 0.6)
        expected = torch.cat([expected, likely.indices[torch.arange(2), chosen][:, None]], 1)

    def loop(
        model: Any, input_ids: torch.Tensor, candidates: int = 3, alpha: float = 0.6, **options: Any
    ) -> torch.Tensor:
        cache = options.get(CACHE_FIELD, options.get("past_key_values"))
        length = options["generation_config"].max_length
        state = {CACHE_FIELD: cache, "candidates": candidates, "alpha": alpha, "max_length": length}
        return contrastive_search(model, input_ids, **state)

    assert torch.equal(generated(model, ids, custom_generate=loop), expected)
    assert not torch.equal(generated(model, ids), expected)


def test_the_streamers_of_the_library_give_the_text_that_is_decoded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    model, ids = ours(vocab_size=320), random_ids(PROMPT, rows=1)
    options = {"prefix_allowed_tokens_fn": lambda _row, _ids: [*range(ord("a"), ord("h")), ord(" ")]}
    tokens = generated(model, ids, **options)[0, PROMPT:]
    text = tokenizer.decode(tokens)
    assert set(text) <= set("abcdefg ")
    generated(model, ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out.strip() == text.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=generated, args=(model, ids), kwargs={"streamer": streamer, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text
    assert len(pieces) > 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [1, 4], ids=["one kind", "two kinds"])
def test_continuous_batching_past_the_window_equals_greedy(attention: str, layers: int) -> None:
    if int(version("transformers").partition(".")[0]) < 5:
        pytest.skip("continuous batching of transformers 4 is for accelerators")
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = ours(attention=attention, num_hidden_layers=layers, local_rope_theta=10000.0)
    prompts = [random_ids(length, rows=1)[0].tolist() for length in (50, 7, 100)]
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 1000, "pad_token_id": PAD}
    expected = [
        model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts
    ]
    size = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else: most of the free memory
    outputs = model.generate_batch(
        prompts, generation_config=GenerationConfig(**options), continuous_batching_config=size
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [by_prompt[tuple(prompt)] for prompt in prompts] == expected


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
