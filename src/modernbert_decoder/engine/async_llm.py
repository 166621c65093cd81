"""`AsyncLLM`: one `LLM` behind an event loop, for servers; its engine runs in a thread of its own.

Streams, completions and texts that are only read are asked for on the event loop and computed on the
engine's thread, which alone touches the model: the loop is never kept waiting for a step. This module checks
arguments and shapes results; it knows nothing of slots, batches or the network's protocols.
"""

from __future__ import annotations

import asyncio
import math
import numbers
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar

from modernbert_decoder.engine.completing import request_output
from modernbert_decoder.engine.engine_thread import EngineThread
from modernbert_decoder.engine.llm import LLM, collected
from modernbert_decoder.engine.outputs import (
    ClassificationOutput,
    EmbeddingOutput,
    RankedCandidate,
    RequestOutput,
    Score,
    StreamChunk,
)
from modernbert_decoder.engine.prompts import Prompt, Text, as_list, checked_integer
from modernbert_decoder.engine.reading_desk import ReadingDesk
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.ticket import Ticket
from modernbert_decoder.errors import EngineClosedError, InputError, RequestTimeoutError

Result = TypeVar("Result")

# Log-probabilities of a result; fewer are put together faster than a thread is asked to.
_FEW_ITEMS: Final = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine does now, and what it has done since it was opened.

    Attributes:
        num_running: completions that hold a slot.
        num_waiting: prompts that wait for one.
        num_reading: calls of `score`, `classify`, `embed` and `rank` that run or wait.
        num_slots: most completions that can run.
        kv_bytes_used: keys and values of the tokens so far.
        kv_bytes_reserved: what running completions may come to, if all become as long as they may.
        kv_bytes_limit: most that is ever reserved.
        num_prompt_tokens: prompt tokens fed so far; those found in a prefix cache are not among them.
        num_generated_tokens: tokens of completions so far.
        num_finished: completions that ended, by reason: "stop", "length", "timeout", "aborted", "error".
        prefix_hit_tokens: prompt tokens that were found in the prefix cache.
        num_drafted: tokens proposed by speculation.
        num_accepted: those of them that were right.
    """

    num_running: int
    num_waiting: int
    num_reading: int
    num_slots: int
    kv_bytes_used: int
    kv_bytes_reserved: int
    kv_bytes_limit: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_finished: Mapping[str, int]
    prefix_hit_tokens: int
    num_drafted: int
    num_accepted: int


class CompletionStream(AsyncIterator[StreamChunk]):
    """The completions of one prompt as they are made.

    A reader that takes its time gets what has come meanwhile as one chunk. Ends with the last chunk; closing
    it, cancelling the task that waits for it, or dropping it ends the request within one step.

    Attributes:
        prompt_token_ids: what the model is fed, `[CLS]` included.
    """

    def __init__(self, ticket: Ticket, engine: EngineThread) -> None:
        self._ticket = ticket
        self._engine = engine
        self.prompt_token_ids: tuple[int, ...] = tuple(ticket.requests[0].prompt_ids)

    def __aiter__(self) -> CompletionStream:
        return self

    async def __anext__(self) -> StreamChunk:
        """The next chunk.

        Raises:
            StopAsyncIteration: every completion has ended.
            RequestTimeoutError: the time was up before there was any token. (Later the stream ends with
                chunks whose `finish_reason` is "timeout".)
            EngineClosedError: the engine was closed before there was any token. (Later: "aborted".)
            EngineFailedError: a step of the engine failed.
            UserError: no token can be chosen.
        """
        try:
            chunk = await self._ticket.next_chunk()
        except BaseException:
            self._end()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Ends the request; nothing comes any more."""
        self._end()

    def _end(self) -> None:
        self._ticket.close()
        self._engine.end(self._ticket)

    def __del__(self) -> None:
        self._end()


class AsyncLLM:
    """One LLM behind an event loop; its engine runs in a thread of its own.

    Requests of all clients are computed together. Those that wait take turns between clients, in their order
    within one; a prompt that does not fit yet keeps its turn. Any number of event loops may use it, one after
    the other or at once, and several may exist for several models.

    Args:
        llm: what computes. It stays the caller's, who closes it afterwards, but must not be driven directly
            meanwhile.
        max_waiting: most prompts that wait, and calls that wait to read texts; one more is refused.
        max_kv_bytes: most keys and values that running completions may come to, each as long as its
            `max_tokens` allows; by default what all slots can hold.
        batch_invariant: as of `LLM`, whose own choice counts again after `close`. Without it, completions in
            int8 and int4 depend a little on what other requests run. With `speculation` weights are packed
            once more for it, here, which takes seconds for a large model.

    Raises:
        InputError: an argument out of its range, the LLM has an `AsyncLLM` already, or weights cannot be
            packed once more.

    Every method that takes a request raises `QueueFullError` when too many wait, `EngineClosedError` once
    `drain` or `close` was called, and `InputError` for what cannot be used.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        max_waiting: int = 256,
        max_kv_bytes: int | None = None,
        batch_invariant: bool = True,
    ) -> None:
        checked_integer("max_waiting", max_waiting, 0)
        if max_kv_bytes is not None:
            checked_integer("max_kv_bytes", max_kv_bytes, 1)
        self._llm = llm
        self._desk = ReadingDesk(max_waiting=max_waiting)
        self._engine = EngineThread(
            llm._driver,
            max_waiting=max_waiting,
            max_kv_bytes=max_kv_bytes,
            before_reading=self._desk.check,
        )
        self._is_closed = False
        try:
            self._set_batch_invariant(batch_invariant)
        except BaseException:
            self._desk.close()
            self._engine.close()
            raise
        # Of an AsyncLLM that is dropped without having been closed, running requests go on to their ends.
        weakref.finalize(self, self._engine.detach).atexit = False

    @property
    def llm(self) -> LLM:
        """The model: its tokenizer, architecture and limits; never to be driven directly."""
        return self._llm

    @property
    def step_seconds(self) -> float:
        """How long the step that is being computed now has been running; 0 where none is.

        A step takes a fraction of a second; an engine that hangs is recognized by one that does not end.
        """
        return self._engine.turn_seconds

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        client: str = "",
        timeout: float | None = None,
    ) -> CompletionStream:
        """Completes one prompt; the request is checked and queued when this is called, on an event loop.

        Args:
            prompt: text (`[CLS]` is put in front) or token ids (used as they are).
            params: by default `SamplingParams()`.
            client: for whom; clients take turns.
            timeout: seconds from now on after which the request ends, finished or not.

        Raises:
            InputError, QueueFullError, EngineClosedError: the request is not taken.
        """
        ticket = self._submit(prompt, params, client=client, timeout=timeout, is_streamed=True)
        return CompletionStream(ticket, self._engine)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        client: str = "",
        timeout: float | None = None,
    ) -> RequestOutput:
        """Completes one prompt; arguments as of `stream`. Cancelling it ends the request within one step.

        Completions that `drain` or `close` cut short have the finish reason "aborted".

        Raises:
            RequestTimeoutError: with what there was in its `output`.
            EngineClosedError, EngineFailedError, UserError: as of `stream`.
        """
        ticket = self._submit(prompt, params, client=client, timeout=timeout, is_streamed=False)
        try:
            await ticket.end()
        except BaseException:
            self._engine.end(ticket)
            raise
        shape = partial(request_output, prompt, ticket.requests)
        output = shape() if _num_items(ticket) <= _FEW_ITEMS else await asyncio.to_thread(shape)
        if any(each.finish_reason == "timeout" for each in output.outputs):
            raise RequestTimeoutError(
                f"the request was not finished in {ticket.timeout:g} seconds", output=output
            )
        return output

    async def score(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        stride: int | None = None,
        top_logprobs: int = 0,
        client: str = "",
        timeout: float | None = None,
    ) -> list[Score]:
        """`LLM.score` beside running streams, which it delays by no more than a batch at a time.

        Raises:
            RequestTimeoutError: it was not finished after `timeout` seconds.
        """
        work = partial(self._llm.score, as_list(texts), stride=stride, top_logprobs=top_logprobs)
        return await self._read(work, client, timeout)

    async def classify(
        self,
        texts: Text | Sequence[Text],
        *,
        truncate: bool = False,
        max_length: int | None = None,
        client: str = "",
        timeout: float | None = None,
    ) -> list[ClassificationOutput]:
        """`LLM.classify`, as in `score`."""
        work = partial(self._llm.classify, as_list(texts), truncate=truncate, max_length=max_length)
        return await self._read(work, client, timeout)

    async def embed(
        self,
        texts: Text | Sequence[Text],
        *,
        pooling: str = "last",
        normalize: bool = True,
        truncate: bool = False,
        max_length: int | None = None,
        client: str = "",
        timeout: float | None = None,
    ) -> list[EmbeddingOutput]:
        """`LLM.embed`, as in `score`; every vector comes with the number of tokens that were read."""
        listed = as_list(texts)

        def work() -> list[EmbeddingOutput]:
            outputs = self._llm.iter_embed(
                listed, pooling=pooling, normalize=normalize, truncate=truncate, max_length=max_length
            )
            return collected(outputs, len(listed))

        return await self._read(work, client, timeout)

    async def rank(
        self,
        text: str,
        candidates: Sequence[str],
        *,
        normalization: str = "sum",
        unconditional_text: str = "",
        client: str = "",
        timeout: float | None = None,
    ) -> list[RankedCandidate]:
        """`LLM.rank`, as in `score`."""
        work = partial(
            self._llm.rank,
            text,
            candidates,
            normalization=normalization,
            unconditional_text=unconditional_text,
        )
        return await self._read(work, client, timeout)

    def stats(self) -> EngineStats:
        """Numbers of now, without waiting for a step: they may be in the midst of one."""
        scheduler, cache = self._engine.scheduler, self._llm.cache
        counts, prefix_cache, speculator = scheduler.counts, scheduler.prefix_cache, scheduler.speculator
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=self._engine.num_waiting,
            num_reading=self._desk.num_jobs,
            num_slots=cache.num_slots,
            kv_bytes_used=cache.used_bytes(),
            kv_bytes_reserved=scheduler.reserved_bytes,
            kv_bytes_limit=scheduler.max_kv_bytes,
            num_prompt_tokens=counts.num_prompt_tokens,
            num_generated_tokens=counts.num_generated_tokens,
            num_finished=dict(counts.num_finished),
            prefix_hit_tokens=0 if prefix_cache is None else prefix_cache.num_hit_tokens,
            num_drafted=0 if speculator is None else speculator.num_drafted,
            num_accepted=0 if speculator is None else speculator.num_accepted,
        )

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, waits for those that are there, and ends what is left after `timeout`.

        Completions that are cut short end politely, with what they have and the finish reason "aborted";
        requests that have nothing yet end with `EngineClosedError`.
        """
        _checked_timeout(timeout)
        if self._is_closed:
            return
        self._engine.refuse()
        self._desk.refuse()
        idle = [asyncio.wrap_future(place.when_idle()) for place in (self._engine, self._desk)]
        await asyncio.wait(idle, timeout=timeout)
        self._desk.end_all()
        self._engine.end_all()
        await asyncio.gather(*idle)

    async def close(self) -> None:
        """Ends what runs or waits, as `drain` does, and the threads; the LLM can be driven directly again."""
        await self.drain(0)
        if not self._is_closed:
            self._is_closed = True
            self._set_batch_invariant(self._llm.batch_invariant)
        self._desk.close()
        self._engine.close()

    def _set_batch_invariant(self, value: bool) -> None:
        scheduler = self._engine.scheduler

        def choose() -> None:
            scheduler.is_batch_invariant = value

        with suppress(EngineClosedError):  # a closed LLM computes nothing, one way or the other
            self._llm._driver.compute_alone(choose)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        client: str,
        timeout: float | None,
        is_streamed: bool,
    ) -> Ticket:
        _check_client(client)
        seconds = math.inf if timeout is None else _checked_timeout(timeout)
        self._engine.check_open()
        requests = self._llm._completions.requests(prompt, params or SamplingParams(), client=client)
        ticket = Ticket(requests, loop=asyncio.get_running_loop(), is_streamed=is_streamed, timeout=seconds)
        self._engine.submit(ticket)
        return ticket

    async def _read(self, work: Callable[[], Result], client: str, timeout: float | None) -> Result:
        _check_client(client)
        if timeout is not None:
            _checked_timeout(timeout)
        job = self._desk.submit(work, client=client)
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await asyncio.wrap_future(job.future)
        except TimeoutError:
            if limit.expired():
                raise RequestTimeoutError(f"the texts were not read in {timeout:g} seconds") from None
            raise
        finally:
            self._desk.end(job)


def _num_items(ticket: Ticket) -> int:
    """Of log-probabilities in what a ticket's completions have come to."""
    num_each = ticket.requests[0].params.logprobs
    num_tokens = sum(len(request.token_ids) for request in ticket.requests)
    return 0 if num_each is None else num_tokens * (1 + num_each)


def _check_client(client: Any) -> None:
    if not isinstance(client, str):
        raise InputError(f"client must be a name, got {client!r}")


def _checked_timeout(timeout: Any) -> float:
    is_number = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
    if not is_number or not 0 <= float(timeout) < math.inf:
        raise InputError(f"timeout must be a number of seconds, at least 0, got {timeout!r}")
    return float(timeout)
