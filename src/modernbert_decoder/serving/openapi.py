"""The OpenAPI document, made true: models by name, keys where they are asked for, errors that do occur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from modernbert_decoder import __version__
from modernbert_decoder.serving.models import Registry

_DESCRIPTION: Final = (
    "An engine for ModernBERT decoder models behind the API of OpenAI's clients. Unknown fields are errors. "
    "What is not in OpenAI's reference is called an extension."
)
# Schema of a body -> what its model must be able to do.
_NEEDS: Final = {
    "CompletionRequest": "completions",
    "ChatRequest": "chat",
    "EmbeddingRequest": "embeddings",
    "ClassifyRequest": "classify",
    "ScoreRequest": "score",
    "RankRequest": "rank",
}
_OPEN: Final = frozenset({"/health", "/ready"})
_UNUSED_SCHEMAS: Final = ("HTTPValidationError", "ValidationError")


def document(app: FastAPI, *, registry: Registry, has_keys: bool, compares_hosts: bool) -> dict[str, Any]:
    """The document of a server.

    Args:
        app: with all routes.
        registry: of the models that are served.
        has_keys: whether an API key is asked for.
        compares_hosts: whether only some names of the server are taken.
    """
    schema = get_openapi(
        title="modernbert-decoder", version=__version__, description=_DESCRIPTION, routes=app.routes
    )
    schemas = schema["components"]["schemas"]
    for name in _UNUSED_SCHEMAS:  # errors have OpenAI's shape instead
        schemas.pop(name, None)
    for name, each in schemas.items():
        if name.endswith("Request"):
            names = _able(registry, _NEEDS.get(name)) or registry.names
            _name_models(each["properties"]["model"], names)
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if not compares_hosts:
                operation["responses"].pop("403", None)
            if not has_keys:
                operation["responses"].pop("401", None)
            elif path not in _OPEN:
                operation["security"] = [{"key": []}]
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model":
                    _name_models(parameter["schema"], registry.names)
    if has_keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema


def _able(registry: Registry, capability: str | None) -> list[str]:
    """Names of the models that have been loaded and can do this; all of them where nothing is needed."""
    return [
        model.name
        for model in registry
        if model.engine is not None and (capability is None or capability in model.capabilities)
    ]


def _name_models(schema: dict[str, Any], names: Sequence[str]) -> None:
    """Says which names there are, in a schema of text or of text and null."""
    for each in schema.get("anyOf", [schema]):
        if each.get("type") == "string":
            each["enum"] = list(names)
