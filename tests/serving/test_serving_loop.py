"""No request holds the event loop for long: what is large is refused by its number, or done elsewhere."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from pydantic import BaseModel
from servers import RunningServer, running, until

from modernbert_decoder.engine import async_llm, structured
from modernbert_decoder.serving import strict_json, token_texts
from modernbert_decoder.serving.generation import Generation
from modernbert_decoder.serving.models import opener
from modernbert_decoder.serving.protocol import sampling
from modernbert_decoder.serving.protocol.base import Body
from modernbert_decoder.serving.protocol.completions import (
    ChatRequest,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
)
from modernbert_decoder.serving.protocol.reading import (
    ClassifyRequest,
    EmbeddingRequest,
    RankRequest,
    ScoreRequest,
)
from modernbert_decoder.serving.protocol.service import DetokenizeRequest, TokenizeRequest
from modernbert_decoder.serving.routes import long_answers, scores, service
from modernbert_decoder.serving.server import set_aside_what_stays
from modernbert_decoder.serving.settings import EngineSettings, ModelSource
from modernbert_decoder.text_pieces import PieceEncoder

BODIES: list[type[Body]] = [
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    ClassifyRequest,
    ScoreRequest,
    RankRequest,
    TokenizeRequest,
    DetokenizeRequest,
]


def is_on_the_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# checking bodies


def schemas(part: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema of pydantic's core, those within others too."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part
        for each in part.values():
            yield from schemas(each)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from schemas(each)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_list_is_bounded_and_checked_no_further_than_its_first_error(body: type[Body]) -> None:
    lists = [each for each in schemas(body.__pydantic_core_schema__) if each["type"] == "list"]
    assert [each for each in lists if not each.get("max_length") or not each.get("fail_fast")] == []
    assert lists or body is TokenizeRequest


def wrong(body: type[Body], value: dict[str, Any]) -> int:
    """How many errors pydantic finds."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - pydantic's own class, whose number is looked at
        body.model_validate(value)
    return int(error.value.error_count())  # type: ignore[attr-defined]


MANY = {f"k{i}": i for i in range(5_000)}


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (CompletionRequest, {"model": "a", "prompt": "a", **MANY}),
        (CompletionRequest, {"model": "a", "prompt": "a", "logit_bias": dict.fromkeys(MANY, "x")}),
        (CompletionRequest, {"model": "a", "prompt": "a", "stream_options": MANY}),
        (CompletionRequest, {"model": "a", "prompt": "a", "response_format": {"type": "text", **MANY}}),
        (CompletionRequest, {"model": "a", "prompt": "a", "stop_token_ids": ["x"] * 5_000}),
        (ChatRequest, {"model": "a", "messages": [MANY] * 5_000}),
        (RankRequest, {"model": "a", "text": "a", "candidates": [1] * 5_000}),
        (DetokenizeRequest, {"tokens": ["x"] * 5_000}),
    ],
)
def test_many_errors_are_not_all_found(body: type[Body], value: dict[str, Any]) -> None:
    assert wrong(body, value) < 10


def test_too_many_tokens_and_messages_are_refused(server: RunningServer) -> None:
    wanted: list[tuple[str, dict[str, Any], str]] = [
        ("/detokenize", {"model": "tiny", "tokens": [65] * (2**17 + 1)}, "tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": [65] * (2**17 + 1)}, "prompt"),
        ("/v1/embeddings", {"model": "tiny", "input": [65] * (2**17 + 1)}, "input"),
        (
            "/v1/chat/completions",
            {"model": "chat", "messages": [{"role": "user", "content": "a"}] * 1025},
            "messages",
        ),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": "a", "structured_outputs": {"choice": ["a"] * 1001}},
            "structured_outputs",
        ),
        (
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": "a",
                "structured_outputs": {"choice": [x * 7_000 for x in "abcdefghij"]},
            },
            "structured_outputs",
        ),
        (
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": "a",
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"enum": list(range(20_000))}},
                },
            },
            "response_format",
        ),
    ]
    for path, body, param in wanted:
        response = server.post(path, body)
        assert response.status_code == 400, path
        assert response.json()["error"]["param"] == param


def test_large_bodies_are_read_elsewhere(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    read = strict_json.parse_json

    def noting(body: bytes) -> Any:
        places.append((len(body) > 100_000, is_on_the_loop()))
        return read(body)

    monkeypatch.setattr(strict_json, "parse_json", noting)
    for prompt in ("a" * 200_000, "a"):
        assert server.post("/tokenize", {"model": "tiny", "prompt": prompt}).status_code == 200
    assert places == [(True, False), (False, True)]


# structured output


def test_structured_output_is_compiled_once_and_elsewhere(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    compile_one = structured.Constraints._compile

    def noting(self: structured.Constraints, wanted: Any) -> Any:
        places.append(is_on_the_loop())
        return compile_one(self, wanted)

    for name in ("whole", "start"):
        run = getattr(Generation, name)

        def checking(self: Generation, _run: Any = run) -> Any:
            # Held by whoever asks, as nothing else holds it for certain.
            assert isinstance(self.compiled, structured.Matcher)
            return _run(self)

        monkeypatch.setattr(Generation, name, checking)
    monkeypatch.setattr(structured.Constraints, "_compile", noting)
    # As if many others were compiled between a request's preparation and its turn.
    monkeypatch.setattr(structured, "_MAX_KEPT", 0)
    body = {"model": "tiny", "prompt": "a", "n": 2, "seed": 1, "structured_outputs": {"choice": ["one"]}}
    for is_streamed in (False, True):
        places.clear()
        response = server.post("/v1/completions", {**body, "stream": is_streamed})
        assert response.status_code == 200
        assert places == [False]


def test_a_schema_that_is_too_large_is_refused_unwritten(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = structured._schema_text

    def noting(schema: Any) -> str:
        text = write(schema)
        written.append(len(text))
        return text

    monkeypatch.setattr(structured, "_schema_text", noting)
    large: list[Any] = [
        {"enum": [0] * 200_000},
        {"enum": ["ab" * 9] * 100_000},
        {"description": "a" * 70_000},
        {"a" * 70_000: 1},
        {"properties": {f"name{i}": {"type": "integer"} for i in range(9_000)}},
        {"enum": [[[]] * 30_000]},
    ]
    for schema in large:
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        for fields in (
            {"response_format": wanted},
            {"structured_outputs": {"json": schema}},
            {"structured_outputs": {"json": json.dumps(schema)}},
        ):
            response = server.post("/v1/completions", {"model": "tiny", "prompt": "a", **fields})
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"] == next(iter(fields))
            assert "at most 65,536 characters of json are taken" in error["message"]
    assert written == []
    body = {"model": "tiny", "prompt": "a", "structured_outputs": {"json": {"enum": ["a" * 60_000]}}}
    server.post("/v1/completions", body)
    assert written[0] > 60_000


def test_a_schema_as_text_that_is_nested_too_deeply_is_refused(server: RunningServer) -> None:
    schema = '{"a": ' + "[" * 50_000
    fields = {"structured_outputs": {"json": schema}}
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "a", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "structured_outputs"


def test_no_more_of_a_schema_is_looked_at_than_would_be_taken() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert sampling._is_large({"enum": endless})


@hypothesis.given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda part: st.lists(part) | st.dictionaries(st.text(), part),
    )
)
@hypothesis.example([0])
@hypothesis.example({"": [[], {}]})
@hypothesis.settings(deadline=None)
def test_no_schema_is_called_larger_than_it_is(schema: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MAX_CONSTRAINT", len(json.dumps(schema)))
        assert not sampling._is_large(schema)


# messages


def test_messages_of_very_many_parts_are_refused_unread() -> None:
    part = {"type": "text", "text": "a"}
    fits = {"model": "chat", "messages": [{"role": "user", "content": [part] * 4}] * 1024}
    assert len(ChatRequest.model_validate(fits).messages) == 1024
    for wrong_part in (part, {"type": "wrong"}):  # of which nothing is told: nobody has looked
        messages = [{"role": "user", "content": [wrong_part] * 5}] * 1024
        with pytest.raises(ValueError, match="there are 5120 parts of messages; at most 4096") as error:
            ChatRequest.model_validate({"model": "chat", "messages": messages})
        assert error.value.error_count() == 1  # type: ignore[attr-defined]


# tokenizing


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Characters that were tokenized, by whether that was on the event loop."""
    counts: Counter[bool] = Counter()
    encode = PieceEncoder._encodings

    def noting(self: PieceEncoder, texts: Any) -> Any:
        counts[is_on_the_loop()] += sum(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(PieceEncoder, "_encodings", noting)
    return counts


TEXTS = ["The old king. " * 60] * 20


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": TEXTS, "max_tokens": 1}),
        ("/v1/embeddings", {"input": TEXTS}),
        ("/v1/score", {"input": TEXTS}),
        ("/v1/score", {"text_1": TEXTS, "text_2": ["a"] * 20}),
        ("/v1/rank", {"text": "a", "candidates": TEXTS}),
        ("/tokenize", {"prompt": "".join(TEXTS)}),
    ],
)
def test_texts_that_are_long_together_are_tokenized_elsewhere(
    server: RunningServer, tokenized: Counter[bool], path: str, body: dict[str, Any]
) -> None:
    assert server.post(path, {"model": "tiny", **body}).status_code == 200
    assert tokenized[True] <= 4096
    assert tokenized[False] >= 16_000


def test_a_short_prompt_takes_no_thread(server: RunningServer, tokenized: Counter[bool]) -> None:
    body = {"model": "tiny", "prompt": ["abc", "defg"], "max_tokens": 1}
    assert server.post("/v1/completions", body).status_code == 200
    assert tokenized == {True: 7}


# answers


@pytest.fixture
def spelled(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Tokens that were spelled, by whether that was on the event loop."""
    counts: Counter[bool] = Counter()
    spell = token_texts.token_spelling

    def noting(tokenizer: Any, token_id: int) -> str:
        counts[is_on_the_loop()] += 1
        return spell(tokenizer, token_id)

    for module in (token_texts, scores, service):
        monkeypatch.setattr(module, "token_spelling", noting)
    return counts


LONG = "The old king. " * 100
PROMPTS = [LONG] * 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPTS, "max_tokens": 0, "echo": True, "logprobs": 2}),
        (
            "/v1/completions",
            {"prompt": PROMPTS, "max_tokens": 0, "echo": True, "logprobs": 2, "stream": True},
        ),
        (
            "/v1/completions",
            {"prompt": "a", "max_tokens": 40, "n": 20, "logprobs": 5, "seed": 1, "ignore_eos": True},
        ),
        ("/v1/score", {"input": PROMPTS, "return_tokens": True}),
        ("/tokenize", {"prompt": LONG * 3, "return_token_strs": True}),
    ],
)
def test_tokens_of_long_answers_are_spelled_elsewhere(
    server: RunningServer, spelled: Counter[bool], path: str, body: dict[str, Any]
) -> None:
    assert server.post(path, {"model": "tiny", **body}).status_code == 200
    assert spelled[True] == 0
    assert spelled[False] >= 4_000


def test_answers_of_chats_are_spelled_elsewhere(server: RunningServer, spelled: Counter[bool]) -> None:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "a"}],
        **{"n": 20, "max_tokens": 30, "logprobs": True, "top_logprobs": 5, "seed": 1, "ignore_eos": True},
    }
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert spelled[True] == 0
    assert spelled[False] >= 3_000


def test_log_probabilities_of_many_tokens_are_put_together_elsewhere(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    put_together = async_llm.request_output

    def noting(*arguments: Any) -> Any:
        places.append(is_on_the_loop())
        return put_together(*arguments)

    monkeypatch.setattr(async_llm, "request_output", noting)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 30, "n": 20, "seed": 1, "ignore_eos": True}
    for logprobs in (None, 5):
        assert server.post("/v1/completions", {**body, "logprobs": logprobs}).status_code == 200
    assert places == [True, False]


def test_a_request_has_no_more_completions_than_it_can_answer_at_once(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": ["a"] * 9, "n": 114, "max_tokens": 1}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
    assert "1026 completions" in response.json()["error"]["message"]


# the garbage collector


def test_what_stays_is_set_aside_once_and_when_models_are_there(
    sources: tuple[ModelSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("modernbert_decoder.serving.server.gc.freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr("modernbert_decoder.serving.server.gc.collect", lambda: calls.append("collect"))
    is_allowed = threading.Event()
    open_model = opener(EngineSettings())

    def late(source: ModelSource) -> Any:
        assert is_allowed.wait(60)
        calls.append("opened")
        return open_model(source)

    settings: dict[str, Any] = {"open_model": late, "when_ready": set_aside_what_stays}
    with running(sources[:1], is_awaited=False, **settings) as server:
        server.get("/health")
        is_allowed.set()
        until(lambda: "freeze" in calls, server)
    assert calls == ["opened", "collect", "freeze"]


numbers = st.floats(allow_nan=False, width=32)
logprobs = st.integers(0, 3).flatmap(
    lambda count: st.builds(
        CompletionLogprobs,
        tokens=st.just(["\N{SNOWMAN}", '"', "\\"][:count] * 300),
        token_logprobs=st.lists(st.none() | numbers, max_size=600),
        top_logprobs=st.lists(
            st.none() | st.dictionaries(st.text(max_size=3), numbers, max_size=3), max_size=5
        ),
        text_offset=st.just(list(range(count * 300))),
    )
)
choices = st.builds(
    CompletionChoice,
    index=st.integers(0, 9),
    text=st.text(max_size=9),
    logprobs=st.none() | logprobs,
    finish_reason=st.sampled_from(["stop", None]),
    stop_reason=st.none() | st.text(max_size=3) | st.integers(0, 9),
)


@hypothesis.given(st.lists(choices, max_size=4))
@hypothesis.settings(max_examples=40, deadline=None)
def test_answers_in_pieces_are_pydantics_own(listed: list[CompletionChoice]) -> None:
    reply: BaseModel = CompletionReply(
        id="a", created=1, model="m", choices=listed, usage=None, system_fingerprint="f"
    )
    pieces = list(long_answers._pieces(reply, depth=0))
    assert json.loads(b"".join(pieces)) == json.loads(reply.model_dump_json())


def test_no_piece_of_an_answer_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    spell: Callable[[Any], bytes] = long_answers._json

    def noting(value: Any) -> bytes:
        sizes.append(len(value) if isinstance(value, list) else 1)
        return spell(value)

    monkeypatch.setattr(long_answers, "_json", noting)
    many = CompletionLogprobs(tokens=["a"] * 5_000, token_logprobs=[0.5], top_logprobs=[], text_offset=[])
    choice = CompletionChoice(index=0, text="", logprobs=many, finish_reason=None)
    reply = CompletionReply(id="a", created=1, model="m", choices=[choice] * 3, system_fingerprint="f")
    list(long_answers._pieces(reply, depth=0))
    assert max(sizes) == 256
    assert sum(sizes) > 15_000
