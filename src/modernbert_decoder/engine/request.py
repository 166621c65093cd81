"""One completion on its way through the scheduler: its tokens, its text so far and how it ended.

A request knows its own prompt, sampler and detokenizer; it does not know slots' contents, other requests or
the session. A prompt with `n` completions is `n` requests of one group that share the prefill.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.outputs import CompletionOutput, Logprob, StreamChunk
from modernbert_decoder.engine.sampling import RequestSampler, SampledToken, SamplingParams
from modernbert_decoder.engine.selection import Workspace
from modernbert_decoder.engine.stopping import StopChecker
from modernbert_decoder.engine.structured import Matcher
from modernbert_decoder.tokenizer import Tokenizer


class Request:
    """One completion.

    Attributes:
        row: its slot and next tokens while it is being decoded.
        num_prefilled: prompt tokens already in the cache.
        is_shareable: whether keys and values that are computed for it may be kept for others.
        pauses: where in the prompt a chunk must end, so that what was computed can be kept for others.
        awaited: a request, and how far it must be prefilled until this one begins, which shares so much.
        siblings: the other completions of the same prompt that wait for this one's prefill.
        max_tokens: most tokens it may get.
        client: for whom it is; clients take turns.
        finish_reason: None while it runs; then "stop", "length", or what `end` was told.
        error: what ended it, if it failed.
    """

    __slots__ = (
        "_checker",
        "_detokenizer",
        "_matcher",
        "_min_tokens",
        "_pieces",
        "_reported",
        "_reported_end",
        "_sampler",
        "_stop_ids",
        "_tokenizer",
        "admitted_at",
        "awaited",
        "client",
        "error",
        "finish_reason",
        "finished_at",
        "first_token_at",
        "index",
        "is_shareable",
        "max_tokens",
        "num_prefilled",
        "params",
        "pauses",
        "prompt_ids",
        "row",
        "siblings",
        "stop_reason",
        "submitted_at",
        "token_ids",
        "tokens",
    )

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        tokenizer: Tokenizer,
        max_tokens: int,
        index: int = 0,
        matcher: Matcher | None = None,
        client: str = "",
    ) -> None:
        """`matcher` follows the structured output asked for; it is this request's own."""
        self.prompt_ids = prompt_ids
        self.params = params
        self.index = index
        self.client = client
        self.max_tokens = max_tokens
        self.siblings: list[Request] = []
        self.row: Row | None = None
        self.num_prefilled = 0
        self.is_shareable = True
        self.pauses: Sequence[int] = ()
        self.awaited: tuple[Request, int] | None = None
        self.token_ids: list[int] = []
        self.tokens: list[SampledToken] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: Exception | None = None
        self.submitted_at = time.perf_counter()
        self.admitted_at = self.first_token_at = self.finished_at = 0.0
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._pieces: list[str] = []
        self._reported = 0
        self._reported_end = False
        self._sampler: RequestSampler | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it ended, well or not."""
        return self.finish_reason is not None or self.error is not None

    @property
    def room(self) -> int:
        """How many more tokens it may get."""
        return self.max_tokens - len(self.token_ids)

    def prepare(self, *, eos_token_ids: Sequence[int], workspace: Workspace) -> None:
        """Builds sampler and detokenizer; done after the prefill, so that waiting requests stay small."""
        params = self.params
        self._sampler = RequestSampler(
            params,
            self.prompt_ids,
            eos_token_ids=eos_token_ids,
            workspace=workspace,
            index=self.index,
            matcher=self._matcher,
        )
        self._stop_ids = params.stop_ids(eos_token_ids)
        self._min_tokens = params.min_tokens
        self._detokenizer = self._tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._checker = StopChecker(params.stop_strings, include_stop=params.include_stop_str_in_output)

    def accept(self, logits: Float32) -> int:
        """Chooses the next token from `logits` (V,), extends the text, and decides whether this was the last.

        Raises:
            CheckpointError, InputError: no token can be chosen.
        """
        assert self._sampler is not None
        sampled = self._sampler.sample(logits)
        token_id = sampled.token_id
        self.token_ids.append(token_id)
        if sampled.logprob is not None:
            self.tokens.append(sampled)
        count = len(self.token_ids)
        if token_id in self._stop_ids:
            self._end_at_token(token_id)
        else:
            piece = self._detokenizer.put(token_id)
            if piece:
                is_early = count < self._min_tokens
                self._pieces.append(self._checker.skip(piece) if is_early else self._checker.put(piece))
                if self._checker.match is not None:
                    self._finish("stop", self._checker.match.stop)
            if count >= self.max_tokens and self.finish_reason is None:
                self._end_text()
                self._finish("length", None)
        return token_id

    def _end_at_token(self, token_id: int) -> None:
        params = self.params
        is_named = token_id in (params.stop_token_ids or ())
        if is_named and params.include_stop_str_in_output:
            self._pieces.append(self._checker.put(self._detokenizer.put(token_id)))
        self._end_text()
        self._finish("stop", token_id if is_named else None)

    def _end_text(self) -> None:
        """Adds what the detokenizer and the stop checker still held back."""
        rest = self._checker.put(self._detokenizer.finish())
        self._pieces.append(rest if self._checker.match is not None else rest + self._checker.flush())

    def _finish(self, reason: str, stop_reason: str | int | None) -> None:
        if self._checker.match is not None:
            reason, stop_reason = "stop", self._checker.match.stop
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.finished_at = time.perf_counter()

    def end(self, reason: str) -> None:
        """Ends the request before its time, with the text it has, also that which was held back."""
        if self._sampler is None:
            self.finish_reason = reason
            self.finished_at = time.perf_counter()
        else:
            self._end_text()
            self._finish(reason, None)

    def fail(self, error: Exception) -> None:
        """Ends the request without a result."""
        self.error = error
        self.finish_reason = "aborted"
        self.finished_at = time.perf_counter()

    def output(self) -> CompletionOutput:
        """The completion, once it has ended."""
        assert self.finish_reason is not None
        logprobs = self._logprobs(0)
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces),
            token_ids=tuple(self.token_ids),
            cumulative_logprob=sum(token.logprob or 0.0 for token in self.tokens) if logprobs else None,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def next_chunk(self) -> StreamChunk | None:
        """What was added since the last call; None if nothing was. An end that came alone is a chunk, too."""
        start = self._reported
        has_ended = self.finish_reason is not None and self.error is None
        if start == len(self.token_ids) and has_ended == self._reported_end:
            return None
        self._reported = len(self.token_ids)
        self._reported_end = has_ended
        text = "".join(self._pieces)
        self._pieces.clear()
        return StreamChunk(
            index=self.index,
            text=text,
            token_ids=tuple(self.token_ids[start:]),
            logprobs=self._logprobs(start),
            finish_reason=self.finish_reason if has_ended else None,
            stop_reason=self.stop_reason,
        )

    def _logprobs(self, start: int) -> tuple[dict[int, Logprob], ...] | None:
        if self.params.logprobs is None:
            return None
        text = self._tokenizer.token_text
        tables = []
        for token in self.tokens[start:]:
            assert token.logprob is not None
            assert token.rank is not None
            table = {token.token_id: Logprob(token.logprob, token.rank, text(token.token_id))}
            for rank, (token_id, logprob) in enumerate(token.top or (), 1):
                table.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
            tables.append(table)
        return tuple(tables)
