"""Several tokens in one step without loss: drafts are verified together, and kept as far as they are right.

A row is fed its pending token and drafts of what may follow, and gives logits for each. The request's own
sampler then chooses token by token from these, as it would from single steps, until it chooses another token
than was drafted. So drafts change nothing, or nothing but the rounding of sums, whatever the parameters. This
module decides who drafts and counts; where drafts come from and how many pay is known elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Protocol

from modernbert_decoder.engine.draft_length import DraftLength, Experience, StepCosts
from modernbert_decoder.engine.draft_model import open_draft_model
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.prompt_lookup import PromptLookup
from modernbert_decoder.engine.prompts import checked_integer
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.errors import InputError
from modernbert_decoder.tokenizer import Tokenizer

PROMPT_LOOKUP: Final = "prompt_lookup"
DRAFT_MODEL: Final = "draft_model"
MOST_DRAFTS: Final = 64
# While a request drafts in every step, every so many steps it does not: what a plain step costs may change.
_PLAIN_EVERY: Final = 64

_ONLY_OF: Final = {
    "min_match": PROMPT_LOOKUP,
    "max_match": PROMPT_LOOKUP,
    "draft_model": DRAFT_MODEL,
    "dtype": DRAFT_MODEL,
}


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How an `LLM` guesses tokens ahead; what it generates does not depend on that, but for rounding.

    In a batch-invariant engine not even for that: log-probabilities are the same to the last bit, in every
    format, and the weights are packed once more for it. In others a step of several tokens and steps of one
    token differ in the last bits of attention's sums. In float32 that matters only where two tokens are as
    good as equal, or a draw falls between two. The other formats round activations, and a bit may tip a
    rounding: log-probabilities then differ by hundredths, as they do with neighbours in such a batch, and
    texts part at close choices. As `adaptive` follows the clock, such a text is the same in every run only
    without it.

    Attributes:
        kind: "prompt_lookup" drafts what followed the last tokens where they stood before; "draft_model"
            drafts with a smaller model, which `draft_model` names. By default whichever fits the latter.
        draft_model: a folder or Hub id, with the vocabulary of the larger model.
        dtype: of the draft model, as for `LLM`.
        max_draft: most tokens drafted at a time; fewer, and none at all, where that pays better. In a
            batch-invariant engine a step with any drafts costs a little for each that there could be.
        min_match: fewest tokens that prompt lookup must find again.
        max_match: most tokens that it compares.
        max_rows: most requests decoding at a time with which drafts are made. More requests share the cost
            of a step already, and a step with drafts keeps all of them waiting.
        adaptive: choose how many tokens to draft by what it costs and brings; otherwise always `max_draft`.

    Raises:
        InputError: a value out of its range, or one that means nothing for this kind.
    """

    kind: str | None = None
    draft_model: str | Path | None = None
    dtype: str | None = None
    max_draft: int = 8
    min_match: int = 2
    max_match: int = 4
    max_rows: int = 1
    adaptive: bool = True

    def __post_init__(self) -> None:
        kind = self.kind or (PROMPT_LOOKUP if self.draft_model is None else DRAFT_MODEL)
        object.__setattr__(self, "kind", kind)
        if kind not in (PROMPT_LOOKUP, DRAFT_MODEL):
            raise InputError(f"speculation kind is {kind!r}; choose {PROMPT_LOOKUP} or {DRAFT_MODEL}")
        for each in fields(self):
            value = getattr(self, each.name)
            if _ONLY_OF.get(each.name, kind) != kind and value != each.default:
                raise InputError(f"{each.name} is {value!r}, which means nothing for speculation by {kind}")
        if kind == DRAFT_MODEL and self.draft_model is None:
            raise InputError("speculation by draft_model needs draft_model, the folder of a smaller model")
        checked_integer("max_draft", self.max_draft, 1, MOST_DRAFTS)
        checked_integer("min_match", self.min_match, 1)
        checked_integer("max_match", self.max_match, self.min_match)
        checked_integer("max_rows", self.max_rows, 1)


class Drafter(Protocol):
    """Guesses how requests go on, and keeps what it needs for that of each."""

    def draft(self, request: Request, count: int) -> list[int] | None:
        """At most `count` tokens that may follow, or none; None if it is not ready to say."""

    def forget(self, request: Request) -> None:
        """Drops what is kept of a request that has ended, if anything is."""

    def reset(self) -> None:
        """Drops everything, also after a failure half-way."""

    def close(self) -> None:
        """Releases everything; nothing can be drafted afterwards."""


class Speculator:
    """Puts drafts into the rows of decoding requests, and has them confirmed.

    Args:
        speculation: how.
        drafter: where drafts come from.
        runtime: of the requests.

    Attributes:
        num_drafted: drafts verified so far.
        num_accepted: those of them that became text.
    """

    def __init__(self, speculation: Speculation, drafter: Drafter, runtime: Runtime) -> None:
        self._speculation = speculation
        self._drafter = drafter
        self._runtime = runtime
        # By the number of rows, and whether they are batch-invariant.
        self._costs: dict[tuple[int, bool], StepCosts] = {}
        self._costs_now = StepCosts()  # of the step that was proposed last
        self._lengths: dict[Request, DraftLength] = {}
        self._experience = Experience()
        self._num_rows = 0
        self._num_in_step = 0
        self._num_since_plain = 0
        self._draft_seconds = 0.0
        self._network_seconds = 0.0
        self.num_drafted = 0
        self.num_accepted = 0

    def propose(self, requests: Sequence[Request]) -> None:
        """Puts drafts behind the pending tokens of requests that are about to be decoded together."""
        self._num_rows = len(requests)
        self._num_in_step = 0
        self._costs_now = self._costs_of(self._num_rows)
        self._network_seconds = self._runtime.network_seconds
        started = time.perf_counter()
        if len(requests) <= self._speculation.max_rows:
            for request in requests:
                self._propose(request)
        self._draft_seconds = time.perf_counter() - started
        self._num_since_plain = self._num_since_plain + 1 if self._num_in_step else 0

    def observe(self) -> None:
        """Learns from the step that was made with these drafts what it cost."""
        seconds = self._runtime.network_seconds - self._network_seconds
        if self._num_in_step:
            seconds += self._draft_seconds
        self._costs_now.add(self._num_in_step, seconds)

    def verify(self, request: Request, logits: Float32, accept: Callable[[Request, Float32], None]) -> None:
        """Has tokens chosen from logits (drafts + 1, V) for as long as they are those that were drafted.

        Args:
            request: has been fed its pending token and its drafts.
            logits: for each of them.
            accept: chooses the next token of a request from (V,), and retires the request with its last one.
        """
        row = request.row
        assert row is not None
        drafts = row.token_ids[1:]
        if not drafts:
            accept(request, logits[0])
            return
        row.num_logits = 1
        slot = row.slot
        # At every moment the slot holds what has been confirmed, and behind that drafts that may still be.
        self._runtime.cache.truncate(slot, slot.length - len(drafts))
        num_accepted = 0
        for draft, choices in zip(drafts, logits, strict=False):
            accept(request, choices)
            if request.token_ids[-1] != draft or request.error is not None:
                self._learn(request, num_accepted, was_rejected=True)
                break
            num_accepted += 1
            if request.is_finished:
                break
            slot.length += 1
        else:
            self._learn(request, num_accepted, was_rejected=False)
            accept(request, logits[-1])
        self.num_drafted += len(drafts)
        self.num_accepted += num_accepted

    def forget(self, request: Request) -> None:
        """Drops what is kept of a request that has ended."""
        self._lengths.pop(request, None)
        self._drafter.forget(request)

    def reset(self) -> None:
        """Drops what is kept of all requests."""
        self._lengths.clear()
        self._drafter.reset()

    def close(self) -> None:
        """Releases the drafter."""
        self._drafter.close()

    def _propose(self, request: Request) -> None:
        count = self._wanted(request)
        if not count:
            return
        row = request.row
        assert row is not None
        # What stands behind the pending token must be such that it can be taken back, and the last token that
        # a step gives is never a draft.
        room = min(self._runtime.cache.num_reversible(row.slot.length + 1), request.room - 1)
        if room <= 0:
            return
        drafts = self._drafter.draft(request, min(count, room))
        if drafts:
            row.token_ids = (*row.token_ids, *drafts)
            row.num_logits = len(row.token_ids)
            self._num_in_step += len(drafts)
        elif drafts is not None and request in self._lengths:
            self._lengths[request].miss()

    def _wanted(self, request: Request) -> int:
        longest = self._speculation.max_draft
        if not self._speculation.adaptive:
            return longest
        if self._num_since_plain >= _PLAIN_EVERY:
            return 0
        length = self._lengths.get(request)
        if length is None:
            length = self._lengths[request] = DraftLength(longest, self._experience)
        return length.choose(self._costs_now, num_rows=self._num_rows)

    def _learn(self, request: Request, num_accepted: int, *, was_rejected: bool) -> None:
        length = self._lengths.get(request)
        if length is not None:
            length.learn(num_accepted=num_accepted, was_rejected=was_rejected)

    def _costs_of(self, num_rows: int) -> StepCosts:
        key = (num_rows, self._runtime.is_batch_invariant)
        costs = self._costs.get(key)
        if costs is None:
            costs = self._costs[key] = StepCosts()
        return costs


def open_speculator(
    speculation: Speculation,
    runtime: Runtime,
    tokenizer: Tokenizer,
    *,
    chunk_size: int,
    threads: int,
    providers: Sequence[str] | None,
    cache_dir: Path | None,
    show_progress: bool,
) -> Speculator:
    """A speculator for the requests of a runtime; a draft model is loaded with the same threads.

    Raises:
        UserError: the draft model cannot be used, or not with this one.
    """
    if speculation.draft_model is None:
        lookup = PromptLookup(min_match=speculation.min_match, max_match=speculation.max_match)
        return Speculator(speculation, lookup, runtime)
    drafter = open_draft_model(
        speculation.draft_model,
        runtime,
        tokenizer,
        dtype=speculation.dtype,
        num_slots=min(speculation.max_rows, runtime.cache.num_slots),
        chunk_size=chunk_size,
        threads=threads,
        providers=providers,
        cache_dir=cache_dir,
        show_progress=show_progress,
    )
    return Speculator(speculation, drafter, runtime)
