"""Drafts from a smaller model that reads along: its own runtime, one slot for each request it follows.

It is fed the tokens that were accepted and its own drafts, of which it takes the wrong ones back. This module
knows requests and rows; whether its drafts are right is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modernbert_decoder.architecture import Head
from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import Slot
from modernbert_decoder.engine.loading import open_runtime, require_head
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.weights import resolve_scheme
from modernbert_decoder.errors import InputError
from modernbert_decoder.tokenizer import Tokenizer


@dataclass(slots=True)
class _Follower:
    """The draft model's place in one request's text.

    Attributes:
        slot: of its own cache.
        num_read: tokens of the text that it was fed.
        guesses: drafts that it was fed behind them.
    """

    slot: Slot
    num_read: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    """Drafts the most likely tokens of a smaller model.

    Args:
        runtime: of the smaller model, with a slot for each request that drafts at a time.
        chunk_size: most tokens of a text that it reads per step, so that a long one delays nobody for longer
            than a chunk.
    """

    def __init__(self, runtime: Runtime, *, chunk_size: int) -> None:
        self._runtime = runtime
        self._cache = runtime.cache
        self._chunk_size = chunk_size
        self._followers: dict[Request, _Follower] = {}

    def draft(self, request: Request, count: int) -> list[int] | None:
        """At most `count` tokens that may follow; None while it has not read all that stands before them."""
        num_known = len(request.prompt_ids) + len(request.token_ids)
        follower = self._followers.get(request)
        if num_known > self._cache.capacity or (follower is None and not self._cache.num_free):
            return []
        if follower is None:
            follower = self._followers[request] = _Follower(self._cache.allocate())
        self._take_back(follower, request)
        token_id = self._read_on(follower, request)
        if token_id is None:
            return None
        # Its last draft is not fed. Those that are must be such that all of them can be taken back.
        most = min(count, 1 + self._cache.num_reversible(num_known))
        drafts = [token_id]
        while len(drafts) < most:
            follower.guesses.append(drafts[-1])
            drafts.append(self._next(follower.slot, drafts[-1:]))
        return drafts

    def forget(self, request: Request) -> None:
        """Frees the slot that follows a request, if there is one."""
        follower = self._followers.pop(request, None)
        if follower is not None:
            self._cache.free(follower.slot)

    def reset(self) -> None:
        """Frees every slot."""
        self._followers.clear()
        self._cache.reset()

    def close(self) -> None:
        """Releases the runtime; nothing can be drafted afterwards."""
        self._followers.clear()
        self._runtime.close()

    def _take_back(self, follower: _Follower, request: Request) -> None:
        """Takes back the guesses that did not become text."""
        tokens = _text_from(request, follower.num_read)
        for guess, token_id in zip(follower.guesses, tokens, strict=False):
            if guess != token_id:
                break
            follower.num_read += 1
        follower.guesses.clear()
        self._cache.truncate(follower.slot, follower.num_read)

    def _read_on(self, follower: _Follower, request: Request) -> int | None:
        """Reads a chunk of what it has not read; the next token once that was the last one."""
        tokens = _text_from(request, follower.num_read)
        chunk = tokens[: self._chunk_size]
        follower.num_read += len(chunk)
        if len(chunk) == len(tokens):
            return self._next(follower.slot, chunk)
        self._runtime.step([Row(follower.slot, chunk, 0)])
        return None

    def _next(self, slot: Slot, token_ids: list[int]) -> int:
        """The most likely token behind these."""
        return int(self._runtime.step([Row(slot, token_ids, 1)])[0][0].argmax())


def _text_from(request: Request, place: int) -> list[int]:
    """Prompt and completion from a place on."""
    num_prompt = len(request.prompt_ids)
    if place >= num_prompt:
        return request.token_ids[place - num_prompt :]
    return [*request.prompt_ids[place:], *request.token_ids]


def open_draft_model(
    model: str | Path,
    runtime: Runtime,
    tokenizer: Tokenizer,
    *,
    dtype: str | None,
    num_slots: int,
    chunk_size: int,
    threads: int,
    providers: Sequence[str] | None,
    cache_dir: Path | None,
    show_progress: bool,
) -> DraftModel:
    """A draft model for the requests of `runtime`, whose tokenizer is given.

    Raises:
        ModelNotFoundError, ConfigurationError, CheckpointError: the draft model cannot be used.
        InputError: it is no language model, or its tokens are others.
    """
    folder = find_checkpoint(model, revision=None, cache_dir=cache_dir, show_progress=show_progress)
    checkpoint = Checkpoint.open(folder)
    architecture = checkpoint.architecture
    require_head(architecture, Head.CAUSAL_LM, model=str(model), job="draft")
    num_ids = runtime.architecture.vocab_size
    same_size = architecture.vocab_size == num_ids
    if not same_size or not Tokenizer.from_folder(folder, architecture).has_tokens_of(tokenizer):
        numbers = "" if same_size else f" ({architecture.vocab_size} ids, not {num_ids})"
        raise InputError(
            f"{model} has another vocabulary than the model it is to draft for{numbers}; choose one with the "
            "same tokenizer"
        )
    opened = open_runtime(
        checkpoint,
        resolve_scheme(checkpoint, dtype, None),
        num_slots=num_slots,
        context_length=min(runtime.cache.capacity, architecture.max_position_embeddings),
        threads=threads,
        providers=providers,
    )
    return DraftModel(opened, chunk_size=chunk_size)
