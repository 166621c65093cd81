"""Models, tokens, health and metrics."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request, Response

from modernbert_decoder.architecture import Head
from modernbert_decoder.serving.context import context_of, record_of
from modernbert_decoder.serving.metrics import METRICS_TYPE
from modernbert_decoder.serving.models import ServedModel, State
from modernbert_decoder.serving.prompts import check_token_ids, encode_text
from modernbert_decoder.serving.protocol.base import MAX_LOGPROBS
from modernbert_decoder.serving.protocol.service import (
    DetokenizeReply,
    DetokenizeRequest,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    TokenizeReply,
    TokenizeRequest,
)
from modernbert_decoder.serving.routes.beginning import BODY_ERRORS, errors
from modernbert_decoder.serving.routes.embeddings import labels_of
from modernbert_decoder.serving.routes.long_answers import long_json_response, made
from modernbert_decoder.serving.routes.streaming import json_response
from modernbert_decoder.serving.strict_json import StrictJsonRoute
from modernbert_decoder.serving.token_texts import token_spelling

router = APIRouter(route_class=StrictJsonRoute)

_TASKS: Final = {
    Head.CAUSAL_LM: "generate",
    Head.SEQUENCE_CLASSIFICATION: "classify",
    Head.NONE: "embed",
}
_KNOWN_WHEN_OPEN: Final = (
    "task",
    "head",
    "dtype",
    "max_model_len",
    "vocab_size",
    "hidden_size",
    "num_parameters",
    "labels",
    "problem_type",
    "has_chat_template",
)


@router.get(
    "/v1/models",
    summary="List the models",
    response_model=ModelList,
    responses={**errors(401, 403, 500)},
    tags=["OpenAI"],
)
async def list_models(request: Request) -> Response:
    """All models, in the order of the command line."""
    registry = context_of(request).registry
    return json_response(ModelList(data=[_card(model) for model in registry]))


@router.get(
    "/v1/models/{model:path}",
    summary="Describe a model",
    response_model=ModelCard,
    responses={**errors(401, 403, 404, 500)},
    tags=["OpenAI"],
)
async def get_model(model: str, request: Request) -> Response:
    """One model."""
    return json_response(_card(context_of(request).registry.find(model)))


def _card(model: ServedModel) -> ModelCard:
    known: dict[str, Any] = dict.fromkeys(_KNOWN_WHEN_OPEN)
    capabilities: list[str] = []
    if model.engine is not None:
        architecture, llm = model.llm.architecture, model.llm
        is_classifier = architecture.head is Head.SEQUENCE_CLASSIFICATION
        capabilities = list(model.capabilities)
        known = {
            "task": _TASKS[architecture.head],
            "head": architecture.head.name.lower(),
            "dtype": llm.formats,
            "max_model_len": llm.max_context,
            "vocab_size": architecture.vocab_size,
            "hidden_size": architecture.hidden_size,
            "num_parameters": architecture.num_parameters(),
            "labels": labels_of(model) if is_classifier else None,
            "problem_type": architecture.problem_type if is_classifier else None,
            "has_chat_template": model.chat_template is not None,
        }
    return ModelCard(
        id=model.name,
        created=model.created,
        parent=model.source.parent,
        ready=model.engine is not None,
        capabilities=capabilities,  # type: ignore[arg-type]
        max_logprobs=MAX_LOGPROBS,
        **known,
    )


@router.post(
    "/tokenize",
    summary="Cut text into tokens",
    response_model=TokenizeReply,
    responses={**BODY_ERRORS},
    tags=["Extensions"],
)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens that a completion of this prompt would start from."""
    model = _begin(request, body)
    tokenizer = model.llm.tokenizer
    ids = await encode_text(body.prompt, tokenizer)
    if not body.add_special_tokens:
        del ids[0]
    spelled = None
    if body.return_token_strs:
        spelled = await made(
            lambda: [token_spelling(tokenizer, token_id) for token_id in ids], num_items=len(ids)
        )
    reply = TokenizeReply.model_construct(  # not checked again: there may be millions
        count=len(ids), max_model_len=model.llm.max_context, tokens=ids, token_strs=spelled
    )
    return await long_json_response(reply, num_items=len(ids))


@router.post(
    "/detokenize",
    summary="Put tokens together",
    response_model=DetokenizeReply,
    responses={**BODY_ERRORS},
    tags=["Extensions"],
)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones by name."""
    model = _begin(request, body)
    check_token_ids(body.tokens, model.llm, param="tokens")
    text = model.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response(DetokenizeReply(prompt=text))


def _begin(request: Request, body: TokenizeRequest | DetokenizeRequest) -> ServedModel:
    """The model of a request that computes nothing."""
    record = record_of(request)
    record.fields = frozenset(type(body).model_fields)
    model = context_of(request).registry.get(body.model)
    record.model = model.name
    return model


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    summary="Is the process alive?",
    response_model=Health,
    responses={**errors(403)},
    tags=["Operation"],
)
async def health() -> Response:
    """Answers as long as the server does."""
    return json_response(Health())


@router.head("/ready", include_in_schema=False)
@router.get(
    "/ready",
    summary="Are requests taken?",
    response_model=Readiness,
    responses={
        503: {"model": Readiness, "description": "Not yet, not any more, or a step of an engine hangs."},
        **errors(403),
    },
    tags=["Operation"],
)
async def ready(request: Request) -> Response:
    """Ready once every model has been loaded, until the server is told to stop.

    Not ready, too, while an engine does not come to the end of a step, as one that hangs.
    """
    context = context_of(request)
    registry, limit = context.registry, context.settings.step_timeout
    is_ready = registry.state is State.READY
    stalled = registry.stalled(limit) if is_ready else ()
    reason = f"a step of {', '.join(stalled)} has been running for more than {limit:g} seconds"
    readiness = Readiness(
        status="stalled" if stalled else registry.state.value,
        models={model.name: model.engine is not None for model in registry},
        reason=reason if stalled else None,
    )
    response = json_response(readiness)
    response.status_code = 200 if is_ready and not stalled else 503
    return response


@router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={
        200: {
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "description": "Prometheus' format.",
        },
        **errors(401, 403, 500),
    },
    tags=["Operation"],
)
async def metrics(request: Request) -> Response:
    """Requests, latencies, queue, memory and tokens."""
    return Response(context_of(request).metrics.text(), headers={"Content-Type": METRICS_TYPE})
