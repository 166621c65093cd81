"""`POST /v1/score` and `POST /v1/rank`: how likely texts and continuations are."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from modernbert_decoder.engine.async_llm import AsyncLLM
from modernbert_decoder.engine.outputs import RankedCandidate, Score
from modernbert_decoder.errors import InputError
from modernbert_decoder.serving.context import context_of, record_of
from modernbert_decoder.serving.errors import ApiError, parameter_named
from modernbert_decoder.serving.generation import together
from modernbert_decoder.serving.models import ServedModel
from modernbert_decoder.serving.prompts import check_token_ids, encode_texts, listed_prompts
from modernbert_decoder.serving.protocol.base import Usage
from modernbert_decoder.serving.protocol.reading import (
    Ranked,
    RankReply,
    RankRequest,
    Scored,
    ScoreReply,
    ScoreRequest,
    TokenScore,
)
from modernbert_decoder.serving.routes.beginning import COMPUTING_ERRORS, answer_id, begin
from modernbert_decoder.serving.routes.long_answers import long_json_response, made
from modernbert_decoder.serving.routes.streaming import json_response
from modernbert_decoder.serving.sse import while_connected
from modernbert_decoder.serving.strict_json import StrictJsonRoute
from modernbert_decoder.serving.token_texts import token_spelling
from modernbert_decoder.tokenizer import Tokenizer

router = APIRouter(route_class=StrictJsonRoute, tags=["Extensions"])


@router.post(
    "/v1/score",
    summary="Tell how likely texts are",
    response_model=ScoreReply,
    responses={**COMPUTING_ERRORS},
)
async def score(body: ScoreRequest, request: Request) -> Response:
    """Log-probabilities of whole texts, or of continuations."""
    record = record_of(request)
    model = begin(request, body, model=body.model, user=body.user, needs="score")
    _check(body)
    settings = {"client": record.client, "timeout": context_of(request).settings.timeout}
    if body.input is not None:
        work = _whole_texts(body, model, settings)
    else:
        work = _continuations(body, model, settings)
    data, num_tokens = await while_connected(request, work)
    record.prompt_tokens = num_tokens
    reply = ScoreReply(
        id=answer_id("score", record),
        created=int(time.time()),
        model=model.name,
        data=data,
        usage=Usage.of(num_tokens),
    )
    return await long_json_response(reply, num_items=num_tokens if body.return_tokens else len(data))


@router.post(
    "/v1/rank",
    summary="Put continuations of a text in order",
    response_model=RankReply,
    responses={**COMPUTING_ERRORS},
)
async def rank(body: RankRequest, request: Request) -> Response:
    """Candidates that may follow a text, the likeliest first."""
    record = record_of(request)
    model = begin(request, body, model=body.model, user=body.user, needs="rank")
    assert model.engine is not None
    ranked = await while_connected(
        request,
        model.engine.rank(
            body.text,
            body.candidates,
            normalization=body.normalization,
            unconditional_text=body.unconditional_text,
            client=record.client,
            timeout=context_of(request).settings.timeout,
        ),
    )
    data = [
        Ranked(
            index=each.index,
            candidate=each.candidate,
            score=each.score,
            logprob=each.total_logprob,
            num_tokens=each.num_tokens,
        )
        for each in ranked
    ]
    return json_response(
        RankReply(id=answer_id("rank", record), created=int(time.time()), model=model.name, data=data)
    )


def _check(body: ScoreRequest) -> None:
    """Either whole texts or continuations, and for each only what belongs to it."""
    is_pair = body.text_1 is not None or body.text_2 is not None
    wrong: str | None = None
    if (body.input is not None) == is_pair:
        wrong = "input: give either input, or text_1 and text_2"
    elif is_pair and body.text_1 is None:
        wrong = "text_1: is missing beside text_2"
    elif is_pair and body.text_2 is None:
        wrong = "text_2: is missing beside text_1"
    elif is_pair and body.stride is not None:
        wrong = "stride: only together with input"
    elif is_pair and body.return_tokens:
        wrong = "return_tokens: only together with input"
    elif not is_pair and body.normalization != "sum":
        wrong = "normalization: only together with text_1 and text_2"
    if wrong is not None:
        raise ApiError(400, wrong, param=wrong.partition(":")[0], code="invalid_value")


async def _whole_texts(
    body: ScoreRequest, model: ServedModel, settings: dict[str, Any]
) -> tuple[list[Scored], int]:
    assert body.input is not None
    listed = listed_prompts(body.input)
    for each in listed:
        if not isinstance(each, str):
            check_token_ids(each, model.llm, param="input")
    assert model.engine is not None
    scores = await model.engine.score(list(listed), stride=body.stride, **settings)
    num_tokens = sum(len(each.token_ids) for each in scores)
    tokenizer = model.llm.tokenizer if body.return_tokens else None
    num_items = num_tokens if body.return_tokens else len(scores)
    data = await made(
        lambda: [_scored(index, each, tokenizer) for index, each in enumerate(scores)], num_items=num_items
    )
    return data, num_tokens


def _scored(index: int, score: Score, tokenizer: Tokenizer | None) -> Scored:
    """A text; with its tokens where there is a tokenizer to spell them."""
    return Scored(
        index=index,
        score=score.total_logprob,
        logprob=score.total_logprob,
        num_tokens=score.num_tokens,
        perplexity=_finite(score.perplexity),
        bits_per_byte=_finite(score.bits_per_byte),
        tokens=None if tokenizer is None else _tokens(score, tokenizer),
    )


async def _continuations(
    body: ScoreRequest, model: ServedModel, settings: dict[str, Any]
) -> tuple[list[Scored], int]:
    firsts, seconds = _paired(body.text_1, body.text_2)
    assert model.engine is not None
    engine: AsyncLLM = model.engine
    ranked: list[RankedCandidate] = []
    if len(set(firsts)) == 1:  # which is read once for all
        ranked = await _ranked(engine, firsts[0], seconds, body, settings)
        ranked.sort(key=lambda each: each.index)
    else:
        work = [
            _ranked(engine, first, [second], body, settings)
            for first, second in zip(firsts, seconds, strict=True)
        ]
        ranked = [only for (only,) in await together(work)]
    data = [
        Scored(index=index, score=each.score, logprob=each.total_logprob, num_tokens=each.num_tokens)
        for index, each in enumerate(ranked)
    ]
    whole = [first + second for first, second in zip(firsts, seconds, strict=True)]
    return data, sum(map(len, await encode_texts(whole, model.llm.tokenizer)))


async def _ranked(
    engine: AsyncLLM, first: str, seconds: Sequence[str], body: ScoreRequest, settings: dict[str, Any]
) -> list[RankedCandidate]:
    """Continuations of one text; errors, which the engine tells of text and candidates, name our fields."""
    try:
        return await engine.rank(first, seconds, normalization=body.normalization, **settings)
    except InputError as error:
        fields = {"text": "text_1", "candidates": "text_2"}
        named = parameter_named(str(error), fields)
        if named is None:
            raise
        raise ApiError(400, f"{fields[named]}: {error}", param=fields[named], code="invalid_value") from None


def _paired(first: str | list[str] | None, second: str | list[str] | None) -> tuple[list[str], list[str]]:
    """Both as lists of one length."""
    assert first is not None
    assert second is not None
    firsts = [first] if isinstance(first, str) else first
    seconds = [second] if isinstance(second, str) else second
    length = max(len(firsts), len(seconds))
    if len(firsts) not in (1, length) or len(seconds) not in (1, length):
        raise ApiError(
            400,
            f"text_2: there are {len(firsts)} texts in text_1 and {len(seconds)} in text_2; give as many, "
            "or one",
            param="text_2",
            code="invalid_value",
        )
    return (
        firsts * length if len(firsts) == 1 else firsts,
        seconds * length if len(seconds) == 1 else seconds,
    )


def _tokens(score: Score, tokenizer: Tokenizer) -> list[TokenScore]:
    logprobs = (None, *score.logprobs)
    return [
        TokenScore(token=token_spelling(tokenizer, token_id), token_id=token_id, logprob=logprob)
        for token_id, logprob in zip(score.token_ids, logprobs, strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
