"""Puts the server together: models, layers of every request, endpoints, documentation.

Layers from the outside: access log, the server's names, browsers' origins, API keys, bodies. This module
decides nothing itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from modernbert_decoder.serving.access_log import AccessLog, RequestLog
from modernbert_decoder.serving.auth import ApiKeys
from modernbert_decoder.serving.context import ServerContext
from modernbert_decoder.serving.errors import install_handlers
from modernbert_decoder.serving.hosts import AllowedHosts
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
    routers = [each.router for each in (completions, chat, embeddings, scores, service)] + [page_router()]
    for router in routers:
        app.include_router(router)
    install_handlers(app, fields_of)
    app.state.request_log = RequestLog(metrics, endpoint_of=_endpoints(routers))
    names = settings.host_names
    _add_layers(app, settings, names)

    def openapi() -> dict[str, Any]:  # anew each time: what models can do is known when they are loaded
        return document(
            app,
            registry=registry,
            has_keys=bool(settings.api_keys),
            compares_hosts=names is not None,
        )

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _endpoints(routers: Sequence[APIRouter]) -> Callable[[str], str | None]:
    """What gives the documented path of the endpoint that a path leads to."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]

    def endpoint_of(path: str) -> str | None:
        return next((route.path_format for route in routes if route.path_regex.match(path)), None)

    return endpoint_of


def _add_layers(app: FastAPI, settings: ServerSettings, names: Sequence[str] | None) -> None:
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
    if names is not None:
        app.add_middleware(AllowedHosts, names=names)
    app.add_middleware(AccessLog, log=app.state.request_log)
