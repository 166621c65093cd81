"""Completing a prompt for the terminal: what `mbd generate` and `mbd run` do once their options are known.

All ways to show completions (text as it comes, JSON, statistics) are fed by one stream of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import click

from modernbert_decoder.cli.completion_options import FILL_CONTEXT, CompletionOptions
from modernbert_decoder.cli.output import bytes_text, rate_text, write, write_json
from modernbert_decoder.cli.prompt import read_prompt
from modernbert_decoder.engine.llm import LLM, Logprob, StreamChunk, Timings
from modernbert_decoder.engine.speculation import Speculation
from modernbert_decoder.errors import InputError


@dataclass
class Completion:
    """One completion as far as it has come."""

    index: int
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, chunk: StreamChunk) -> None:
        """Appends what a step brought."""
        self.pieces.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs or ())
        self.finish_reason = chunk.finish_reason
        self.stop_reason = chunk.stop_reason


class Display:
    """Prints completions one after the other while all of them grow: those behind the current one wait."""

    def __init__(self, prompt: str, completions: Sequence[Completion]) -> None:
        """`prompt` is printed in front of each; labels are, where there are several."""
        self._prompt = prompt
        self._completions = completions
        self._current = 0
        self._num_shown = 0
        self._is_within_line = False

    def begin(self) -> None:
        """Prints what stands in front of the current completion."""
        self._num_shown = 0
        if len(self._completions) > 1:
            self._write(f"--- completion {self._current + 1} of {len(self._completions)} ---\n")
        self._write(self._prompt)

    def update(self) -> None:
        """Prints what has come since the last call."""
        while self._current < len(self._completions):
            completion = self._completions[self._current]
            self._write("".join(completion.pieces[self._num_shown :]))
            self._num_shown = len(completion.pieces)
            if completion.finish_reason is None:
                return
            self.end_line()
            self._current += 1
            if self._current < len(self._completions):
                self.begin()

    def end_line(self) -> None:
        """Breaks the line, unless the text has just done so."""
        if self._is_within_line:
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            self._is_within_line = not text.endswith("\n")
            write(text)


def complete(options: CompletionOptions, *, providers: Sequence[str] | None = None) -> None:
    """Loads the model, completes the prompt and prints what the options ask for.

    Raises:
        UserError: whatever is wrong with options, prompt or model.
    """
    params = options.sampling_params()
    if options.logprobs is not None and not options.json:
        raise InputError("log-probabilities are shown in JSON only; add --json, or leave --logprobs out")
    prompt = read_prompt(options.prompt)
    started = time.perf_counter()
    with LLM(
        options.model,
        dtype=options.dtype,
        vocabulary_dtype=options.vocabulary_dtype,
        prefill_dtype=options.prefill_dtype,
        adapter=options.adapter,
        revision=options.revision,
        threads=options.threads,
        max_context=options.max_context,
        speculation=Speculation() if options.speculate else None,
        providers=providers,
    ) as llm:
        load_seconds = time.perf_counter() - started
        prompt_ids = llm.tokenizer.encode(prompt)
        _require_room(llm, len(prompt_ids), options.max_tokens)
        completions = [Completion(index) for index in range(params.n)]
        display = None if options.json else Display(prompt if options.echo else "", completions)
        chunks = llm.stream(prompt_ids, params)
        with closing(chunks):
            timings = _follow(chunks, completions, display, num_prompt_tokens=len(prompt_ids))
        if options.json:
            prompt_report = {"prompt": prompt, "prompt_token_ids": prompt_ids}
            run_report = _report(llm, completions, timings, load_seconds=load_seconds)
            write_json(
                {"model": options.model, **prompt_report, **run_report, "sampling_params": asdict(params)}
            )
        if options.stats:
            _print_stats(llm, options.model, completions, timings, load_seconds=load_seconds)


def _require_room(llm: LLM, num_prompt_tokens: int, max_tokens: int | str) -> None:
    """The engine's check of the context, in the words of the command line."""
    if max_tokens == FILL_CONTEXT:
        wanted = 1
    else:
        assert isinstance(max_tokens, int)
        wanted = max_tokens
    if num_prompt_tokens + wanted > llm.max_context:
        raise InputError(
            f"the prompt has {num_prompt_tokens} tokens and --max-tokens is {max_tokens}, but the context "
            f"holds {llm.max_context}; shorten the prompt, lower --max-tokens, or use `--max-tokens "
            f"{FILL_CONTEXT}` to fill what is left"
        )


def _follow(
    chunks: Iterable[StreamChunk],
    completions: Sequence[Completion],
    display: Display | None,
    *,
    num_prompt_tokens: int,
) -> Timings:
    """Takes the stream to its end; a broken line is ended whatever happens."""
    try:
        if display is not None:
            display.begin()
        started = time.perf_counter()
        first = None
        for chunk in chunks:
            first = first or time.perf_counter()
            completions[chunk.index].add(chunk)
            if display is not None:
                display.update()
        ended = time.perf_counter()
    finally:
        if display is not None:
            display.end_line()
    assert first is not None, "a completion has at least one token"
    return Timings(
        queue_seconds=0.0,
        prefill_seconds=first - started,
        decode_seconds=ended - first,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=sum(len(completion.token_ids) for completion in completions),
        num_completions=len(completions),
    )


def _report(
    llm: LLM, completions: Sequence[Completion], timings: Timings, *, load_seconds: float
) -> dict[str, Any]:
    """What `--json` prints about the run."""
    return {
        "dtype": llm.formats,
        "threads": llm.threads,
        "outputs": [_completion_report(completion) for completion in completions],
        "timings": {
            "load_seconds": load_seconds,
            "time_to_first_token_seconds": timings.time_to_first_token_seconds,
            "decode_seconds": timings.decode_seconds,
            "prefill_tokens_per_second": timings.num_prompt_tokens / timings.prefill_seconds,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
        "kv_cache_bytes": sum(_cache_bytes(llm, completions, timings.num_prompt_tokens)),
    }


def _completion_report(completion: Completion) -> dict[str, Any]:
    report: dict[str, Any] = {
        "index": completion.index,
        "text": "".join(completion.pieces),
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs:
        report["cumulative_logprob"] = sum(
            table[token_id].logprob
            for table, token_id in zip(completion.logprobs, completion.token_ids, strict=True)
        )
        report["logprobs"] = [  # per token, the chosen one first
            [{"token_id": token_id, **entry._asdict()} for token_id, entry in table.items()]
            for table in completion.logprobs
        ]
    return report


def _cache_bytes(llm: LLM, completions: Sequence[Completion], num_prompt_tokens: int) -> list[int]:
    """Bytes of the visible keys and values of each completion at its end; the last token is never fed."""
    return [
        llm.architecture.kv_cache_bytes(num_prompt_tokens + len(completion.token_ids) - 1)
        for completion in completions
    ]


def _print_stats(
    llm: LLM, model: str, completions: Sequence[Completion], timings: Timings, *, load_seconds: float
) -> None:
    num_prompt_tokens = timings.num_prompt_tokens
    prefill_rate = num_prompt_tokens / timings.prefill_seconds
    cached = sum(_cache_bytes(llm, completions, num_prompt_tokens))
    naive = sum(
        llm.architecture.naive_kv_cache_bytes(num_prompt_tokens + len(completion.token_ids) - 1)
        for completion in completions
    )
    reasons = ", ".join(str(completion.finish_reason) for completion in completions)
    lines = (
        ("model", f"{model}, {llm.formats}, {llm.threads} threads, loaded in {load_seconds:.3f} s"),
        ("prompt", f"{num_prompt_tokens} tokens, prefill {rate_text(prefill_rate)} tokens/s"),
        ("first token", f"{timings.time_to_first_token_seconds * 1e3:.1f} ms after loading"),
        (
            "completion",
            f"{timings.num_output_tokens} tokens, decode "
            f"{rate_text(timings.decode_tokens_per_second)} tokens/s, ended by {reasons}",
        ),
        ("KV cache", f"{bytes_text(cached)} ({bytes_text(naive)} if every layer kept every token)"),
    )
    for name, value in lines:
        click.echo(f"{name:<12} {value}", err=True)
