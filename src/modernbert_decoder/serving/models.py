"""The models of a server by name: opened one after the other, asked for by requests, drained at the end.

This module knows engines and their lives; it knows nothing of HTTP beyond the error for a name it lacks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.async_llm import AsyncLLM
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.speculation import Speculation
from modernbert_decoder.serving.chat_template import ChatTemplate, find_chat_template
from modernbert_decoder.serving.errors import ApiError, not_ready, shortened
from modernbert_decoder.serving.settings import EngineSettings, ModelSource

_CAPABILITIES: Final[Mapping[Head, tuple[str, ...]]] = {
    Head.CAUSAL_LM: ("completions", "embeddings", "score", "rank"),
    Head.SEQUENCE_CLASSIFICATION: ("classify", "embeddings"),
    Head.NONE: ("embeddings",),
}

_log = logging.getLogger(__name__)

OpenModel = Callable[[ModelSource], AsyncLLM]


class State(StrEnum):
    """Where a server is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass
class ServedModel:
    """A model and, once it is open, its engine.

    Attributes:
        created: when it was opened, in seconds since 1970; until then, when the server started.
        chat_template: of its folder, if there is one.
    """

    source: ModelSource
    created: int
    engine: AsyncLLM | None = None
    chat_template: ChatTemplate | None = None

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.source.name

    @property
    def llm(self) -> LLM:
        """The open model."""
        assert self.engine is not None
        return self.engine.llm

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can be asked for."""
        own = _CAPABILITIES[self.llm.architecture.head]
        has_chat = self.chat_template is not None and "completions" in own
        return (*own, "chat") if has_chat else own


class Registry:
    """All models of a server.

    Args:
        sources: in the order in which they are opened.
        open_model: how; called on a thread.

    Attributes:
        state: of the server.
        failure: why the state is "failed".
    """

    def __init__(self, sources: Sequence[ModelSource], open_model: OpenModel) -> None:
        self.state = State.STARTING
        self.failure: Exception | None = None
        self._open_model = open_model
        now = int(time.time())
        self._models = {source.name: ServedModel(source, now) for source in sources}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(tuple(self._models.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, open or not."""
        return tuple(self._models)

    @property
    def engines(self) -> Mapping[str, AsyncLLM]:
        """Those that are open."""
        return {model.name: model.engine for model in self if model.engine is not None}

    async def load(self) -> None:
        """Opens every model; the server is ready, or has failed, when this returns, unless it was stopped."""
        for model in self:
            if self.state is not State.STARTING:
                return
            try:
                await asyncio.to_thread(self._open, model)
            except Exception as error:
                self.state, self.failure = State.FAILED, error
                return
        if self.state is State.STARTING:
            self.state = State.READY

    def _open(self, model: ServedModel) -> None:
        started = time.perf_counter()
        engine = self._open_model(model.source)
        model.chat_template = find_chat_template(Path(engine.llm.folder))
        model.created = int(time.time())
        model.engine = engine
        seconds = time.perf_counter() - started
        _log.info("loaded %s (%s) in %.1f s", model.name, engine.llm.formats, seconds)

    def stalled(self, seconds: float) -> tuple[str, ...]:
        """Names of models whose engine has been in one step for longer than that."""
        return tuple(name for name, engine in self.engines.items() if engine.step_seconds > seconds)

    def find(self, name: str) -> ServedModel:
        """The model of that name, open or not.

        Raises:
            ApiError: 404, there is none.
        """
        model = self._models.get(name)
        if model is None:
            raise ApiError(
                404,
                f"there is no model called {shortened(name)!r}; GET /v1/models lists those that are served",
                param="model",
                code="model_not_found",
            )
        return model

    def get(self, name: str | None) -> ServedModel:
        """An open model; the first one where no name is given.

        Raises:
            ApiError: 404, there is none of that name; 503, the server starts or stops.
        """
        model = self.find(self.names[0] if name is None else name)
        if self.state is State.DRAINING:
            raise not_ready("the server is shutting down")
        if model.engine is None:
            raise not_ready(f"the model {model.name!r} is still being loaded")
        return model

    def stop(self) -> None:
        """Takes no more requests and opens no more models."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and ends those that still run after some time."""
        self.stop()
        await asyncio.gather(*(engine.drain(seconds) for engine in self.engines.values()))

    async def close(self) -> None:
        """Releases every model."""
        for model in self:
            if model.engine is not None:
                llm = model.llm
                await model.engine.close()
                llm.close()


def opener(settings: EngineSettings) -> OpenModel:
    """How models are opened with these settings."""

    def open_model(source: ModelSource) -> AsyncLLM:
        optional = {
            "threads": settings.threads,
            "max_slots": settings.max_slots,
            "max_context": settings.max_context,
        }
        given: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
        llm = LLM(
            source.model,
            dtype=source.dtype,
            prefill_dtype=source.prefill_dtype,
            adapter=source.adapter,
            show_progress=False,
            prefix_cache_bytes=settings.prefix_cache_bytes,
            speculation=_speculation(settings.draft),
            **given,
        )
        try:
            return AsyncLLM(
                llm,
                max_waiting=settings.max_waiting,
                max_kv_bytes=settings.kv_bytes,
                batch_invariant=settings.batch_invariant,
            )
        except BaseException:
            llm.close()
            raise

    return open_model


def _speculation(draft: str) -> Speculation | None:
    if draft == "off":
        return None
    return Speculation() if draft == "lookup" else Speculation(draft_model=draft)
