"""Prompts that are read in another format than the text behind them is written in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_architecture, write_checkpoint
from modernbert_decoder import LLM, SamplingParams
from modernbert_decoder.architecture import Head
from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
from modernbert_decoder.cli import main
from modernbert_decoder.engine import loading
from modernbert_decoder.engine.graph_cache import cached_graph
from modernbert_decoder.engine.speculation import Speculation
from modernbert_decoder.engine.weights import quantize_checkpoint
from modernbert_decoder.errors import InputError
from modernbert_decoder.quantization import QuantizationScheme

PROMPTS = (
    "Once",
    "Once upon a time there was a king. " * 12,
    "The ship sailed on, and the wind ",
    "In the wood",
)
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, seed=4, max_tokens=15, logprobs=1, ignore_eos=True)


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for prompts alone are built like those that write as well, so that nothing but formats differs:
    they attend to keys in another order, and w8a8 rounds what comes of it to whole levels.
    """

    def build(*args: Any, is_for_pieces: bool = False, **kwargs: Any) -> bytes:
        return cached_graph(*args, **kwargs)

    monkeypatch.setattr(loading, "cached_graph", build)


@pytest.fixture(scope="module")
def mixed() -> Iterator[LLM]:
    with LLM("storyteller", dtype="int8", prefill_dtype="w8a8", threads=1, batch_invariant=True) as llm:
        yield llm


def test_the_first_token_is_that_of_one_format_and_the_next_follow_from_the_other(alike: None) -> None:
    """w8a8 has the embedding and vocabulary of int8, so that both first steps are one computation."""
    with (
        LLM("storyteller", dtype="int8", prefill_dtype="w8a8", threads=1, batch_invariant=True) as mixed,
        LLM("storyteller", dtype="w8a8", threads=1, batch_invariant=True) as w8a8,
        LLM("storyteller", dtype="int8", threads=1, batch_invariant=True) as int8,
    ):
        ours, read, written = (llm.generate(PROMPTS[1], GREEDY)[0].outputs[0] for llm in (mixed, w8a8, int8))
    assert ours.logprobs is not None
    assert read.logprobs is not None
    assert written.logprobs is not None
    assert ours.logprobs[0] == read.logprobs[0] != written.logprobs[0]
    assert ours.token_ids[:2] == read.token_ids[:2]  # so that the next step has the same text before it
    assert ours.logprobs[1] != read.logprobs[1]


def test_texts_that_are_only_read_are_read_in_dtype(mixed: LLM) -> None:
    with LLM("storyteller", dtype="int8", threads=1) as int8:
        assert mixed.score(PROMPTS[1]) == int8.score(PROMPTS[1])


def test_completions_do_not_depend_on_neighbours_or_cuts(mixed: LLM) -> None:
    expected = [mixed.generate(prompt, params)[0].outputs for prompt in PROMPTS for params in (GREEDY, DRAWN)]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    together = mixed.generate(prompts, [GREEDY, DRAWN] * len(PROMPTS))
    assert [output.outputs for output in together] == expected
    options: dict[str, Any] = {
        "dtype": "int8",
        "prefill_dtype": "w8a8",
        "threads": 1,
        "batch_invariant": True,
    }
    with LLM("storyteller", chunk_size=17, prefix_cache_bytes=1 << 24, max_slots=3, **options) as llm:
        for _ in range(2):  # the second time from the prefix cache
            cut = llm.generate(prompts, [GREEDY, DRAWN] * len(PROMPTS))
            assert [output.outputs for output in cut] == expected
        assert llm._driver.scheduler.prefix_cache is not None
        assert llm._driver.scheduler.prefix_cache.num_hit_tokens > 100
    with LLM("storyteller", speculation=Speculation(adaptive=False), **options) as llm:
        assert [llm.generate(prompt, GREEDY)[0].outputs for prompt in PROMPTS] == expected[::2]


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_the_same_format_takes_no_second_session(dtype: str) -> None:
    with LLM("storyteller", dtype=dtype, prefill_dtype=dtype, threads=1) as llm:
        assert llm._runtime._prompt_session is llm._runtime._session
        given = llm.generate(PROMPTS[1], GREEDY)[0].outputs
    with LLM("storyteller", dtype=dtype, threads=1) as llm:
        assert llm.generate(PROMPTS[1], GREEDY)[0].outputs == given


def test_the_vocabulary_is_that_of_dtype(alike: None) -> None:
    with (
        LLM("storyteller", dtype="int8", vocabulary_dtype="int4", prefill_dtype="w8a8", threads=1) as mixed,
        LLM("storyteller", dtype="w8a8", vocabulary_dtype="int4", threads=1) as w8a8,
    ):
        ours, theirs = (llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].logprobs for llm in (mixed, w8a8))
    assert ours is not None
    assert theirs is not None
    assert ours[0] == theirs[0]


def test_a_model_without_completions_refuses_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION))
    with pytest.raises(InputError, match="cannot complete prompts"):
        LLM(tmp_path, prefill_dtype="w8a8")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InputError, match="prefill_dtype is 'int9'"):
        LLM("storyteller", prefill_dtype="int9")


def test_a_packed_folder_has_one_format(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(find_checkpoint("storyteller"))
    packed = tmp_path / "packed"
    quantize_checkpoint(checkpoint, QuantizationScheme.named("int8"), packed, threads=1)
    with pytest.raises(InputError, match="holds int8 weights and prefill_dtype w8a8 was asked for"):
        LLM(packed, prefill_dtype="w8a8")


def test_the_command_line_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ["--temperature", "0", "--max-tokens", "5", "--logprobs", "1", "--json", "--dtype", "int8"]
    told = []
    for options in ([], ["--prefill-dtype", "w8a8"]):
        assert main(["generate", *sampling, *options, PROMPTS[1]]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["outputs"][0]["logprobs"] != told[1]["outputs"][0]["logprobs"]
    assert [each["dtype"] for each in told] == ["int8", "int8, prompts in w8a8"]


def test_single_tokens_of_a_prompt_are_read_in_it_too() -> None:
    options: dict[str, Any] = {"threads": 1, "chunk_size": 1}
    with (
        LLM("storyteller", dtype="int8", prefill_dtype="w8a8", **options) as mixed,
        LLM("storyteller", dtype="w8a8", **options) as w8a8,
    ):
        ours, theirs = (llm.generate(PROMPTS[2], GREEDY)[0].outputs[0].logprobs for llm in (mixed, w8a8))
    assert ours is not None
    assert theirs is not None
    assert ours[0] == theirs[0]
    assert ours[1:] != theirs[1:]


def test_drafts_are_verified_in_dtype() -> None:
    """In an engine that is not batch-invariant, where several tokens may be of a prompt or drafts."""
    options: dict[str, Any] = {"dtype": "float32", "prefill_dtype": "int4", "threads": 1}
    prompt = "The king had a dog. The dog had a king. The king had a dog, and the dog "
    with LLM("storyteller", **options) as plain:
        expected = plain.generate(prompt, GREEDY)[0].outputs[0]
    with LLM("storyteller", speculation=Speculation(adaptive=False), **options) as llm:
        given = llm.generate(prompt, GREEDY)[0].outputs[0]
        assert llm._speculator is not None
        assert llm._speculator.num_drafted > 10
    assert given.token_ids == expected.token_ids
    assert given.logprobs is not None
    assert expected.logprobs is not None
    for ours, theirs in zip(given.logprobs, expected.logprobs, strict=True):
        for token_id, entry in ours.items():
            assert entry.logprob == pytest.approx(theirs[token_id].logprob, abs=1e-3)


def test_calls_that_are_kept_are_those_of_their_own_kind() -> None:
    """Two tokens to be verified, and two of a prompt that are padded to as many logits."""
    options: dict[str, Any] = {"dtype": "int8", "prefill_dtype": "w8a8", "threads": 1}
    drafting = Speculation(adaptive=False, max_draft=1)
    prompt = [0, 65]
    with LLM("storyteller", batch_invariant=True, **options) as fresh:
        expected = fresh.generate(prompt, GREEDY)[0].outputs
    with LLM("storyteller", speculation=drafting, **options) as llm:
        scheduler = llm._driver.scheduler
        for _ in range(2):
            llm.generate("The dog and the dog and the dog and the dog", GREEDY)
            scheduler.is_batch_invariant = True
            assert llm.generate(prompt, GREEDY)[0].outputs == expected
            scheduler.is_batch_invariant = False
        assert llm._speculator is not None
        assert llm._speculator.num_drafted > 10


@pytest.mark.parametrize(
    ("head", "options", "expected"),
    [
        (Head.CAUSAL_LM, {}, [False]),
        (Head.CAUSAL_LM, {"prefill_dtype": "int8"}, [False, True]),
        (Head.SEQUENCE_CLASSIFICATION, {}, [True]),
        (Head.NONE, {}, [True]),
    ],
)
def test_what_writes_no_tokens_has_a_graph_for_pieces(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head: Head,
    options: dict[str, Any],
    expected: list[bool],
) -> None:
    built: list[bool] = []

    def build(*args: Any, is_for_pieces: bool = False, **kwargs: Any) -> bytes:
        built.append(is_for_pieces)
        return cached_graph(*args, is_for_pieces=is_for_pieces, **kwargs)

    monkeypatch.setattr(loading, "cached_graph", build)
    write_checkpoint(tmp_path, tiny_architecture(head=head))
    LLM(tmp_path, dtype="float32", threads=1, **options).close()
    assert built == expected
