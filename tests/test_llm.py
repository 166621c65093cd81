"""`LLM` as a caller sees it: prompts, endings, log-probabilities, seeds and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CLS, SEP, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head, released_architecture
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import CompletionOutput
from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.errors import InputError

PROMPT = "Once upon a time there was a little girl who lived by the sea. "
OTHERS = ["The dog", "It was a dark night, and the wind", PROMPT * 12, "A"]
GREEDY = SamplingParams(temperature=0, max_tokens=40)
SAMPLED = [
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0},
    {"temperature": 1.1, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]
# Log-probabilities of one position from a single-token step and from a whole prefill, in float32.
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled model in float32, where batches change nothing but the last bits."""
    with LLM("storyteller", dtype="float32", threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A random model of bytes, whose text is full of half characters, with a context of 100."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_architecture())
    with LLM(folder, dtype="float32", threads=1, max_context=100) as opened:
        yield opened


def complete(llm: LLM, prompt: Any, params: SamplingParams) -> CompletionOutput:
    return llm.generate(prompt, params)[0].outputs[0]


def sampling(settings: dict[str, Any], **more: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 11, "max_tokens": 30, "ignore_eos": True, **settings, **more})


def test_an_ettin_shape_with_its_real_tokenizer_continues_text_as_transformers_does(
    shared: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path, released_architecture("17m"))
    for path in (shared / "data" / "ettin-tokenizer").glob("tokenizer*.json"):
        shutil.copy(path, folder)
    prompt_ids = [50281, 36062, 310, 253, 5347, 273]
    with LLM(folder, dtype="float32", threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        (output,) = llm.generate("Paris is the capital of", params)
        text = llm.tokenizer.decode(output.outputs[0].token_ids)
    assert list(output.prompt_token_ids) == prompt_ids
    model = transformers.ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=None,
        pad_token_id=50283,
    )[0, len(prompt_ids) :].tolist()
    assert list(output.outputs[0].token_ids) == expected
    library = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        output.outputs[0].text
        == text
        == library.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
    assert len(set(expected)) > 5


# --- prompts ---


def test_a_prompt_is_text_or_ids_one_or_many(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    assert ids[0] == llm.tokenizer.cls_token_id
    assert llm.tokenizer.sep_token_id not in ids
    expected = llm.generate(PROMPT, GREEDY)[0]
    assert (expected.prompt, expected.prompt_token_ids) == (PROMPT, tuple(ids))
    for prompt in (ids, tuple(ids), np.array(ids), [PROMPT], [ids], [np.array(ids)]):
        (output,) = llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
        assert output.prompt == (PROMPT if isinstance(prompt, list) and prompt[0] is PROMPT else None)
        assert output.prompt_token_ids == tuple(ids)
        assert output.outputs == expected.outputs


def test_outputs_come_in_the_order_of_the_prompts_whichever_ends_first(llm: LLM) -> None:
    prompts = [PROMPT, *OTHERS, llm.tokenizer.encode("The dog")]
    params = [SamplingParams(temperature=0, max_tokens=5 + 7 * (i % 3)) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == [*prompts[:-1], None]
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        assert output.outputs == llm.generate(prompt, each)[0].outputs


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.score([]) == []


def test_text_is_what_the_tokens_decode_to(llm: LLM, tiny: LLM) -> None:
    for each, prompt in ((llm, PROMPT), (tiny, [CLS, 65])):
        params = SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True)
        output = complete(each, prompt, params)
        assert output.text == each.tokenizer.decode(output.token_ids)
        shown = complete(each, prompt, SamplingParams(**{**_values(params), "skip_special_tokens": False}))
        assert shown.text == each.tokenizer.decode(output.token_ids, skip_special_tokens=False)


def _values(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in ("temperature", "seed", "max_tokens", "ignore_eos")}


# --- errors ---


@pytest.mark.parametrize("call", ["generate", "stream", "score"])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"the (prompt|text) is empty"),
        ([[]], "no token ids"),
        ([320], r"integers from 0 to 319, got 320"),
        ([-1], r"integers from 0 to 319, got -1"),
        ([True], r"got True"),
        ([[1, 2.0]], r"got 2\.0"),
        ([CLS] * 101, r"101 tokens"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_used_are_refused(tiny: LLM, call: str, prompt: Any, message: str) -> None:
    if call == "stream" and prompt and isinstance(prompt[0], list):
        prompt = prompt[0]
    with pytest.raises(InputError, match=message):
        getattr(tiny, call)(prompt)
    assert tiny.cache.num_free == tiny.cache.num_slots


def test_more_min_tokens_than_the_context_holds_are_refused(tiny: LLM) -> None:
    with pytest.raises(InputError, match="min_tokens is 100000"):
        tiny.generate([CLS], SamplingParams(min_tokens=100_000, max_tokens=None))


@pytest.mark.parametrize("prompt", [None, 5, [5, "text"], [None], b"bytes"], ids=str)
def test_what_is_neither_text_nor_ids_is_refused(tiny: LLM, prompt: Any) -> None:
    with pytest.raises(InputError):
        tiny.generate(prompt)


def test_one_bad_prompt_of_many_is_refused_before_anything_runs(tiny: LLM) -> None:
    calls = tiny._runtime.num_calls
    with pytest.raises(InputError, match="got 999"):
        tiny.generate(["fine", [999], "fine"], GREEDY)
    assert tiny._runtime.num_calls == calls
    assert tiny.cache.num_free == tiny.cache.num_slots


@pytest.mark.parametrize("num_prompt_tokens", [60, 99, 100])
def test_a_completion_that_does_not_fit_the_context_is_refused(tiny: LLM, num_prompt_tokens: int) -> None:
    prompt = [CLS] * num_prompt_tokens
    too_many = SamplingParams(max_tokens=101 - num_prompt_tokens)
    with pytest.raises(InputError, match=rf"{num_prompt_tokens} tokens.*context holds 100.*max_tokens=None"):
        tiny.generate(prompt, too_many)
    if num_prompt_tokens == 100:
        with pytest.raises(InputError, match="one token is wanted"):
            tiny.generate(prompt, SamplingParams(max_tokens=None))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_sampling_params_is_refused(tiny: LLM, count: int) -> None:
    with pytest.raises(InputError, match=f"2 prompts and {count} sampling_params"):
        tiny.generate(["a", "b"], [GREEDY] * count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({name: value}, rf"{name} must be an integer of at least 1, got {value!r}")
            for name in ("threads", "max_slots", "chunk_size")
            for value in (0, -1, 2.5, 4.0, "4", True, False, float("nan"))
        ),
        *(
            (
                {"max_context": value},
                f"max_context must be an integer from 2 to the model's 1024, got {value!r}",
            )
            for value in (0, 1, 1025, 2.5, 64.0, "64", True)
        ),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"dtype": "int5"}, "choose one of float32, int8, int4"),
        ({"providers": ["NoSuchProvider"]}, "NoSuchProvider is not in this build"),
        ({"providers": "CPUExecutionProvider"}, "providers must be a list of names"),
        ({"providers": [("CPUExecutionProvider", {})]}, "providers must be a list of names"),
        ({"providers": 7}, "providers must be a list of names"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LLM("storyteller", **arguments)


def test_integers_of_numpy_are_integers() -> None:
    two = np.int64(2)
    counts = {"threads": two, "max_slots": two, "chunk_size": two, "max_context": np.int32(64)}
    with LLM("storyteller", **counts) as llm:
        assert (llm.threads, llm.max_context) == (2, 64)
        assert (
            len(complete(llm, "The old king", SamplingParams(max_tokens=5, ignore_eos=True)).token_ids) == 5
        )


def test_a_checkpoint_without_a_language_model_head_does_not_generate(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION))
    with LLM(folder) as llm:
        for call in (llm.generate, llm.stream):
            with pytest.raises(InputError, match="a classification head and cannot generate"):
                call("a")


# --- how completions end ---


def test_the_end_of_text_ends_a_completion(llm: LLM) -> None:
    sep = llm.tokenizer.sep_token_id
    assert sep is not None
    always = {sep: 100.0}
    output = complete(llm, PROMPT, SamplingParams(temperature=0, logit_bias=always))
    assert (output.text, output.token_ids) == ("", (sep,))
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    ignored = complete(
        llm, PROMPT, SamplingParams(temperature=0, logit_bias=always, ignore_eos=True, max_tokens=5)
    )
    assert (ignored.token_ids, ignored.text, ignored.finish_reason) == ((sep,) * 5, "", "length")


@pytest.mark.parametrize("stated", [65, [65, 66], [66, 65]])
def test_ids_that_generation_config_states_end_a_text_besides_those_of_config(
    tmp_path: Path, stated: int | list[int]
) -> None:
    folder = write_checkpoint(tmp_path, tiny_architecture(eos_token_ids=(64,)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    with LLM(folder, threads=1, max_context=32) as llm:
        for token_id in (64, SEP, *([stated] if isinstance(stated, int) else stated)):
            params = SamplingParams(temperature=0, logit_bias={token_id: 100.0}, max_tokens=5)
            output = complete(llm, "a", params)
            assert (output.token_ids, output.finish_reason) == ((token_id,), "stop")
        params = SamplingParams(temperature=0, logit_bias={67: 100.0}, max_tokens=5)
        assert complete(llm, "a", params).finish_reason == "length"


@pytest.mark.parametrize("min_tokens", [1, 7])
def test_min_tokens_puts_off_the_end_of_text(llm: LLM, min_tokens: int) -> None:
    sep = llm.tokenizer.sep_token_id
    assert sep is not None
    params = SamplingParams(temperature=0, logit_bias={sep: 100.0}, min_tokens=min_tokens)
    output = complete(llm, PROMPT, params)
    assert sep not in output.token_ids[:min_tokens]
    assert output.token_ids[min_tokens:] == (sep,)
    assert output.finish_reason == "stop"


@pytest.mark.parametrize("num_prompt_tokens", [1, 60, 99])
def test_without_max_tokens_the_context_is_filled_to_its_end(tiny: LLM, num_prompt_tokens: int) -> None:
    prompt = [CLS, *range(num_prompt_tokens - 1)]
    output = complete(tiny, prompt, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.token_ids) == 100 - num_prompt_tokens
    assert (output.finish_reason, output.stop_reason) == ("length", None)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_stop_token_ends_a_completion_and_is_named(llm: LLM, is_kept: bool) -> None:
    whole = complete(llm, PROMPT, GREEDY)
    stop_id = whole.token_ids[9]
    length = whole.token_ids.index(stop_id) + 1
    params = SamplingParams(
        temperature=0, max_tokens=40, stop_token_ids=[stop_id], include_stop_str_in_output=is_kept
    )
    output = complete(llm, PROMPT, params)
    assert output.token_ids == whole.token_ids[:length]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop_id)
    assert output.text == llm.tokenizer.decode(output.token_ids[: length if is_kept else length - 1])


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("place", [0, 10, 25])
def test_a_stop_string_across_tokens_cuts_the_text_at_the_right_character(
    llm: LLM, place: int, is_kept: bool
) -> None:
    whole = complete(llm, PROMPT, GREEDY)
    texts = [llm.tokenizer.token_text(token_id) for token_id in whole.token_ids]
    stop = texts[place][-2:] + texts[place + 1] + texts[place + 2][:2]
    start = whole.text.index(stop)
    params = SamplingParams(
        temperature=0, max_tokens=40, stop=["@@@", stop], include_stop_str_in_output=is_kept
    )
    output = complete(llm, PROMPT, params)
    assert output.text == whole.text[: start + len(stop) if is_kept else start]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) < 40


def test_a_stop_string_within_the_first_min_tokens_does_not_count(llm: LLM) -> None:
    whole = complete(llm, PROMPT, GREEDY)
    stop = llm.tokenizer.token_text(whole.token_ids[2])
    params = SamplingParams(temperature=0, max_tokens=40, stop=stop, min_tokens=10)
    output = complete(llm, PROMPT, params)
    assert len(output.token_ids) >= 10
    assert output.text.startswith(llm.tokenizer.decode(whole.token_ids[:9]))


# --- log-probabilities ---


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, *SAMPLED], ids=str)
def test_generated_logprobs_equal_rescored_ones(llm: LLM, settings: dict[str, Any]) -> None:
    params = sampling(
        {**settings, "logprobs": 3, "max_tokens": 80, "n": 1 if not settings["temperature"] else 2}
    )
    output = llm.generate(PROMPT, params)[0]
    for completion in output.outputs:
        assert completion.logprobs is not None
        chosen = [
            table[token_id].logprob
            for table, token_id in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        score = llm.score([*output.prompt_token_ids, *completion.token_ids])[0]
        rescored = score.logprobs[len(output.prompt_token_ids) - 1 :]
        assert chosen == pytest.approx(list(rescored), abs=LOGPROB_TOLERANCE)
        assert completion.cumulative_logprob == pytest.approx(sum(chosen))


def test_reported_alternatives_are_the_most_likely_tokens_in_order(llm: LLM) -> None:
    output = complete(llm, PROMPT, sampling({"temperature": 1.5, "logprobs": 4}))
    assert output.logprobs is not None
    for table, token_id in zip(output.logprobs, output.token_ids, strict=True):
        assert next(iter(table)) == token_id
        ranked = sorted(table.values(), key=lambda entry: entry.rank)
        assert [entry.rank for entry in ranked[:4]] == [1, 2, 3, 4]
        assert [entry.logprob for entry in ranked] == sorted((e.logprob for e in ranked), reverse=True)
        assert len(table) == 4 + (table[token_id].rank > 4)
        assert all(entry.decoded_token == llm.tokenizer.token_text(i) for i, entry in table.items())


def test_logprobs_are_left_out_unless_asked_for(llm: LLM) -> None:
    output = complete(llm, PROMPT, GREEDY)
    assert output.logprobs is None
    assert output.cumulative_logprob is None


@pytest.mark.parametrize("length", [1, 2, 128, 129, 130, 300])
def test_a_score_is_the_same_in_one_piece_and_in_many(llm: LLM, length: int) -> None:
    ids = (llm.tokenizer.encode(PROMPT) * 30)[:length]
    score = llm.score(ids)[0]
    assert score.token_ids == tuple(ids)
    assert len(score.logprobs) == length - 1
    assert score.total_logprob == pytest.approx(sum(score.logprobs))
    with LLM("storyteller", dtype="float32", threads=2, chunk_size=37, max_slots=1) as other:
        assert other.score(ids)[0].logprobs == pytest.approx(score.logprobs, abs=LOGPROB_TOLERANCE)


def test_the_probabilities_of_all_tokens_that_could_follow_sum_to_1(tiny: LLM) -> None:
    text = [CLS, 72, 105]
    scores = tiny.score([[*text, token_id] for token_id in range(tiny.architecture.vocab_size)])
    assert sum(np.exp(score.logprobs[-1]) for score in scores) == pytest.approx(1.0, abs=1e-4)


def test_many_scores_equal_single_ones(llm: LLM) -> None:
    texts = [PROMPT, *OTHERS]
    together = llm.score(texts)
    for text, score in zip(texts, together, strict=True):
        alone = llm.score(text)[0]
        assert score.token_ids == alone.token_ids == tuple(llm.tokenizer.encode(text))
        assert score.logprobs == pytest.approx(alone.logprobs, abs=LOGPROB_TOLERANCE)


# --- seeds ---


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_a_seed_gives_the_same_text_alone_in_a_batch_and_after_others(
    llm: LLM, settings: dict[str, Any]
) -> None:
    params = sampling({**settings, "n": 2})
    alone = llm.generate(PROMPT, params)[0].outputs
    assert alone[0].token_ids != alone[1].token_ids
    unseeded = SamplingParams(temperature=1.0, max_tokens=10)
    batch = llm.generate([*OTHERS, PROMPT], [unseeded] * len(OTHERS) + [params])
    assert batch[-1].outputs == alone
    assert llm.generate(PROMPT, params)[0].outputs == alone
    assert complete(llm, PROMPT, sampling({**settings, "seed": 12})).token_ids != alone[0].token_ids


@pytest.mark.parametrize("chunk_size", [1, 16, 100])
def test_a_seed_gives_the_same_text_at_every_chunk_size(llm: LLM, chunk_size: int) -> None:
    prompts, params = [PROMPT, *OTHERS[:2]], sampling(SAMPLED[0])
    with LLM("storyteller", dtype="float32", threads=2, chunk_size=chunk_size, max_slots=2) as other:
        outputs = [output.outputs for output in other.generate(prompts, params)]
    assert outputs == [output.outputs for output in llm.generate(prompts, params)]


def test_without_a_seed_texts_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=20)
    assert complete(llm, PROMPT, params).token_ids != complete(llm, PROMPT, params).token_ids


# --- the object ---


def test_timings_add_up(llm: LLM) -> None:
    output = llm.generate(PROMPT, sampling({"temperature": 1.0, "n": 3}))[0]
    timings = output.timings
    assert (timings.num_prompt_tokens, timings.num_completions) == (len(output.prompt_token_ids), 3)
    assert timings.num_output_tokens == 90
    assert min(timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds) >= 0
    assert timings.decode_tokens_per_second > 0


def test_closing_twice_is_harmless() -> None:
    with LLM("storyteller", dtype="float32", threads=1) as opened:
        opened.close()
    opened.close()
