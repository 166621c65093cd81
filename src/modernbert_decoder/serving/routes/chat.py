"""`POST /v1/chat/completions`, for models whose folder has a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from modernbert_decoder.engine.outputs import CompletionOutput, StreamChunk
from modernbert_decoder.serving.context import RequestRecord, context_of, record_of
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.generation import Generation, primed
from modernbert_decoder.serving.models import ServedModel
from modernbert_decoder.serving.prompts import check_room, encode_text
from modernbert_decoder.serving.protocol.base import Usage
from modernbert_decoder.serving.protocol.completions import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChatReply,
    ChatRequest,
)
from modernbert_decoder.serving.routes.beginning import COMPUTING_ERRORS, answer_id, begin, fingerprint
from modernbert_decoder.serving.routes.long_answers import long_json_response, made
from modernbert_decoder.serving.routes.streaming import STREAM_OR, stream_response
from modernbert_decoder.serving.sse import while_connected
from modernbert_decoder.serving.strict_json import StrictJsonRoute
from modernbert_decoder.serving.token_texts import chat_logprobs

router = APIRouter(route_class=StrictJsonRoute, tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation",
    response_model=ChatReply,
    responses={**STREAM_OR, **COMPUTING_ERRORS},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answers the last message of a conversation, written as the model's chat template says."""
    record = record_of(request)
    record.stream = bool(body.stream)
    model = begin(request, body, model=body.model, user=body.user, needs="completions")
    ids = await _prompt_ids(body, model)
    record.prompt_tokens = len(ids)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling_params(max_tokens=_max_tokens(body), logprobs=logprobs)
    generation = Generation(model, [ids], params, context_of(request), record)
    job = _Job(body, model, record)
    if not body.stream:
        return await while_connected(request, _whole(job, generation))
    return stream_response(await while_connected(request, _events(job, generation)), record)


def _max_tokens(body: ChatRequest) -> int | None:
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise ApiError(
            400,
            "max_completion_tokens: max_tokens, its older name, has another value",
            param="max_completion_tokens",
            code="invalid_value",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            400, "top_logprobs: only together with logprobs", param="top_logprobs", code="invalid_value"
        )
    return body.max_completion_tokens or body.max_tokens


async def _prompt_ids(body: ChatRequest, model: ServedModel) -> list[int]:
    """The conversation in the template's words."""
    if model.chat_template is None:
        raise ApiError(
            400,
            f"the model {model.name!r} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json) and cannot chat; use /v1/completions",
            param="model",
            code="no_chat_template",
        )
    tokenizer = model.llm.tokenizer
    text = model.chat_template.render([message.plain() for message in body.messages])
    ids = await encode_text(text, tokenizer)
    if ids[1:2] == [tokenizer.cls_token_id]:  # the template writes it, too
        del ids[0]
    fields = ("max_completion_tokens", "max_tokens")
    limit_field = next((name for name in fields if getattr(body, name) is not None), None)
    check_room(
        ids,
        model.llm,
        max_tokens=_max_tokens(body) or 1,
        prompt_field="messages",
        limit_field=limit_field,
    )
    return ids


async def _whole(job: _Job, generation: Generation) -> Response:
    await generation.prepare(structured_field=job.body.structured_field)
    (output,) = await generation.whole()
    num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    num_items = len(output.outputs)
    if job.body.logprobs:
        num_items += num_tokens * (1 + (job.body.top_logprobs or 0))
    reply = await made(lambda: job.reply(output.outputs, num_tokens), num_items=num_items)
    return await long_json_response(reply, num_items=num_items)


async def _events(job: _Job, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's events, the first of which is certain to come."""
    await generation.prepare(structured_field=job.body.structured_field)
    return _streamed(job, await primed(await generation.start()))


async def _streamed(
    job: _Job, chunks: AsyncGenerator[tuple[int, StreamChunk], None]
) -> AsyncGenerator[dict[str, Any], None]:
    begun: set[int] = set()
    num_tokens = 0
    async with aclosing(chunks):
        async for _, chunk in chunks:
            num_tokens += len(chunk.token_ids)
            delta: dict[str, str] = {}
            if chunk.index not in begun:
                begun.add(chunk.index)
                delta["role"] = "assistant"
            if chunk.text or "role" in delta:
                delta["content"] = chunk.text
            if delta or chunk.logprobs is not None or chunk.finish_reason is not None:
                yield job.event([job.piece(chunk, delta)])
    if job.body.wants_usage:
        yield job.event([], num_tokens)


class _Job:
    """A request on its way to an answer."""

    def __init__(self, body: ChatRequest, model: ServedModel, record: RequestRecord) -> None:
        self.body = body
        self._model = model
        self._record = record
        self._head: dict[str, Any] = {
            "id": answer_id("chatcmpl", record),
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": fingerprint(model),
        }

    def choice(self, completion: CompletionOutput) -> ChatChoice:
        """A whole answer of the model."""
        return ChatChoice(
            index=completion.index,
            message=AssistantMessage(content=completion.text),
            logprobs=self._logprobs(completion),
            finish_reason=completion.finish_reason,  # type: ignore[arg-type]
            stop_reason=completion.stop_reason,
        )

    def piece(self, chunk: StreamChunk, delta: dict[str, str]) -> dict[str, Any]:
        """What a chunk adds to an answer."""
        return {
            "index": chunk.index,
            "delta": delta,
            "logprobs": self._logprobs(chunk),
            "finish_reason": chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
        }

    def _logprobs(self, part: CompletionOutput | StreamChunk) -> ChatLogprobs | None:
        if part.logprobs is None:
            return None
        num_top = self.body.top_logprobs or 0
        return chat_logprobs(self._model.llm.tokenizer, part.logprobs, num_top=num_top)

    def reply(self, completions: Sequence[CompletionOutput], num_tokens: int) -> ChatReply:
        """All answers."""
        choices = [self.choice(completion) for completion in completions]
        return ChatReply(**self._head, choices=choices, usage=self._usage(num_tokens))

    def event(self, choices: list[dict[str, Any]], num_tokens: int | None = None) -> dict[str, Any]:
        """A chunk of a stream."""
        chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self.body.wants_usage:
            chunk["usage"] = None if num_tokens is None else self._usage(num_tokens)
        return chunk

    def _usage(self, num_tokens: int) -> Usage:
        return Usage.of(self._record.prompt_tokens or 0, num_tokens)
