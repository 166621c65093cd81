"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from modernbert_decoder.engine.outputs import CompletionOutput, RequestOutput, Score, StreamChunk
from modernbert_decoder.serving.context import RequestRecord, context_of, record_of
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.generation import Generation, primed
from modernbert_decoder.serving.models import ServedModel
from modernbert_decoder.serving.prompts import EncodedPrompt, encode_prompts, listed_prompts
from modernbert_decoder.serving.protocol.base import MAX_COMPLETIONS_TOGETHER, Usage
from modernbert_decoder.serving.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
)
from modernbert_decoder.serving.routes.beginning import COMPUTING_ERRORS, answer_id, begin, fingerprint
from modernbert_decoder.serving.routes.long_answers import long_json_response, made
from modernbert_decoder.serving.routes.streaming import STREAM_OR, stream_response
from modernbert_decoder.serving.sse import while_connected
from modernbert_decoder.serving.strict_json import StrictJsonRoute
from modernbert_decoder.serving.token_texts import CompletionTokens

router = APIRouter(route_class=StrictJsonRoute, tags=["OpenAI"])


@dataclass(frozen=True)
class Echo:
    """What stands in front of the completions of one prompt."""

    text: str
    logprobs: CompletionLogprobs | None


@router.post(
    "/v1/completions",
    summary="Continue prompts",
    response_model=CompletionReply,
    responses={**STREAM_OR, **COMPUTING_ERRORS},
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues one or several prompts, at once or token by token."""
    record = record_of(request)
    record.stream = bool(body.stream)
    model = begin(request, body, model=body.model, user=body.user, needs="completions")
    _check(body)
    job = _Job(body, model, await _prompts(body, model), record)
    record.prompt_tokens = job.usage(0).prompt_tokens
    # The limit of tokens must be positive where there is a generation at all.
    params = body.sampling_params(max_tokens=job.max_tokens or 1, logprobs=body.logprobs)
    generation = Generation(
        model, [prompt.ids for prompt in job.prompts], params, context_of(request), record
    )
    if not body.stream:
        return await while_connected(request, _whole(job, generation))
    return stream_response(await while_connected(request, _events(job, generation)), record)


def _check(body: CompletionRequest) -> None:
    num_prompts = len(listed_prompts(body.prompt or ""))
    num_completions = num_prompts * (body.n or 1)
    if num_completions > MAX_COMPLETIONS_TOGETHER:
        raise ApiError(
            400,
            f"n: {num_prompts} prompts make {num_completions} completions; at most "
            f"{MAX_COMPLETIONS_TOGETHER:,} are taken at a time",
            param="n",
            code="invalid_value",
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(
            400,
            "best_of: completions are not computed to be thrown away; leave it out, or make it equal to n",
            param="best_of",
            code="unsupported_parameter",
        )


async def _prompts(body: CompletionRequest, model: ServedModel) -> list[EncodedPrompt]:
    return await encode_prompts(
        body.prompt,
        model.llm,
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        is_limit_given=body.max_tokens is not None and "max_tokens" in body.model_fields_set,
        skip_special_tokens=body.skip_special_tokens is not False,
        is_echoed=bool(body.echo),
    )


async def _whole(job: _Job, generation: Generation) -> Response:
    echoes = await job.echoes(generation)
    outputs: list[RequestOutput] = []
    if job.max_tokens > 0:
        await generation.prepare(structured_field=job.body.structured_field)
        outputs = await generation.whole()
    num_tokens = _num_tokens(outputs)
    num_items = job.num_items(num_tokens)
    reply = await made(lambda: job.reply(job.choices(echoes, outputs), num_tokens), num_items=num_items)
    return await long_json_response(reply, num_items=num_items)


async def _events(job: _Job, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's events, the first of which is certain to come."""
    echoes = await job.echoes(generation)
    if job.max_tokens == 0:
        return _echoed(job, echoes)
    await generation.prepare(structured_field=job.body.structured_field)
    return _streamed(job, echoes, await primed(await generation.start()))


async def _echoed(job: _Job, echoes: Sequence[Echo]) -> AsyncGenerator[dict[str, Any], None]:
    for index, echo in job.places(echoes):
        yield job.event([job.nothing(index, echo)])
        await asyncio.sleep(0)  # each may be long, and sending gives others no turn by itself
    if job.body.wants_usage:
        yield job.event([], job.usage(0))


async def _streamed(
    job: _Job, echoes: Sequence[Echo], chunks: AsyncGenerator[tuple[int, StreamChunk], None]
) -> AsyncGenerator[dict[str, Any], None]:
    pieces: dict[int, _Pieces] = {}
    num_tokens = 0
    async with aclosing(chunks):
        async for place, chunk in chunks:
            num_tokens += len(chunk.token_ids)
            index = place * job.num_each + chunk.index
            if index not in pieces:
                pieces[index] = _Pieces(job, index, echoes[place])
            choice = pieces[index].choice(chunk)
            if choice is not None:
                yield job.event([choice])
    if job.body.wants_usage:
        yield job.event([], job.usage(num_tokens))


class _Pieces:
    """One completion as it is streamed."""

    def __init__(self, job: _Job, index: int, echo: Echo) -> None:
        self._job = job
        self._index = index
        self._echo: Echo | None = echo
        self._tokens = job.tokens(offset=len(echo.text))

    def choice(self, chunk: StreamChunk) -> CompletionChoice | None:
        """What a chunk adds; None if that is nothing to show."""
        echo, self._echo = self._echo, None
        text, logprobs = chunk.text, None
        if chunk.logprobs is not None:
            self._tokens.add_tables(chunk.logprobs, num_top=self._job.num_top)
            logprobs = self._tokens.take()
        if echo is not None:
            text, logprobs = echo.text + text, _joined(echo.logprobs, logprobs)
        elif not text and logprobs is None and chunk.finish_reason is None:
            return None
        return CompletionChoice(
            index=self._index,
            text=text,
            logprobs=logprobs,
            finish_reason=chunk.finish_reason,  # type: ignore[arg-type]
            stop_reason=chunk.stop_reason,
        )


class _Job:
    """A request on its way to an answer."""

    def __init__(
        self,
        body: CompletionRequest,
        model: ServedModel,
        prompts: Sequence[EncodedPrompt],
        record: RequestRecord,
    ) -> None:
        self.body = body
        self.prompts = prompts
        self.max_tokens = 16 if body.max_tokens is None else body.max_tokens
        self.num_each = body.n or 1
        self.num_top = body.logprobs or 0
        self._model = model
        self._skip = body.skip_special_tokens is not False
        self._head: dict[str, Any] = {
            "id": answer_id("cmpl", record),
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": fingerprint(model),
        }

    async def echoes(self, generation: Generation) -> list[Echo]:
        """What `echo` wants of each prompt; its log-probabilities take reading the prompts first."""
        if not self.body.echo:
            return [Echo("", None)] * len(self.prompts)
        if self.body.logprobs is None:
            return [Echo(prompt.text, None) for prompt in self.prompts]
        assert self._model.engine is not None
        scores = await self._model.engine.score(
            [prompt.ids for prompt in self.prompts],
            top_logprobs=self.num_top,
            client=generation.record.client,
            timeout=generation.seconds_left,
        )
        return await made(lambda: self._echoed(scores), num_items=self.num_items(0))

    def _echoed(self, scores: Sequence[Score]) -> list[Echo]:
        tokenizer = self._model.llm.tokenizer
        return [
            Echo(prompt.text, prompt.echoed_tokens(tokenizer, score, skip_special_tokens=self._skip))
            for prompt, score in zip(self.prompts, scores, strict=True)
        ]

    def num_items(self, num_tokens: int) -> int:
        """About how many numbers and texts an answer with so many tokens of completions has."""
        num_completions = len(self.prompts) * self.num_each
        if self.body.logprobs is None:
            return num_completions
        num_echoed = self.num_each * sum(len(prompt.ids) for prompt in self.prompts) if self.body.echo else 0
        return num_completions + (num_tokens + num_echoed) * (1 + self.num_top)

    def tokens(self, *, offset: int) -> CompletionTokens:
        """Of a completion that starts so many characters into the text."""
        return CompletionTokens(self._model.llm.tokenizer, skip_special_tokens=self._skip, offset=offset)

    def places(self, echoes: Sequence[Echo]) -> list[tuple[int, Echo]]:
        """The index of every completion and what stands in front of it."""
        repeated = [echo for echo in echoes for _ in range(self.num_each)]
        return list(enumerate(repeated))

    def nothing(self, index: int, echo: Echo) -> CompletionChoice:
        """A completion of no tokens."""
        logprobs = echo.logprobs
        if self.body.logprobs is not None and logprobs is None:
            logprobs = self.tokens(offset=0).take()
        return CompletionChoice(index=index, text=echo.text, logprobs=logprobs, finish_reason="length")

    def choices(self, echoes: Sequence[Echo], outputs: Sequence[RequestOutput]) -> list[CompletionChoice]:
        """All completions, or where no tokens were asked for what stands in front of them."""
        if not outputs:
            return [self.nothing(index, echo) for index, echo in self.places(echoes)]
        return [
            self.choice(place, echo, completion)
            for place, (echo, output) in enumerate(zip(echoes, outputs, strict=True))
            for completion in output.outputs
        ]

    def choice(self, place: int, echo: Echo, completion: CompletionOutput) -> CompletionChoice:
        """A whole completion of the prompt at `place`."""
        logprobs = echo.logprobs
        if completion.logprobs is not None:
            tokens = self.tokens(offset=len(echo.text))
            tokens.add_tables(completion.logprobs, num_top=self.num_top)
            logprobs = _joined(logprobs, tokens.take())
        return CompletionChoice(
            index=place * self.num_each + completion.index,
            text=echo.text + completion.text,
            logprobs=logprobs,
            finish_reason=completion.finish_reason,  # type: ignore[arg-type]
            stop_reason=completion.stop_reason,
        )

    def usage(self, completion_tokens: int) -> Usage:
        """Tokens of prompts, each counted once, and completions."""
        return Usage.of(sum(len(prompt.ids) for prompt in self.prompts), completion_tokens)

    def reply(self, choices: list[CompletionChoice], completion_tokens: int) -> CompletionReply:
        """The whole answer."""
        return CompletionReply(**self._head, choices=choices, usage=self.usage(completion_tokens))

    def event(self, choices: list[CompletionChoice], usage: Usage | None = None) -> dict[str, Any]:
        """A chunk of a stream."""
        chunk: dict[str, Any] = {
            **self._head,
            "object": "text_completion",
            "choices": choices,
        }
        if self.body.wants_usage:
            chunk["usage"] = usage
        return chunk


def _joined(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """Both, one behind the other."""
    if first is None or second is None:
        return first or second
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _num_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
