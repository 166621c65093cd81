"""Completing prompts: from a prompt to requests, from ended requests to what callers get back.

This module knows what a request must satisfy and in which order its results come; slots, steps and sampling
are the scheduler's business, threads the driver's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.engine.driver import Driver
from modernbert_decoder.engine.loading import require_head
from modernbert_decoder.engine.outputs import RequestOutput, StreamChunk, Timings
from modernbert_decoder.engine.progress import progress_bar
from modernbert_decoder.engine.prompts import Prompt, checked_ids
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.structured import Constraints
from modernbert_decoder.errors import InputError
from modernbert_decoder.tokenizer import Tokenizer


class Completions:
    """Makes requests of prompts and runs them.

    Args:
        driver: of the scheduler that computes them.
        tokenizer: of the model.
        architecture: for head and vocabulary.
        max_context: most tokens of prompt and completion together.
        constraints: of structured output.
        model: its name, for messages.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        tokenizer: Tokenizer,
        architecture: DecoderArchitecture,
        max_context: int,
        constraints: Constraints,
        model: str,
    ) -> None:
        self._driver = driver
        self._tokenizer = tokenizer
        self._architecture = architecture
        self._max_context = max_context
        self._constraints = constraints
        self._model = model

    def run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, description: str | None
    ) -> list[RequestOutput]:
        """Completes prompts, each with the parameters in its place.

        Args:
            prompts: to complete.
            params: as many.
            description: of a progress bar; None shows none.
        """
        groups = [self.requests(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        self._run(groups, description)
        return [request_output(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[StreamChunk, None, None]:
        """Checks a prompt now; it is completed as the generator is advanced."""
        return self._stream(self.requests(prompt, params))

    def requests(self, prompt: Prompt, params: SamplingParams, *, client: str = "") -> list[Request]:
        """The completions of one prompt, checked against the vocabulary and the context.

        Raises:
            InputError: the checkpoint is no language model, or what is asked for cannot be done.
            EngineClosedError: the model is closed.
        """
        self._driver.check_open()
        require_head(self._architecture, Head.CAUSAL_LM, model=self._model, job="generate")
        params.validate_against(self._architecture.vocab_size)
        ids = self._prompt_ids(prompt)
        max_tokens = self._max_tokens(len(ids), params)
        matcher = None if params.structured is None else self._constraints.matcher(params.structured)
        return [
            Request(
                ids,
                params,
                tokenizer=self._tokenizer,
                max_tokens=max_tokens,
                index=index,
                matcher=matcher and matcher.copy(),
                client=client,
            )
            for index in range(params.n)
        ]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return checked_ids(prompt, self._architecture.vocab_size)
        if not prompt:
            raise InputError(
                "the prompt is empty; to write from nothing, pass the token ids "
                f"[{self._tokenizer.cls_token_id}], which is [CLS] alone"
            )
        return self._tokenizer.encode(prompt)

    def _max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """Most tokens of a completion behind a prompt of so many."""
        room = self._max_context - num_prompt
        if params.min_tokens > room:
            raise InputError(
                f"min_tokens is {params.min_tokens}, but behind the {num_prompt} tokens of the prompt the "
                f"context of {self._max_context} holds {room}; lower min_tokens or shorten the prompt"
            )
        if room < (params.max_tokens or 1):
            wanted = f"max_tokens is {params.max_tokens}" if params.max_tokens else "one token is wanted"
            raise InputError(
                f"the prompt has {num_prompt} tokens and {wanted}, but the context holds "
                f"{self._max_context}; shorten the prompt, lower max_tokens, or set max_tokens=None to fill "
                "what is left"
            )
        return params.max_tokens or room

    def _run(self, groups: list[list[Request]], description: str | None) -> None:
        """Runs all requests to their ends; none is left in the scheduler, whatever happens."""
        requests = [request for group in groups for request in group]
        progress = progress_bar(description, len(requests))
        driver = self._driver
        num_ended = driver.num_ended
        try:
            driver.submit(groups)
            running = requests
            while running:
                driver.step()
                if driver.num_ended != num_ended:
                    num_ended = driver.num_ended
                    num_before = len(running)
                    running = [request for request in running if not request.is_finished]
                    progress.update(num_before - len(running))
        finally:
            progress.close()
            driver.abort(requests)
        for request in requests:
            if request.error is not None:
                raise request.error

    def _stream(self, requests: list[Request]) -> Generator[StreamChunk, None, None]:
        try:
            self._driver.submit([requests])
            running = requests
            while running:
                chunks, running = self._driver.advance(running)
                yield from chunks
                for request in requests:
                    if request.error is not None:
                        raise request.error
        finally:
            self._driver.abort(requests)


def one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """Parameters for every prompt.

    Raises:
        InputError: there are others than one, or one for each.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"there are {count} prompts and {len(params)} sampling_params; give one for each")
    return params


def request_output(prompt: Prompt, group: Sequence[Request]) -> RequestOutput:
    """What came of a prompt whose requests have all ended, the first of them at least with a token."""
    leader = group[0]
    outputs = tuple(request.output() for request in group)
    first = min(request.first_token_at for request in group if request.token_ids)
    timings = Timings(
        queue_seconds=leader.admitted_at - leader.submitted_at,
        prefill_seconds=first - leader.admitted_at,
        decode_seconds=max(request.finished_at for request in group) - first,
        num_prompt_tokens=len(leader.prompt_ids),
        num_output_tokens=sum(len(output.token_ids) for output in outputs),
        num_completions=len(outputs),
    )
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(text, tuple(leader.prompt_ids), outputs, timings)
