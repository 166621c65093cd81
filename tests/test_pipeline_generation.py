"""`pipeline("text-generation")` on the engine: lengths, endings, seeds, records and streamers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import BUNDLED_ARCHITECTURE
from modernbert_decoder import LLM, InputError, SamplingParams, pipeline
from modernbert_decoder.pipelines.generation_options import GenerationOptions, merged
from pipeline_checkpoints import write_with_tokenizer

PROMPT = "Once upon a time there was"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("storyteller", dtype="float32", threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def generate(llm: LLM) -> Any:
    return pipeline("text-generation", llm)


def texts(result: Any) -> list[str]:
    return [record["generated_text"] for record in result]


def num_new_tokens(generate: Any, **arguments: Any) -> int:
    """How many tokens a greedy completion of `PROMPT` has."""
    ids = generate(PROMPT, **{"do_sample": False, **arguments, "return_tensors": True})[0][
        "generated_token_ids"
    ]
    return len(ids) - len(generate.tokenizer.encode(arguments.get("prefix", "") + PROMPT))


# --- records ---


def test_a_completion_is_the_engines(generate: Any, llm: LLM) -> None:
    greedy = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    assert generate(PROMPT, **GREEDY) == [{"generated_text": PROMPT + greedy.text}]
    assert generate(PROMPT, **GREEDY, return_full_text=False) == [{"generated_text": greedy.text}]
    ids = [*llm.tokenizer.encode(PROMPT), *greedy.token_ids]
    assert generate(PROMPT, **GREEDY, return_tensors=True) == [{"generated_token_ids": ids}]
    assert generate(PROMPT, **GREEDY, return_text=True) == generate(PROMPT, **GREEDY)


def test_lists_generators_and_batches_give_one_list_of_records_each(generate: Any) -> None:
    prompts = [PROMPT, "The king", "", "A"]
    alone = [generate(prompt, **GREEDY) for prompt in prompts]
    assert generate(prompts, **GREEDY) == alone
    assert list(generate(iter(prompts), **GREEDY)) == alone
    assert generate(prompts, **GREEDY, batch_size=3) == alone


def test_prompts_of_a_stream_are_read_batch_by_batch(generate: Any) -> None:
    taken: list[str] = []
    stream = (taken.append(prompt) or prompt for prompt in ["A", "B", "C", "D", "E"])
    results = generate(stream, **GREEDY, batch_size=2)
    assert taken == []
    next(results)
    assert taken == ["A", "B"]


def test_arguments_of_the_constructor_hold_until_a_call_says_otherwise(llm: LLM, generate: Any) -> None:
    own = pipeline("text-generation", llm, do_sample=False, max_new_tokens=3, return_full_text=False)
    assert own(PROMPT) == generate(PROMPT, do_sample=False, max_new_tokens=3, return_full_text=False)
    assert own(PROMPT, max_new_tokens=5, return_full_text=True) == generate(
        PROMPT, do_sample=False, max_new_tokens=5
    )
    assert own(PROMPT, max_length=9) == generate(
        PROMPT, do_sample=False, max_length=9, return_full_text=False
    )


# --- lengths ---


def test_lengths_mean_what_they_say(generate: Any) -> None:
    prompt = len(generate.tokenizer.encode(PROMPT))
    assert num_new_tokens(generate, max_new_tokens=7) == 7
    assert num_new_tokens(generate, max_length=prompt + 4) == 4
    assert num_new_tokens(generate, max_length=prompt + 4, prefix="Listen:\n") == 4
    assert num_new_tokens(generate, generate_kwargs={"max_new_tokens": 6}) == 6
    assert num_new_tokens(generate, generation_config={"max_length": prompt + 5}) == 5


def test_without_a_length_at_most_256_new_tokens_are_written_and_never_past_the_context() -> None:
    options = GenerationOptions.of(merged([{"do_sample": False}]), task="text-generation")
    assert options.num_new_tokens(10, num_prefix_tokens=0, context=1000) == 256
    assert options.num_new_tokens(900, num_prefix_tokens=0, context=1000) == 100


def test_minimum_lengths_forbid_the_end(generate: Any) -> None:
    greedy = {"eos_token_id": generate.tokenizer.encode(".")[1], "max_new_tokens": 60}
    free = num_new_tokens(generate, **greedy)
    assert free < 50
    assert num_new_tokens(generate, **greedy, min_new_tokens=50) >= 50
    prompt = len(generate.tokenizer.encode(PROMPT))
    assert num_new_tokens(generate, **greedy, min_length=prompt + 50) >= 50


def test_of_two_lengths_in_one_call_the_new_tokens_count_with_a_warning(generate: Any) -> None:
    with pytest.warns(UserWarning, match="max_new_tokens is used") as caught:
        assert generate(PROMPT, do_sample=False, max_new_tokens=3, max_length=40) == generate(
            PROMPT, do_sample=False, max_new_tokens=3
        )
    assert caught[0].filename.endswith("test_pipeline_generation.py")


def test_a_hole_keeps_cls_and_the_end_of_the_prompt(generate: Any, llm: LLM) -> None:
    long = "The fox ran over the hill. " * 300
    with pytest.raises(InputError, match='handle_long_generation="hole"'):
        generate(long, **GREEDY)
    record = generate(long, **GREEDY, handle_long_generation="hole", return_tensors=True)[0]
    ids = record["generated_token_ids"]
    prompt_ids = llm.tokenizer.encode(long)
    room = llm.max_context - 12
    assert ids[:room] == [prompt_ids[0], *prompt_ids[1 - room :]]
    assert len(ids) == llm.max_context


def test_the_model_files_settings_lie_between_defaults_and_the_callers(tmp_path: Path) -> None:
    folder = write_with_tokenizer(tmp_path / "m")
    path = folder / "generation_config.json"
    path.write_text('{"max_new_tokens": 4, "do_sample": false, "eos_token_id": 2, "top_k": null}')
    with pipeline("text-generation", folder) as run:  # type: ignore[attr-defined]
        assert num_new_tokens(run) == 4
        assert num_new_tokens(run, max_length=2 + len(run.tokenizer.encode(PROMPT))) == 2
    path.write_text('{"no_repeat_ngram_size": 2}')
    with pipeline("text-generation", folder) as run:  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"no_repeat_ngram_size=2 .* pass no_repeat_ngram_size=0"):
            run(PROMPT)
        assert num_new_tokens(run, max_new_tokens=2, no_repeat_ngram_size=0) == 2


# --- endings ---


def test_a_stop_string_ends_the_text_behind_the_token_that_completes_it(generate: Any) -> None:
    whole = generate(PROMPT, **{**GREEDY, "max_new_tokens": 40}, return_full_text=False)[0]["generated_text"]
    word = whole.split()[3]
    for name in ("stop_strings", "stop_sequence"):
        cut = generate(PROMPT, do_sample=False, **{name: word[:-1]}, return_full_text=False)[0][
            "generated_text"
        ]
        assert cut == whole[: whole.index(word) + len(word)]


def test_an_end_token_of_ones_own_is_shown_if_it_is_text(generate: Any) -> None:
    period = generate.tokenizer.encode(".")[1]
    text = generate(PROMPT, do_sample=False, eos_token_id=period, max_new_tokens=200)[0]["generated_text"]
    assert text.endswith(".")
    assert text.count(".") == 1


# --- chance ---


def test_a_seed_repeats_texts_and_differs_from_text_to_text(generate: Any) -> None:
    options = {"max_new_tokens": 20, "num_return_sequences": 2}
    first = generate([PROMPT, PROMPT], seed=5, **options)
    assert generate([PROMPT, PROMPT], seed=5, **options, batch_size=1) == first
    assert len({*texts(first[0]), *texts(first[1])}) == 4
    assert generate(PROMPT, seed=6, **options) == first[1]
    assert generate(PROMPT, seed=7, **options) != first[0]


def test_pythons_random_decides_where_no_seed_is_given(generate: Any) -> None:
    random.seed(3)
    first, second = generate(PROMPT, max_new_tokens=20), generate(PROMPT, max_new_tokens=20)
    assert first != second
    random.seed(3)
    assert generate(PROMPT, max_new_tokens=20) == first


def test_the_engine_gets_the_documented_defaults(generate: Any, llm: LLM) -> None:
    params = SamplingParams(temperature=0.7, top_k=50, max_tokens=20, seed=4)
    expected = llm.generate(PROMPT, params)[0].outputs[0].text
    assert generate(PROMPT, seed=4, max_new_tokens=20, return_full_text=False) == [
        {"generated_text": expected}
    ]


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 1.5}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"repetition_penalty": 1.9}],
    ids=str,
)
def test_every_sampling_argument_reaches_the_engine(setting: dict[str, Any], generate: Any, llm: LLM) -> None:
    settings = {"temperature": 0.7, "top_k": 50, **setting}
    expected = llm.generate(PROMPT, SamplingParams(**settings, max_tokens=25, seed=9))[0].outputs[0].text
    got = generate(PROMPT, seed=9, max_new_tokens=25, return_full_text=False, **setting)
    assert got == [{"generated_text": expected}]


def test_what_greedy_decoding_does_not_use_is_said(generate: Any) -> None:
    with pytest.warns(UserWarning, match="temperature changes nothing"):
        assert generate(PROMPT, **GREEDY, temperature=0.3) == generate(PROMPT, **GREEDY)


# --- streamers ---


class Streamer:
    """Collects what it is handed."""

    def __init__(self) -> None:
        self.values: list[np.ndarray[Any, Any]] = []
        self.is_ended = False

    def put(self, value: np.ndarray[Any, Any]) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.is_ended = True


def test_a_streamer_gets_the_prompt_then_every_token(generate: Any) -> None:
    streamer = Streamer()
    result = generate(PROMPT, **GREEDY, return_tensors=True, streamer=streamer)
    assert streamer.is_ended
    assert streamer.values[0].shape[0] == 1
    assert all(value.shape == (1,) for value in streamer.values[1:])
    ids = [*streamer.values[0][0].tolist(), *(int(value[0]) for value in streamer.values[1:])]
    assert result == [{"generated_token_ids": ids}] == generate(PROMPT, **GREEDY, return_tensors=True)
    with pytest.raises(InputError, match="a streamer shows one text"):
        generate([PROMPT], streamer=streamer)
    with pytest.raises(InputError, match="num_return_sequences is 2"):
        generate(PROMPT, num_return_sequences=2, streamer=streamer)


def test_transformers_text_streamer_writes_the_completion(
    generate: Any, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm.folder)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = generate(PROMPT, **GREEDY, streamer=streamer, return_full_text=False)
    assert capsys.readouterr().out.strip() == result[0]["generated_text"].strip()


def test_a_generation_config_of_transformers_is_read_and_replaces_the_constructors(llm: LLM) -> None:
    transformers = pytest.importorskip("transformers")
    run: Any = pipeline("text-generation", llm, do_sample=False, max_new_tokens=9, repetition_penalty=1.5)
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
    assert run(PROMPT, generation_config=config) == run(
        PROMPT, generation_config={"do_sample": False, "max_new_tokens": 4}
    )
    assert run(PROMPT, generation_config=config) == run(PROMPT, max_new_tokens=4, repetition_penalty=1.0)
    with pytest.raises(InputError, match="num_beams=3 is not available"):
        run(PROMPT, generation_config=transformers.GenerationConfig(num_beams=3))


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 4}, "num_beams=4 is not available in the engine; pass num_beams=1"),
        ({"use_cache": False}, "pass use_cache=True"),
        ({"do_sample": 1}, "do_sample must be True or False"),
        ({"temperature": 0.0}, "set do_sample=False"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 2}, "top_p must be between 0 and 1"),
        ({"do_sample": False, "num_return_sequences": 2}, "set do_sample=True"),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "at least 6 new tokens are wanted, but at most 5"),
        ({"max_length": 3}, "use max_new_tokens"),
        ({"max_new_tokens": 5000}, "context holds 1024"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"eos_token_id": 10**6}, f"must hold token ids from 0 to {BUNDLED_ARCHITECTURE.vocab_size - 1}"),
        ({"eos_token_id": "x"}, "must be a list of token ids"),
        ({"stop_strings": "a", "stop_sequence": "b"}, "are the same"),
        ({"stop_strings": [""]}, "empty string"),
        ({"stop": "x"}, "it is called stop_strings"),
        ({"max_tokens": 3}, "it is called max_new_tokens"),
        ({"return_full_text": True, "return_tensors": True}, "exclude each other"),
        ({"return_full_text": True, "return_text": True}, "exclude each other"),
        ({"return_text": False}, "return_tensors=True"),
        ({"return_type": 1}, "use return_full_text"),
        ({"clean_up_tokenization_spaces": True}, "not available"),
        ({"handle_long_generation": "cut"}, 'must be "hole"'),
        ({"handle_long_generation": "hole", "max_new_tokens": 2000}, "leave nothing"),
        ({"truncation": True}, 'handle_long_generation="hole"'),
        ({"generate_kwargs": {"top_k": 2}, "top_k": 3}, "give it once"),
        ({"generate_kwargs": 3}, "must be a dictionary"),
        ({"generation_config": 3}, "must be a dictionary or a transformers GenerationConfig"),
        ({"generation_config": {"maxtokens": 3}}, "does not know the argument maxtokens"),
        ({"logits_processor": [1]}, 'engine="torch"'),
        ({"prefix": 3}, "reads texts"),
        ({"tools": []}, "no chat template"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_honoured_is_refused(arguments: dict[str, Any], words: str, generate: Any) -> None:
    with pytest.raises(InputError) as caught:
        generate(PROMPT, **arguments)
    assert words in str(caught.value)


def test_what_changes_nothing_is_accepted(generate: Any) -> None:
    neutral = {
        "num_beams": 1,
        "use_cache": True,
        "pad_token_id": 3,
        "padding": True,
        "num_return_sequences": None,
    }
    assert generate(PROMPT, **GREEDY, **neutral) == generate(PROMPT, **GREEDY)


def test_an_empty_prompt_needs_cls(generate: Any) -> None:
    assert generate("", **GREEDY)[0]["generated_text"]
    with pytest.raises(InputError, match="with add_special_tokens=False it needs some text"):
        generate("", **GREEDY, add_special_tokens=False)
