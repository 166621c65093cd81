"""The OpenAPI document is true: requests and answers invented from it are answered as it says."""

from __future__ import annotations

from typing import Any

import hypothesis
import pydantic
import pytest
import schemathesis
from openai import types
from openai.types import chat, completion_choice, completion_create_params, create_embedding_response
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode
from servers import RunningServer

from modernbert_decoder.serving.protocol import base, completions, reading, sampling, service

# An answer of 400 to a body that fits its schema says that values do not go together, or not with the model.
_SEMANTIC = frozenset({"positive_data_acceptance"})
_EXAMPLES = 15
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/classify"),
    ("POST", "/v1/score"),
    ("POST", "/v1/rank"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]
# Wants one of two forms, which its schema cannot say: few invented bodies are of either.
RARELY_RIGHT = {"/v1/score"}
WITHOUT_INPUT = {"/v1/models", "/health", "/ready", "/metrics"}
CASES = [
    (method, path, mode)
    for method, path in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or path not in WITHOUT_INPUT
]


@pytest.fixture(scope="module")
def document(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_endpoint_answers_as_documented(
    document: Any, server: RunningServer, method: str, path: str, mode: GenerationMode
) -> None:
    operation = document[path][method]
    excluded = [check for check in CHECKS.get_all() if check.__name__ in _SEMANTIC]
    statuses: set[int] = set()

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case: Any) -> None:
        statuses.add(case.call_and_validate(excluded_checks=excluded, timeout=60).status_code)

    check()
    # Or the answers that are wished for would not have been looked at.
    assert (200 in statuses) == (mode is GenerationMode.POSITIVE) or path in RARELY_RIGHT
    server.until_idle("tiny")


def test_models_errors_and_endpoints_are_in_the_document(server: RunningServer) -> None:
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def models(name: str) -> list[str]:
        return list(schemas[name]["properties"]["model"]["enum"])

    assert models("EmbeddingRequest") == ["tiny", "labels", "bare", "chat", "storyteller", "exact"]
    assert models("CompletionRequest") == ["tiny", "chat", "storyteller", "exact"]
    assert models("ChatRequest") == ["chat"]
    assert models("ClassifyRequest") == ["labels"]
    assert schemas["CompletionRequest"]["additionalProperties"] is False
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            found.append((method.upper(), path))
            assert "422" not in operation["responses"], path
            assert "401" not in operation["responses"], "no key is asked for"
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (completion_create_params.CompletionCreateParamsStreaming, completions.CompletionRequest),
        (types.EmbeddingCreateParams, reading.EmbeddingRequest),
        (chat.ChatCompletionStreamOptionsParam, sampling.StreamOptions),
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_field_that_openais_client_sends_is_known(theirs: Any, ours: type[pydantic.BaseModel]) -> None:
    assert theirs.__required_keys__ | theirs.__optional_keys__ <= set(ours.model_fields)


@pytest.mark.parametrize(
    ("theirs", "ours", "left_out"),
    [
        (types.Completion, completions.CompletionReply, set()),
        (types.CompletionChoice, completions.CompletionChoice, set()),
        (completion_choice.Logprobs, completions.CompletionLogprobs, set()),
        (types.CreateEmbeddingResponse, reading.EmbeddingReply, set()),
        (types.Embedding, reading.Embedding, set()),
        (create_embedding_response.Usage, base.Usage, set()),
        # What they say of prompts that were cached, and of reasoning, is optional.
        (types.CompletionUsage, base.Usage, {"completion_tokens_details", "prompt_tokens_details"}),
        (types.Model, service.ModelCard, {"shutdown_date"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_field_that_openais_client_reads_is_there(
    theirs: Any, ours: type[pydantic.BaseModel], left_out: set[str]
) -> None:
    assert set(theirs.model_fields) - left_out <= set(ours.model_fields)
