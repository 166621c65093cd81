"""`LLM`: a checkpoint ready to generate, stream and score, without PyTorch.

It puts together checkpoint, tokenizer, graph, runtime and scheduler, checks what callers pass in, and shapes
what they get back. One `LLM` may be used from several threads and by several open streams at once: they
share its slots, and whoever waits for a result drives the scheduler.
"""

from __future__ import annotations

import numbers
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
from modernbert_decoder.engine.driver import Driver
from modernbert_decoder.engine.graph_cache import cached_graph
from modernbert_decoder.engine.kv_cache import KVCache
from modernbert_decoder.engine.outputs import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    Score,
    StreamChunk,
    Timings,
)
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.engine.weights import load_weights, resolve_scheme, rotary_tables
from modernbert_decoder.errors import InputError
from modernbert_decoder.machine import usable_threads
from modernbert_decoder.quantization import QuantizationScheme
from modernbert_decoder.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "Score",
    "StreamChunk",
    "Timings",
]

DEFAULT_MAX_SLOTS: Final = 32
DEFAULT_CHUNK_SIZE: Final = 256
_CPU: Final = ("CPUExecutionProvider",)

Prompt = str | Sequence[int]


class LLM:
    """A ModernBERT decoder language model on ONNX Runtime.

    Args:
        model: `"storyteller"` (bundled), a folder, or a Hub id such as `"jhu-clsp/ettin-decoder-17m"`.
        dtype: "float32", "int8" or "int4"; by default int8, or what a packed folder holds.
        vocabulary_dtype: another format for the embedding and vocabulary matrix; "int4" there is the pure
            4-bit model, smaller and faster than the default of int4, and less exact (docs/benchmarks.md).
        revision: branch, tag or commit on the Hub.
        cache_dir: where Hub downloads are kept.
        threads: for the kernels; by default the processors this process may use.
        max_slots: most completions computed at a time; further ones wait.
        max_context: most tokens of prompt and completion together; by default the model's own limit.
        chunk_size: prompt tokens per step: smaller ones delay running streams less, larger ones are faster.
        providers: ONNX Runtime execution providers, in order of preference.
        show_progress: draw progress bars while downloading, if standard error is a terminal.

    Raises:
        ModelNotFoundError, ConfigurationError, CheckpointError: the model cannot be used as it is.
        InputError: an argument out of its range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | None = None,
        vocabulary_dtype: str | None = None,
        revision: str | None = None,
        cache_dir: Path | None = None,
        threads: int | None = None,
        max_slots: int = DEFAULT_MAX_SLOTS,
        max_context: int | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        providers: Sequence[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        for name, value in (("threads", threads), ("max_slots", max_slots), ("chunk_size", chunk_size)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        folder = find_checkpoint(model, revision=revision, cache_dir=cache_dir, show_progress=show_progress)
        checkpoint = Checkpoint.open(folder)
        self.architecture = checkpoint.architecture
        if self.architecture.head is not Head.CAUSAL_LM:
            raise InputError(
                f"{model} is a checkpoint for {self.architecture.head.value.replace('_', ' ')} and has no "
                "language-model head; load a ModernBertDecoderForCausalLM checkpoint"
            )
        self.max_context = _context(max_context, self.architecture)
        self.tokenizer = Tokenizer.from_folder(folder, self.architecture)
        self.scheme = resolve_scheme(checkpoint, dtype, vocabulary_dtype)
        self.threads = threads or usable_threads()
        self._runtime = _runtime(
            checkpoint,
            self.scheme,
            num_slots=max_slots,
            context_length=self.max_context,
            threads=self.threads,
            providers=tuple(providers or _CPU),
        )
        ends = {*self.architecture.eos_token_ids, self.tokenizer.sep_token_id}
        scheduler = Scheduler(
            self._runtime,
            eos_token_ids=sorted(token_id for token_id in ends if token_id is not None),
            chunk_size=chunk_size,
        )
        self._driver = Driver(scheduler)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Completes every prompt, in batches as slots allow; results come in the order of the prompts.

        Args:
            prompts: text (`[CLS]` is put in front, nothing behind) or token ids (used as they are), one or
                many.
            sampling_params: for all prompts, or one for each; by default `SamplingParams()`.
            use_tqdm: draw a progress bar on standard error.

        Raises:
            InputError: an empty prompt, ids outside the vocabulary, or a prompt and `max_tokens` that do not
                fit the context.
        """
        listed = _as_list(prompts)
        params = _one_for_each(sampling_params, len(listed))
        groups = [self._requests(prompt, each) for prompt, each in zip(listed, params, strict=True)]
        self._run(groups, "generate" if use_tqdm else None)
        return [_request_output(prompt, group) for prompt, group in zip(listed, groups, strict=True)]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[StreamChunk, None, None]:
        """Completes one prompt, yielding what each step adds; closing the generator ends the request.

        The prompt is checked when this is called, the work is done as the generator is advanced.

        Raises:
            InputError: as for `generate`.
        """
        return self._stream(self._requests(prompt, sampling_params or SamplingParams()))

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

    def score(self, texts: Prompt | Sequence[Prompt], *, use_tqdm: bool = False) -> list[Score]:
        """The log-probability of every token of each text given the tokens before it.

        Args:
            texts: as the prompts of `generate`: `[CLS]` is put in front of text and is not scored itself.
            use_tqdm: draw a progress bar on standard error.

        Raises:
            InputError: as for `generate`; texts longer than the context are refused.
        """
        listed = _as_list(texts)
        groups = []
        for text in listed:
            ids = self._prompt_ids(text)
            if len(ids) > self.max_context:
                raise InputError(
                    f"the text has {len(ids)} tokens and the context holds {self.max_context}; "
                    "score it in pieces"
                )
            groups.append([Request(ids, None, tokenizer=self.tokenizer, max_tokens=0)])
        self._run(groups, "score" if use_tqdm else None)
        return [Score(tuple(group[0].prompt_ids), tuple(group[0].prompt_logprobs)) for group in groups]

    @property
    def cache(self) -> KVCache:
        """The slots and their bytes."""
        return self._runtime.cache

    @property
    def network_seconds(self) -> float:
        """Time spent inside the network so far; the rest of a call's time is scheduling and sampling."""
        return self._runtime.network_seconds

    def close(self) -> None:
        """Releases the session and the cache; the object cannot be used afterwards.

        Open streams, and calls of other threads, end with a `RuntimeError`.
        """
        if not self._driver.is_closed:
            self._driver.close()
            self._runtime.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, groups: list[list[Request]], description: str | None) -> None:
        """Runs all requests to their ends; none is left in the scheduler, whatever happens."""
        requests = [request for group in groups for request in group]
        progress = _progress(description, len(requests))
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

    def _requests(self, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """The completions of one prompt, checked against the vocabulary and the context."""
        params.validate_against(self.architecture.vocab_size)
        ids = self._prompt_ids(prompt)
        room = self.max_context - len(ids)
        if params.min_tokens > room:
            raise InputError(
                f"min_tokens is {params.min_tokens}, but behind the {len(ids)} tokens of the prompt the "
                f"context of {self.max_context} holds {room}; lower min_tokens or shorten the prompt"
            )
        if room < (params.max_tokens or 1):
            wanted = f"max_tokens is {params.max_tokens}" if params.max_tokens else "one token is wanted"
            raise InputError(
                f"the prompt has {len(ids)} tokens and {wanted}, but the context holds {self.max_context}; "
                "shorten the prompt, lower max_tokens, or set max_tokens=None to fill what is left"
            )
        max_tokens = params.max_tokens or room
        return [
            Request(ids, params, tokenizer=self.tokenizer, max_tokens=max_tokens, index=index)
            for index in range(params.n)
        ]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if self._driver.is_closed:
            raise RuntimeError("this LLM is closed; open a new one")
        if isinstance(prompt, str):
            if not prompt:
                raise InputError(
                    "the prompt is empty; to write from nothing, pass the token ids "
                    f"[{self.tokenizer.cls_token_id}], which is [CLS] alone"
                )
            return self.tokenizer.encode(prompt)
        ids = list(_iterable(prompt))
        if not ids:
            raise InputError("the prompt has no token ids; give at least [CLS]")
        size = self.architecture.vocab_size
        for token_id in ids:
            if not _is_integer(token_id) or not 0 <= token_id < size:
                raise InputError(f"prompt token ids must be integers from 0 to {size - 1}, got {token_id!r}")
        return [int(token_id) for token_id in ids]


def _context(max_context: int | None, architecture: DecoderArchitecture) -> int:
    limit = architecture.max_position_embeddings
    if max_context is None:
        return limit
    if not 2 <= max_context <= limit:
        raise InputError(f"max_context must be from 2 to the model's {limit}, got {max_context}")
    return max_context


def _runtime(
    checkpoint: Checkpoint,
    scheme: QuantizationScheme,
    *,
    num_slots: int,
    context_length: int,
    threads: int,
    providers: Sequence[str],
) -> Runtime:
    architecture = checkpoint.architecture
    graph = cached_graph(architecture, scheme, num_positions=context_length)
    weights = load_weights(checkpoint, scheme, threads=threads)
    return Runtime(
        architecture,
        graph,
        {**weights, **rotary_tables(architecture, context_length)},
        num_slots=num_slots,
        context_length=context_length,
        threads=threads,
        providers=providers,
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list: a string or a flat list of integers is one."""
    if isinstance(prompts, str):
        return [prompts]
    listed = list(_iterable(prompts))
    if listed and all(_is_integer(item) for item in listed):
        return [listed]
    return listed


def _iterable(prompt: Iterable[Any]) -> Iterable[Any]:
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise InputError(f"a prompt must be text or a list of token ids, got {prompt!r}")
    return prompt


def _is_integer(item: object) -> bool:
    return isinstance(item, numbers.Integral) and not isinstance(item, bool)


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"there are {count} prompts and {len(params)} sampling_params; give one for each")
    return params


def _request_output(prompt: Prompt, group: list[Request]) -> RequestOutput:
    leader = group[0]
    outputs = tuple(request.output() for request in group)
    first = min(request.first_token_at for request in group)
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


class _Progress(Protocol):
    """What is used of a progress bar."""

    def update(self, count: int) -> object:
        """Advances it."""

    def close(self) -> None:
        """Ends it."""


class _Silent:
    """A progress bar that is not shown."""

    def update(self, count: int) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Nothing to close."""


def _progress(description: str | None, total: int) -> _Progress:
    if description is None:
        return _Silent()
    from tqdm import tqdm

    bar: _Progress = tqdm(total=total, desc=description)
    return bar
