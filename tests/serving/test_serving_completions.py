"""`/v1/completions`, driven by OpenAI's own client: what it answers is what the engine says."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import openai
import pytest
from servers import RunningServer, events

from checkpoints import CLS, SEP
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.structured import StructuredOutput

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


def expected(llm: LLM, prompt: Any, **settings: Any) -> str:
    (output,) = llm.generate([prompt], SamplingParams(**settings))
    return output.outputs[0].text


def test_a_completion_is_what_the_engine_says(client: openai.OpenAI, storyteller: LLM) -> None:
    reply = client.completions.create(model="exact", prompt=PROMPT, **GREEDY)
    (choice,) = reply.choices
    assert choice.text == expected(storyteller, PROMPT, **GREEDY)
    assert choice.finish_reason in ("stop", "length")
    assert reply.object == "text_completion"
    assert reply.model == "exact"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(storyteller.tokenizer.encode(PROMPT))
    assert reply.usage.completion_tokens == 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 24


def test_the_default_is_16_tokens(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16
    assert reply.choices[0].finish_reason == "length"


def test_a_stream_put_together_is_the_whole_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "exact", "prompt": PROMPT, "max_tokens": 40, "seed": 7}
    whole = client.completions.create(**settings)
    stream = client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert len(chunks) > 3  # how many depends on how soon the client reads
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("value", [False, None])
def test_a_stream_that_shall_not_be_obfuscated_is_one(server: RunningServer, value: bool | None) -> None:
    options = {"include_usage": True, "include_obfuscation": value}
    body = {"model": "tiny", "prompt": PROMPT, "stream": True, "stream_options": options, "max_tokens": 3}
    *_, last = events(server.post("/v1/completions", body))
    assert last["usage"]["total_tokens"] > 0


def test_a_stream_without_include_usage_counts_nothing(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "stream": True, "max_tokens": 3}
    assert all("usage" not in each for each in events(server.post("/v1/completions", body)))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_several_prompts_with_several_completions_come_in_order(
    client: openai.OpenAI, storyteller: LLM, is_streamed: bool
) -> None:
    prompts = ["Once upon a time", "The old king", "In the deep wood"]
    settings: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 12}
    texts = [""] * 6
    if is_streamed:
        for chunk in client.completions.create(model="exact", prompt=prompts, stream=True, **settings):
            for piece in chunk.choices:
                texts[piece.index] += piece.text
    else:
        reply = client.completions.create(model="exact", prompt=prompts, **settings)
        assert [choice.index for choice in reply.choices] == list(range(6))
        texts = [choice.text for choice in reply.choices]
    outputs = storyteller.generate(prompts, SamplingParams(**settings))
    assert texts == [completion.text for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("is_list", [False, True])
def test_token_ids_are_used_as_they_are(client: openai.OpenAI, alone: LLM, is_list: bool) -> None:
    ids = [CLS, *b"abc"]
    prompt: Any = [ids, ids[1:]] if is_list else ids
    reply = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
    assert reply.choices[0].text == expected(alone, ids, **GREEDY)
    if is_list:
        assert reply.choices[1].text == expected(alone, ids[1:], **GREEDY)


@pytest.mark.parametrize("prompt", ["", None, [CLS]])
def test_an_empty_prompt_is_cls_alone(server: RunningServer, alone: LLM, prompt: Any) -> None:
    reply = server.post("/v1/completions", {"model": "tiny", "prompt": prompt, **GREEDY}).json()
    assert reply["choices"][0]["text"] == expected(alone, [CLS], **GREEDY)
    assert reply["usage"]["prompt_tokens"] == 1


def test_a_stop_string_ends_the_text_and_is_named(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="exact", prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[10:13]
    reply = client.completions.create(model="exact", prompt=PROMPT, stop=["#never#", stop], **GREEDY)
    (choice,) = reply.choices
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.model_dump()["stop_reason"] == stop


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI, alone: LLM) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.9,
        "top_p": 0.8,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 11,
        "max_tokens": 20,
    }
    extensions: dict[str, Any] = {
        "top_k": 30,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "min_tokens": 5,
        "stop_token_ids": [7],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    reply = client.completions.create(
        model="tiny", prompt=PROMPT, logit_bias={"65": 5, "66": -100}, extra_body=extensions, **settings
    )
    params = {**settings, **extensions, "logit_bias": {65: 5, 66: -100}}
    assert reply.choices[0].text == expected(alone, PROMPT, **params)
    plain = client.completions.create(model="tiny", prompt=PROMPT, **settings)
    assert reply.choices[0].text != plain.choices[0].text


FIELDS: dict[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 1.25,
    "logit_bias": {"65": 5.0},
    "stop": ["x", "yz"],
    "stop_token_ids": [7, 8],
    "ignore_eos": True,
    "min_tokens": 2,
    "max_tokens": 5,
    "seed": 11,
    "logprobs": 4,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "structured_outputs": {"regex": "a+"},
}
OWN_FORMS: dict[str, tuple[str, Any]] = {
    "logit_bias": ("logit_bias", {65: 5.0}),
    "structured_outputs": ("structured", StructuredOutput(regex="a+")),
}


@pytest.mark.parametrize("field", FIELDS)
def test_each_sampling_parameter_reaches_the_engine_by_itself(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    engine = server.engine("tiny")
    generate, given = engine.generate, []

    async def noting(prompt: Any, params: SamplingParams, **settings: Any) -> Any:
        given.append(params)
        return await generate(prompt, params, **settings)

    monkeypatch.setattr(engine, "generate", noting)
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 3, field: FIELDS[field]}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    name, value = OWN_FORMS.get(field, (field, FIELDS[field]))
    assert given == [SamplingParams(**{"max_tokens": 3, name: value})]


def test_no_sampling_parameter_is_left_out() -> None:
    names = {OWN_FORMS.get(field, (field, None))[0] for field in FIELDS}
    assert names == {field.name for field in dataclasses.fields(SamplingParams)}


def test_a_negative_seed_is_a_seed_like_any_other(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20}
    texts = [client.completions.create(seed=seed, **settings).choices[0].text for seed in (-5, -5, -6)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_log_probabilities_are_the_engines(server: RunningServer, alone: LLM, is_streamed: bool) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "logprobs": 3, "seed": 1, "max_tokens": 12}
    if is_streamed:
        chunks = events(server.post("/v1/completions", {**body, "stream": True}))
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        logprobs = {name: [each for part in parts for each in part[name]] for name in parts[0]}
    else:
        logprobs = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    (output,) = alone.generate([PROMPT], SamplingParams(seed=1, max_tokens=12, logprobs=3))
    completion = output.outputs[0]
    assert completion.logprobs is not None
    chosen = [next(iter(table.values())).logprob for table in completion.logprobs]
    assert logprobs["token_logprobs"] == pytest.approx(chosen, abs=1e-6)
    for token, top, table in zip(
        logprobs["tokens"], logprobs["top_logprobs"], completion.logprobs, strict=True
    ):
        assert sorted(top.values()) == pytest.approx(
            sorted(each.logprob for each in table.values()), abs=1e-6
        )
        assert token in top
    assert len(set(logprobs["tokens"])) > 1


def test_logprobs_0_gives_the_chosen_token_alone(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt=PROMPT, logprobs=0, max_tokens=4)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert [list(top) for top in logprobs.top_logprobs or []] == [[token] for token in logprobs.tokens]


def test_offsets_point_into_the_text(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="exact", prompt=PROMPT, echo=True, logprobs=1, seed=4, max_tokens=12
    )
    (choice,) = reply.choices
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert "".join(tokens) == choice.text
    for token, offset in zip(tokens, offsets, strict=True):
        assert choice.text[offset:].startswith(token)


def test_bytes_of_characters_keep_their_tokens_apart(server: RunningServer) -> None:
    text = "\N{SNOWMAN}"
    body = {"model": "tiny", "prompt": text, "echo": True, "logprobs": 20, "max_tokens": 0}
    logprobs = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"]
    assert logprobs["text_offset"] == [0, 0, 0]
    assert all(20 <= len(top) <= 21 for top in logprobs["top_logprobs"])


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_echo_with_logprobs_scores_the_prompt(
    client: openai.OpenAI, alone: LLM, max_tokens: int, top: int
) -> None:
    reply = client.completions.create(
        model="tiny", prompt=PROMPT, echo=True, logprobs=top, max_tokens=max_tokens, temperature=0
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    scored = (logprobs.token_logprobs or [])[: len(PROMPT)]
    (score,) = alone.score([PROMPT], top_logprobs=5)
    assert scored == pytest.approx(score.logprobs, abs=1e-5)
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens[: len(PROMPT)]) == PROMPT
    assert len(logprobs.tokens) == len(PROMPT) + max_tokens
    assert score.top_logprobs is not None
    for place, likeliest in enumerate(score.top_logprobs):
        given = sorted((logprobs.top_logprobs or [])[place].values(), reverse=True)
        assert given[: max(top, 1)] == pytest.approx(
            [value for _, value in likeliest[:top]] or [score.logprobs[place]], abs=1e-5
        )


def test_the_first_of_given_ids_has_no_log_probability(client: openai.OpenAI, alone: LLM) -> None:
    """As lm-evaluation-harness asks, and reads it: `[context length : -1]`."""
    context, continuation = [CLS, *b"Once upon"], [*b" a time"]
    ids = context + continuation
    reply = client.completions.create(
        model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    (score,) = alone.score([ids])
    scored = logprobs.token_logprobs[len(context) : -1]
    assert sum(scored) == pytest.approx(sum(score.logprobs[len(context) - 1 :]), abs=1e-4)
    assert len(scored) == len(continuation)
    for own, top in zip(scored, logprobs.top_logprobs[len(context) : -1], strict=True):
        assert own <= max(top.values())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_echo_of_nothing_more_is_the_prompt(
    server: RunningServer, is_streamed: bool, logprobs: int | None
) -> None:
    body = {
        "model": "tiny",
        "prompt": ["ab", "c"],
        "echo": True,
        "max_tokens": 0,
        "logprobs": logprobs,
        "n": 2,
    }
    if is_streamed:
        chunks = events(server.post("/v1/completions", {**body, "stream": True}))
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
    else:
        choices = server.post("/v1/completions", body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["ab", "ab", "c", "c"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert [choice["logprobs"] is None for choice in choices] == [logprobs is None] * 4


def test_no_tokens_without_echo_is_an_empty_text(server: RunningServer) -> None:
    reply = server.post("/v1/completions", {"model": "tiny", "prompt": "ab", "max_tokens": 0}).json()
    assert reply["choices"][0]["text"] == ""
    assert reply["usage"]["completion_tokens"] == 0


def test_special_tokens_are_shown_on_request(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": [CLS, 65, SEP], "echo": True, "max_tokens": 0}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == "A"
    shown = server.post("/v1/completions", {**body, "skip_special_tokens": False}).json()
    assert shown["choices"][0]["text"] == "[CLS]A[SEP]"


def test_best_of_n_is_n(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt=PROMPT, n=2, best_of=2, max_tokens=2)
    assert len(reply.choices) == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"min_tokens": 20}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [320]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"temprature": 1}, "temprature"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}, "stream": True}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"user": 5}, "user"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_with_its_parameter(
    server: RunningServer, change: dict[str, Any], param: str
) -> None:
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "ab", **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(server: RunningServer, missing: str) -> None:
    body = {"model": "tiny", "prompt": "ab"}
    del body[missing]
    error = server.post("/v1/completions", body).json()["error"]
    assert (error["param"], error["code"]) == (missing, "missing_required_parameter")


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model called 'gpt'") as unknown:
        client.completions.create(model="gpt", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context") as too_long:
        client.completions.create(model="tiny", prompt="a" * 3000)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="cannot be used for completions"):
        client.completions.create(model="labels", prompt="a")


@pytest.mark.parametrize(
    ("num_tokens", "limit", "param"),
    [
        (2049, {}, "prompt"),
        (2049, {"max_tokens": 16}, "prompt"),
        (2049, {"max_tokens": 0}, "prompt"),
        (2048, {"max_tokens": 0, "echo": True}, None),
        (2048, {"max_tokens": 1}, "prompt"),
        (2047, {"max_tokens": 1}, None),
        (2047, {"max_tokens": 2}, "max_tokens"),
        (2040, {}, "prompt"),
        (2040, {"max_tokens": None}, "prompt"),
        (2040, {"max_tokens": 16}, "max_tokens"),
        (2032, {}, None),
    ],
)
def test_the_field_that_is_too_long_for_the_context_is_named(
    server: RunningServer, num_tokens: int, limit: dict[str, Any], param: str | None
) -> None:
    body = {"model": "tiny", "prompt": [CLS, *[65] * (num_tokens - 1)], **limit}
    response = server.post("/v1/completions", body)
    assert response.status_code == (200 if param is None else 400), response.text
    if param is not None:
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert ("max_tokens" in error["message"]) == (param == "max_tokens")


def test_models_are_listed_with_what_they_can_do(client: openai.OpenAI) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert list(listed) == ["tiny", "labels", "bare", "chat", "storyteller", "exact"]
    assert listed["labels"]["labels"] == ["calm", "angry", "glad"]
    tasks = [listed[name]["task"] for name in listed]
    assert tasks == ["generate", "classify", "embed", "generate", "generate", "generate"]
    assert "chat" in listed["chat"]["capabilities"]
    assert "chat" not in listed["tiny"]["capabilities"]
    assert listed["storyteller"]["dtype"] == "int8"
    assert client.models.retrieve("tiny").model_dump() == listed["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("missing")


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            r'\{"age":\d+\}',
        ),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"age":\d+\}'),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/ "y"'}}, r"x\dy"),
    ],
    ids=str,
)
def test_structured_output_is_followed(
    server: RunningServer, wanted: dict[str, Any], pattern: str, is_streamed: bool
) -> None:
    body = {"model": "exact", "prompt": PROMPT, "max_tokens": 60, "n": 3, "seed": 1, **wanted}
    texts = [""] * 3
    if is_streamed:
        for chunk in events(server.post("/v1/completions", {**body, "stream": True})):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        texts = [choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]]
    assert all(re.fullmatch(pattern, text) for text in texts), texts


def test_a_json_object_begins_as_one(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "Hi"}],
        response_format={"type": "json_object"},
        max_tokens=5,
    )
    assert (reply.choices[0].message.content or "").startswith("{")
