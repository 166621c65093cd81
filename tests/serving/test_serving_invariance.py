"""What the server answers is what the model answers alone, to the last digit, whatever it answers besides."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import RunningServer, events, running

from modernbert_decoder import LLM, SamplingParams
from modernbert_decoder.serving.settings import EngineSettings, parse_models

DTYPES = ("float32", "int8", "int4", "w8a8", "int4+w8a8")
PROMPTS = ("Once", "Once upon a time there was a queen who " * 20, "The ship sailed on, and the wind " * 3)
BODIES: list[dict[str, Any]] = [
    {"prompt": prompt, "max_tokens": length, "ignore_eos": True, "logprobs": 1, **how}
    for prompt, length in zip(PROMPTS, (11, 24, 30), strict=True)
    for how in ({"temperature": 0}, {"seed": 5}, {"seed": 6, "n": 3})
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(parse_models([f"{dtype}=storyteller:{dtype}" for dtype in DTYPES])) as started:
        yield started


@pytest.mark.parametrize("dtype", DTYPES)
def test_requests_beside_others_are_answered_as_by_the_model_alone(server: RunningServer, dtype: str) -> None:
    def answer(body: dict[str, Any]) -> list[tuple[str, list[float]]]:
        if body.get("n"):
            choices = server.post("/v1/completions", body).json()["choices"]
            return [(choice["text"], choice["logprobs"]["token_logprobs"]) for choice in choices]
        chunks = events(server.post("/v1/completions", {**body, "stream": True}))
        parts = [chunk["choices"][0] for chunk in chunks]
        text = "".join(part["text"] for part in parts)
        return [(text, [value for part in parts for value in part["logprobs"]["token_logprobs"]])]

    written, _, read = dtype.partition("+")
    with LLM("storyteller", dtype=written, prefill_dtype=read or None, batch_invariant=True) as llm:
        expected = [alone(llm, body) for body in BODIES]
    # More than there are slots: 36 requests of 60 completions.
    bodies = [{"model": dtype, **body} for body in BODIES]
    bodies = [*bodies, *reversed(bodies)] * 2
    expected = [*expected, *reversed(expected)] * 2
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(answer, bodies)) == expected


def alone(llm: LLM, body: dict[str, Any]) -> list[tuple[str, list[float]]]:
    settings = {name: value for name, value in body.items() if name != "prompt"}
    (output,) = llm.generate(body["prompt"], SamplingParams(**settings))
    found = []
    for each in output.outputs:
        assert each.logprobs is not None
        chosen = [logprobs[token] for token, logprobs in zip(each.token_ids, each.logprobs, strict=True)]
        found.append((each.text, [each.logprob for each in chosen]))
    return found


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_drafts_change_nothing_to_the_last_digit(dtype: str) -> None:
    begin = "The dog and the cat, the dog and the cat, "
    bodies = [{**body, "prompt": begin + body["prompt"]} for body in BODIES]
    with LLM("storyteller", dtype=dtype, batch_invariant=True) as llm:
        expected = [alone(llm, body) for body in bodies]
    settings = EngineSettings(draft="lookup")
    with running(parse_models([f"story=storyteller:{dtype}"]), engine=settings) as started:
        for body, wanted in zip(bodies, expected, strict=True):
            choices = started.post("/v1/completions", {"model": "story", **body}).json()["choices"]
            assert [(each["text"], each["logprobs"]["token_logprobs"]) for each in choices] == wanted
        speculator = started.engine("story").llm._driver.scheduler.speculator
        assert speculator is not None
        assert speculator.num_accepted > 0


def test_models_that_complete_nothing_are_served_beside_one_that_drafts(folders: dict[str, Path]) -> None:
    sources = parse_models([f"{name}={folders[name]}:float32" for name in ("tiny", "labels", "bare")])
    with running(sources, engine=EngineSettings(draft="lookup")) as started:
        for name, path in (("labels", "/v1/classify"), ("bare", "/v1/embeddings")):
            assert started.post(path, {"model": name, "input": "abc"}).status_code == 200
        body = {"model": "tiny", "prompt": "abab" * 9, "max_tokens": 9}
        assert started.post("/v1/completions", body).status_code == 200


def test_the_fingerprint_tells_in_which_formats_an_answer_was_made() -> None:
    spellings = [f"{name}=storyteller:{name}" for name in ("int8", "int8+w8a8")]
    with running(parse_models(spellings)) as started:
        replies = [
            started.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1}).json()
            for name in ("int8", "int8+w8a8")
        ]
        dtypes = [card["dtype"] for card in started.get("/v1/models").json()["data"]]
    assert len({reply["system_fingerprint"] for reply in replies}) == 2
    assert dtypes == ["int8", "int8, prompts in w8a8"]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_engine_is_told_what_was_chosen(batch_invariant: bool) -> None:
    settings = EngineSettings(batch_invariant=batch_invariant)
    with running(parse_models(["storyteller"]), engine=settings) as started:
        scheduler = started.engine("storyteller").llm._driver.scheduler
        assert scheduler.is_batch_invariant is batch_invariant
