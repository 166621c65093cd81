"""Puts the server together: models, layers of every request, endpoints, documentation.

Layers from the outside: access log, browsers' origins, API keys, bodies. This module decides nothing itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from modernbert_decoder.serving.access_log import AccessLog
from modernbert_decoder.serving.auth import ApiKeys
from modernbert_decoder.serving.context import ServerContext
from modernbert_decoder.serving.errors import install_handlers
from modernbert_decoder.serving.limits import BodyLimit
from modernbert_decoder.serving.metrics import Metrics
from modernbert_decoder.serving.models import OpenModel, Registry, opener
from modernbert_decoder.serving.openapi import document
from modernbert_decoder.serving.routes import chat, completions, embeddings, scores, service
from modernbert_decoder.serving.routes.beginning import fields_of
from modernbert_decoder.serving.routes.pages import page_router
from modernbert_decoder.serving.settings import ServerSettings

_EXPOSED_HEADERS: Final = ("Retry-After", "X-Request-Id")


def create_app(settings: ServerSettings, *, open_model: OpenModel | None = None) -> FastAPI:
    """The server as an ASGI application; its models are opened when it starts and closed when it ends.

    Args:
        settings: of the server.
        open_model: how models are opened; by default as the settings say.
    """
    registry = Registry(settings.models, open_model or opener(settings.engine))
    metrics = Metrics(lambda: registry.engines)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(registry.load())
        try:
            yield
        finally:
            registry.stop()
            await loading  # a thread that opens a model cannot be interrupted
            await registry.close()

    # Its own documentation pages load scripts from another host.
    app = FastAPI(
        title="modernbert-decoder", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.context = ServerContext(settings, registry, metrics)
    for each in (completions, chat, embeddings, scores, service):
        app.include_router(each.router)
    app.include_router(page_router())
    install_handlers(app, fields_of)
    _add_layers(app, settings, metrics)

    def openapi() -> dict[str, Any]:  # anew each time: what models can do is known when they are loaded
        return document(app, registry=registry, has_keys=bool(settings.api_keys))

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_layers(app: FastAPI, settings: ServerSettings, metrics: Metrics) -> None:
    """The last one added is the outermost."""
    app.add_middleware(BodyLimit, max_bytes=settings.max_body, seconds=settings.body_timeout)
    app.add_middleware(ApiKeys, keys=settings.api_keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(AccessLog, metrics=metrics)
