"""Completing prompts for a client: on the engine, with the request's limits, noted in its record.

Both kinds of completions go through here; how an answer is spelled is theirs. What a client asked for ends
with the client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from modernbert_decoder.engine.async_llm import CompletionStream
from modernbert_decoder.engine.outputs import RequestOutput, StreamChunk
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.errors import InputError, RequestTimeoutError
from modernbert_decoder.serving.context import RequestRecord, ServerContext
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.models import ServedModel

Result = TypeVar("Result")


@dataclass
class Generation:
    """Prompts to complete.

    Attributes:
        model: that completes them.
        prompts: token ids of each.
        params: for all.
        context: of the server.
        record: of the request.
        compiled: structured output, held so that the engine finds it when it is asked.
    """

    model: ServedModel
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    context: ServerContext
    record: RequestRecord
    compiled: object = None

    async def prepare(self, *, structured_field: str) -> None:
        """Compiles what takes long before the engine is asked: structured output.

        Args:
            structured_field: of the request, that asks for it.

        Raises:
            ApiError: it cannot be compiled.
        """
        if self.params.structured is not None:
            try:
                compile_it = self.model.llm.check_structured
                self.compiled = await asyncio.to_thread(compile_it, self.params.structured)
            except InputError as error:
                told = f"{structured_field}: {error}"
                raise ApiError(400, told, param=structured_field, code="invalid_value") from None

    async def whole(self) -> list[RequestOutput]:
        """All completions, in the order of the prompts.

        Raises:
            Exception: the engine's errors; no prompt is completed further then.
        """
        outputs = await together([self._one(prompt) for prompt in self.prompts])
        self._note(outputs)
        return outputs

    async def _one(self, prompt: Sequence[int]) -> RequestOutput:
        assert self.model.engine is not None
        try:
            return await self.model.engine.generate(
                prompt, self.params, client=self.record.client, timeout=self.seconds_left
            )
        except RequestTimeoutError as error:
            if isinstance(error.output, RequestOutput):  # what there is, with its finish reason
                return error.output
            raise

    async def start(self) -> AsyncGenerator[tuple[int, StreamChunk], None]:
        """Queues the requests; the generator gives pieces of completions with the number of their prompt.

        Raises:
            QueueFullError, InputError, EngineClosedError: they are not taken.
        """
        assert self.model.engine is not None
        streams: list[CompletionStream] = []
        try:
            for prompt in self.prompts:
                stream = self.model.engine.stream(
                    prompt, self.params, client=self.record.client, timeout=self.seconds_left
                )
                streams.append(stream)
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        return self._noted(streams)

    async def _noted(
        self, streams: Sequence[CompletionStream]
    ) -> AsyncGenerator[tuple[int, StreamChunk], None]:
        record, metrics, name = self.record, self.context.metrics, self.model.name
        observe = metrics.token_seconds(name)
        last: dict[tuple[int, int], float] = {}
        num_tokens, reasons = 0, []
        try:
            async with aclosing(_merged(streams)) as merged:
                async for place, chunk in merged:
                    now = time.perf_counter()
                    key, count = (place, chunk.index), len(chunk.token_ids)
                    if record.first_token_seconds is None:
                        record.first_token_seconds = record.seconds
                        metrics.first_token(name, record.first_token_seconds)
                    if key in last and count:
                        observe((now - last[key]) / count)
                    last[key] = now
                    num_tokens += count
                    if chunk.finish_reason is not None:
                        reasons.append(chunk.finish_reason)
                    yield place, chunk
        finally:
            record.completion_tokens = num_tokens
            record.finish_reasons = tuple(sorted(set(reasons)))

    @property
    def seconds_left(self) -> float:
        """Of the time that the request has."""
        return max(0.0, self.context.settings.timeout - self.record.seconds)

    def _note(self, outputs: Sequence[RequestOutput]) -> None:
        """Puts numbers of completions that have ended into the record and the metrics."""
        record, metrics, name = self.record, self.context.metrics, self.model.name
        completions = [completion for output in outputs for completion in output.outputs]
        record.completion_tokens = sum(len(completion.token_ids) for completion in completions)
        record.finish_reasons = tuple(sorted({completion.finish_reason for completion in completions}))
        timings = [output.timings for output in outputs]
        record.first_token_seconds = min(each.time_to_first_token_seconds for each in timings)
        metrics.first_token(name, record.first_token_seconds)
        observe = metrics.token_seconds(name)
        for each in timings:
            count = each.num_output_tokens - each.num_completions
            if count > 0:
                observe(each.decode_seconds * each.num_completions / count)


async def together(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all, in their order; when one fails the others are cancelled and its error raised."""
    if len(work) == 1:
        return [await work[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _merged(
    streams: Sequence[CompletionStream],
) -> AsyncGenerator[tuple[int, StreamChunk], None]:
    """All streams as one, each chunk with the number of its stream; closing it closes all."""
    if len(streams) == 1:
        try:
            async for chunk in streams[0]:
                yield 0, chunk
        finally:
            await streams[0].aclose()
        return
    queue: asyncio.Queue[tuple[int, StreamChunk] | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(place: int, stream: CompletionStream) -> None:
        try:
            async for chunk in stream:
                await queue.put((place, chunk))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(place, stream)) for place, stream in enumerate(streams)]
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def primed(
    chunks: AsyncGenerator[tuple[int, StreamChunk], None],
) -> AsyncGenerator[tuple[int, StreamChunk], None]:
    """The same chunks, the first of which is there already: what goes wrong before it is raised here."""
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise

    async def whole() -> AsyncGenerator[tuple[int, StreamChunk], None]:
        async with aclosing(chunks):
            yield first
            async for item in chunks:
                yield item

    return whole()
