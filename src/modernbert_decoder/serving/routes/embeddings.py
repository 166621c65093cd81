"""`POST /v1/embeddings` and `POST /v1/classify`: texts in the tokenizer's template, read once."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from modernbert_decoder.serving.context import context_of, record_of
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.models import ServedModel
from modernbert_decoder.serving.prompts import check_token_ids
from modernbert_decoder.serving.protocol.base import Usage
from modernbert_decoder.serving.protocol.reading import (
    Classification,
    ClassifyReply,
    ClassifyRequest,
    Embedding,
    EmbeddingReply,
    EmbeddingRequest,
    TextPair,
)
from modernbert_decoder.serving.routes.beginning import COMPUTING_ERRORS, answer_id, begin
from modernbert_decoder.serving.routes.long_answers import long_json_response
from modernbert_decoder.serving.routes.streaming import json_response
from modernbert_decoder.serving.sse import while_connected
from modernbert_decoder.serving.strict_json import StrictJsonRoute

router = APIRouter(route_class=StrictJsonRoute)


@router.post(
    "/v1/embeddings",
    summary="Turn texts into vectors",
    response_model=EmbeddingReply,
    responses={**COMPUTING_ERRORS},
    tags=["OpenAI"],
)
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors of the states after the final norm."""
    model = begin(request, body, model=body.model, user=body.user, needs="embeddings")
    width = model.llm.architecture.hidden_size
    if body.dimensions not in (None, width):
        raise ApiError(
            400,
            f"dimensions: the vectors of this model have {width} and cannot be shortened",
            param="dimensions",
            code="invalid_value",
        )
    record = record_of(request)
    assert model.engine is not None
    outputs = await while_connected(
        request,
        model.engine.embed(
            _texts(body.input, model),
            pooling=body.pooling,
            normalize=body.normalize,
            truncate=body.truncate,
            max_length=body.max_length,
            client=record.client,
            timeout=context_of(request).settings.timeout,
        ),
    )
    record.prompt_tokens = sum(output.num_tokens for output in outputs)
    is_binary = body.encoding_format == "base64"
    data = [
        Embedding(index=index, embedding=_encoded(output.embedding, is_binary=is_binary))
        for index, output in enumerate(outputs)
    ]
    reply = EmbeddingReply(data=data, model=model.name, usage=Usage.of(record.prompt_tokens))
    return await long_json_response(reply, num_items=len(data) * width)


@router.post(
    "/v1/classify",
    summary="Label texts",
    response_model=ClassifyReply,
    responses={**COMPUTING_ERRORS},
    tags=["Extensions"],
)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Labels and probabilities of texts, by a model with a classification head."""
    model = begin(request, body, model=body.model, user=body.user, needs="classify")
    record = record_of(request)
    assert model.engine is not None
    outputs = await while_connected(
        request,
        model.engine.classify(
            _texts(body.input, model),
            truncate=body.truncate,
            max_length=body.max_length,
            client=record.client,
            timeout=context_of(request).settings.timeout,
        ),
    )
    record.prompt_tokens = sum(output.num_tokens for output in outputs)
    labels = labels_of(model)
    data = [
        Classification(
            index=index,
            label=output.label,
            probs=list(output.probabilities),
            labels=labels,
            num_classes=len(labels),
            num_tokens=output.num_tokens,
        )
        for index, output in enumerate(outputs)
    ]
    return json_response(
        ClassifyReply(
            id=answer_id("classify", record),
            created=int(time.time()),
            model=model.name,
            data=data,
            usage=Usage.of(record.prompt_tokens),
        )
    )


def labels_of(model: ServedModel) -> list[str]:
    """A classifier's labels in the order of its probabilities."""
    architecture = model.llm.architecture
    return [architecture.id2label[i] for i in range(architecture.num_labels)]


def _texts(given: Any, model: ServedModel) -> list[Any]:
    """One text or several, as a list of what the engine takes."""
    is_one = isinstance(given, str | TextPair) or (isinstance(given, list) and isinstance(given[0], int))
    listed: Sequence[Any] = [given] if is_one else given
    for each in listed:
        if isinstance(each, list):
            check_token_ids(each, model.llm, param="input")
    return [(each.text, each.text_pair) if isinstance(each, TextPair) else each for each in listed]


def _encoded(vector: NDArray[np.float32], *, is_binary: bool) -> list[float] | str:
    if not is_binary:
        numbers: list[float] = vector.tolist()
        return numbers
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
