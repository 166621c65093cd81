"""`/v1/chat/completions` follows a model's chat template, and says what is missing where there is none."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from servers import RunningServer

from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.errors import CheckpointError, InputError
from modernbert_decoder.serving.chat_template import ChatTemplate, find_chat_template

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]},
]
WRITTEN = "system: Be brief.\nuser: Who are you?\nassistant:"


@pytest.fixture(scope="module")
def chatting(folders: dict[str, Any]) -> Any:
    with LLM(folders["chat"], dtype="float32") as llm:
        yield llm


def test_a_conversation_is_continued_as_its_template_writes_it(client: openai.OpenAI, chatting: LLM) -> None:
    reply = client.chat.completions.create(model="chat", messages=MESSAGES, temperature=0, max_tokens=12)
    (output,) = chatting.generate([WRITTEN], SamplingParams(temperature=0, max_tokens=12))
    assert reply.choices[0].message.content == output.outputs[0].text
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    # [CLS] is there once, though template and tokenizer both write it.
    assert reply.usage.prompt_tokens == len(chatting.tokenizer.encode(WRITTEN))


def test_a_streamed_answer_is_the_whole_one(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "seed": 2, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(
            **settings,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].logprobs is not None
    streamed = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content or []]
    assert streamed == whole.choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in streamed] == [2] * 12


def test_an_answer_goes_back_as_a_message_as_the_client_holds_it(
    client: openai.OpenAI, chatting: LLM
) -> None:
    settings: dict[str, Any] = {"model": "chat", "temperature": 0, "max_tokens": 6}
    said = client.chat.completions.create(messages=MESSAGES, **settings).choices[0].message
    held = said.model_dump()
    assert set(held) > {"refusal", "tool_calls"}
    more = [*MESSAGES, held, {"role": "user", "content": "Why?"}]
    reply = client.chat.completions.create(messages=more, **settings)
    written = WRITTEN + f" {said.content}\nuser: Why?\nassistant:"
    (output,) = chatting.generate([written], SamplingParams(temperature=0, max_tokens=6))
    assert reply.choices[0].message.content == output.outputs[0].text


@pytest.mark.parametrize(
    ("length", "limit", "param"),
    [
        (3000, {}, "messages"),
        (3000, {"max_tokens": 4}, "messages"),
        (10, {"max_tokens": 3000}, "max_tokens"),
        (10, {"max_completion_tokens": 3000}, "max_completion_tokens"),
    ],
)
def test_the_field_that_is_too_long_for_the_context_is_named(
    server: RunningServer, length: int, limit: dict[str, int], param: str
) -> None:
    messages = [{"role": "user", "content": "☃" * length}]
    response = server.post("/v1/chat/completions", {"model": "chat", "messages": messages, **limit})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == param


def test_without_max_tokens_the_context_is_filled(client: openai.OpenAI, chatting: LLM) -> None:
    reply = client.chat.completions.create(
        model="chat", messages=MESSAGES, seed=1, extra_body={"ignore_eos": True}
    )
    assert reply.usage is not None
    assert reply.usage.total_tokens == chatting.max_context
    assert reply.choices[0].finish_reason == "length"


def test_a_model_without_template_says_what_is_missing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"chat_template\.jinja.*use /v1/completions") as error:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert error.value.code == "no_chat_template"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"tools": []}, "tools"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_with_its_parameter(
    server: RunningServer, change: dict[str, Any], param: str
) -> None:
    response = server.post("/v1/chat/completions", {"model": "chat", "messages": MESSAGES, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_template_cannot_leave_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", special_tokens={})
    with pytest.raises(InputError, match="do not fit the model's chat template"):
        template.render([{"role": "user", "content": "x"}])


def test_a_template_may_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", special_tokens={})
    with pytest.raises(InputError, match="roles must alternate"):
        template.render([])


def test_a_broken_template_is_a_damaged_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% for %}", special_tokens={})


def test_the_template_of_the_tokenizer_configuration_is_found(tmp_path: Any) -> None:
    templates = [
        {"name": "tools", "template": "t"},
        {"name": "default", "template": "{{ bos_token }}!"},
    ]
    config = {"chat_template": templates, "bos_token": {"content": "[CLS]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = find_chat_template(tmp_path)
    assert template is not None
    assert template.render([]) == "[CLS]!"
    (tmp_path / "chat_template.jinja").write_text("file")
    template = find_chat_template(tmp_path)
    assert template is not None
    assert template.render([]) == "file"
