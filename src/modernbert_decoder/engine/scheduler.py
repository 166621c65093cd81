"""Continuous batching: admit, prefill in chunks, decode together, retire.

Each step gives every decoding request one token in one call, and then spends at most one chunk of tokens on
prompts, so that a long prompt delays running requests by no more than a chunk. Slots 0..d-1 belong to the
decoding requests in the order of their list, those behind to prompts being prefilled; requests that leave
are replaced by the last of their kind. Clients take turns, in the queue and in the chunk. This module knows
requests and rows, not texts or sampling.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from modernbert_decoder.engine.batch_invariance import FEWEST_TOKENS, chunk_end
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.prefix_cache import PrefixCache
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.selection import Workspace
from modernbert_decoder.engine.speculation import Speculator
from modernbert_decoder.engine.waiting import FairQueue
from modernbert_decoder.errors import EngineFailedError, InputError, UserError


@dataclass(slots=True)
class Counts:
    """What a scheduler has done so far.

    Attributes:
        num_prompt_tokens: prompt tokens fed; those that the prefix cache spared are not among them.
        num_generated_tokens: tokens chosen.
        num_finished: requests that ended, by finish reason or as "error".
    """

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_finished: Counter[str] = field(default_factory=Counter)


class Scheduler:
    """Runs requests on one runtime.

    Args:
        runtime: session and cache.
        eos_token_ids: tokens that end a text.
        chunk_size: most prompt tokens per step.
        prefix_cache: beginnings of prompts that need not be computed again.
        speculator: gives decoding requests several tokens in one step where it can.

    Attributes:
        counts: what it has done so far.
        max_kv_bytes: most keys and values that requests with a slot may come to.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        eos_token_ids: Sequence[int],
        chunk_size: int,
        prefix_cache: PrefixCache | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self._runtime = runtime
        self.prefix_cache = prefix_cache
        self.speculator = speculator
        self._cache = runtime.cache
        self._eos_token_ids = tuple(eos_token_ids)
        self._chunk_size = chunk_size
        self._workspace = Workspace(runtime.architecture.vocab_size)
        self._waiting: FairQueue[Request] = FairQueue()
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._rows: list[Row] = []
        # Every request that has not ended, in whichever of the lists above, or between two of them.
        self._live: set[Request] = set()
        # The client whose prompt had the last turn in the chunk.
        self._last_client = ""
        self.counts = Counts()
        self.max_kv_bytes = self._cache.num_slots * self._cache.peak_bytes(self._cache.capacity)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._decoding or self._prefilling or self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def num_ended(self) -> int:
        """Changes whenever a request ended."""
        return self.counts.num_finished.total()

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return self._cache.num_free

    @property
    def reserved_bytes(self) -> int:
        """Keys and values that requests with a slot, or one that is kept for them, may come to."""
        decoding = sum(map(self._most_bytes, tuple(self._decoding)))
        return decoding + sum(
            (1 + self._num_kept(request)) * self._most_bytes(request) for request in tuple(self._prefilling)
        )

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a completion does not depend, to the last bit, on what is computed beside or before it."""
        return self._runtime.is_batch_invariant

    @is_batch_invariant.setter
    def is_batch_invariant(self, value: bool) -> None:
        if value == self._runtime.is_batch_invariant:
            return
        self._runtime.is_batch_invariant = value
        if self.prefix_cache is not None:
            self.prefix_cache.is_batch_invariant = value
            # What it holds was computed otherwise, and so was the beginning of whatever runs now.
            self.prefix_cache.clear()
            for request in self._live:
                request.is_shareable = request.row is None

    def check(self, requests: Sequence[Request]) -> None:
        """Refuses the completions of a prompt if they could never be admitted.

        Raises:
            InputError: they may need more memory than all requests together may.
        """
        num_together = min(len(requests), self._cache.num_slots)
        wanted = num_together * self._most_bytes(requests[0])
        if wanted > self.max_kv_bytes:
            raise InputError(
                f"{num_together} completion(s) of up to {requests[0].max_tokens} tokens behind a prompt of "
                f"{len(requests[0].prompt_ids)} may take {wanted:,} bytes of keys and values, and all "
                f"requests together may take {self.max_kv_bytes:,}; lower max_tokens or n, or shorten the "
                "prompt"
            )

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues the completions of one prompt, which `check` let pass; the first prefills for the others."""
        leader, *siblings = requests
        leader.siblings = siblings
        self._live.update((leader, *siblings))
        self._waiting.append(leader)

    def abort(self, request: Request, reason: str = "aborted") -> None:
        """Ends a request wherever it is, with `reason`; its slot is free for the next step."""
        if request.is_finished:
            return
        request.end(reason)
        if request.row is not None:
            self._retire(request)
            return
        self._count_out(request)
        if request in self._waiting:
            if request.siblings:
                leader, *leader.siblings = request.siblings
                self._waiting.replace(request, leader)
            else:
                self._waiting.remove(request)
        else:
            for leader in (*self._waiting, *self._prefilling):
                if request in leader.siblings:
                    leader.siblings.remove(request)

    def step(self) -> None:
        """One token for every decoding request, then up to one chunk of prompts.

        An exception (a failing kernel, Ctrl-C) may leave requests half-way through a step: all of them end
        with it, and the scheduler goes on empty.
        """
        try:
            if self._waiting:
                self._admit()
            if self._decoding:
                self._decode()
            if self._prefilling:
                self._prefill()
        except BaseException as error:
            self.fail_all(EngineFailedError(f"a step of the engine failed: {error!r}"))
            raise

    def fail_all(self, error: Exception) -> None:
        """Ends every request with `error`, wherever a broken step left it, and frees every slot."""
        for request in tuple(self._live):
            request.fail(error)
            request.row = None
            request.siblings = []
            self._count_out(request)
        for requests in (self._waiting, self._prefilling, self._decoding, self._rows):
            requests.clear()
        self._cache.reset()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()  # an exception may have come in the middle of a change to it
        if self.speculator is not None:
            self.speculator.reset()

    def _admit(self) -> None:
        """Gives waiting prompts their slots, in the order of the queue, while slots and memory last.

        A prompt with several completions waits for a slot for each of them (or for all there are): fewer
        would mean to prefill it again for the rest. One that does not fit keeps its turn, and nobody is
        admitted before it: a large request waits for those that run, and never for small ones behind it.
        """
        num_kept = sum(map(self._num_kept, self._prefilling))
        num_reserved = self.reserved_bytes
        while self._waiting:
            request = self._waiting.first
            num_wanted = 1 + self._num_kept(request)
            wanted_bytes = num_wanted * self._most_bytes(request)
            if (
                self._cache.num_free - num_kept < num_wanted
                or num_reserved + wanted_bytes > self.max_kv_bytes
            ):
                return
            num_kept += num_wanted - 1
            num_reserved += wanted_bytes
            self._waiting.pop()
            request.row = Row(self._cache.allocate(), (), is_prompt=True)
            request.admitted_at = time.perf_counter()
            self._prefilling.append(request)
            if self.prefix_cache is not None:
                self.prefix_cache.announce(request, others=self._prefilling)

    def _num_kept(self, request: Request) -> int:
        """Slots kept for the siblings of a request that is prefilled."""
        return min(len(request.siblings), self._cache.num_slots - 1)

    def _most_bytes(self, request: Request) -> int:
        """Keys and values that one completion may come to."""
        return self._cache.peak_bytes(len(request.prompt_ids) + request.max_tokens)

    def _decode(self) -> None:
        requests = tuple(self._decoding)
        if self.speculator is None:
            for request, logits in zip(requests, self._runtime.step(self._rows), strict=True):
                self._accept(request, logits[0])
            return
        self.speculator.propose(requests)
        results = self._runtime.step(self._rows)
        self.speculator.observe()
        for request, logits in zip(requests, results, strict=True):
            self.speculator.verify(request, logits, self._accept)

    def _prefill(self) -> None:
        budget = self._chunk_size
        chosen: list[tuple[Request, Row]] = []
        for request, most in self._shares():
            row = request.row
            assert row is not None
            if not self._begin(request):
                continue
            end = self._chunk_end(request, request.num_prefilled + min(budget, most))
            row.token_ids = request.prompt_ids[request.num_prefilled : end]
            row.num_logits = int(end == len(request.prompt_ids))
            chosen.append((request, row))
            budget -= len(row.token_ids)
            if budget <= 0:
                break
        results = self._runtime.step([row for _, row in chosen])
        for (request, row), logits in zip(chosen, results, strict=True):
            request.num_prefilled += len(row.token_ids)
            self.counts.num_prompt_tokens += len(row.token_ids)
            if self.prefix_cache is not None:
                self.prefix_cache.keep(request)
            if request.num_prefilled == len(request.prompt_ids):
                self._start_decoding(request, logits[0])

    def _chunk_end(self, request: Request, end: int) -> int:
        """Where a chunk that could reach `end` ends: at a pause or the prompt's end, if it would pass one.

        If batch-invariant, a chunk has more than one token, so a pause that is too near is passed.
        """
        start, fewest = request.num_prefilled, FEWEST_TOKENS if self.is_batch_invariant else 1
        pauses = request.pauses if self.prefix_cache is not None else ()
        stop = next((pause for pause in pauses if pause - start >= fewest), len(request.prompt_ids))
        end = min(end, stop)
        return chunk_end(start, end, stop) if self.is_batch_invariant else end

    def _shares(self) -> list[tuple[Request, int]]:
        """Prompts in the order in which this step feeds them, and most tokens for each.

        The prompts with the fewest tokens left come first: so most have their first token soonest. But half
        of every chunk goes to the oldest prompt of the client whose turn it is: so a long one is never
        stopped by short ones, nor a client by another that sends many.
        """
        chunk = self._chunk_size
        shortest = sorted(self._prefilling, key=_num_left)
        oldest = self._next_in_turn()
        if oldest is shortest[0]:
            return [(request, chunk) for request in shortest]
        others = [request for request in shortest if request is not oldest]
        share = max(-(-chunk // 2), chunk - sum(map(_num_left, others)))
        return [(oldest, share), *((request, chunk) for request in others)]

    def _next_in_turn(self) -> Request:
        """The oldest prompt of the client behind the one that had the last turn."""
        oldest: dict[str, Request] = {}
        for request in self._prefilling:
            oldest.setdefault(request.client, request)
        clients = list(oldest)
        place = clients.index(self._last_client) + 1 if self._last_client in oldest else 0
        self._last_client = clients[place % len(clients)]
        return oldest[self._last_client]

    def _begin(self, request: Request) -> bool:
        """Whether a prompt goes on in this step; a new one is first resumed where it is known."""
        if self.prefix_cache is None or request.num_prefilled:
            return True
        return self.prefix_cache.begin(request, others=self._prefilling)

    def _start_decoding(self, leader: Request, logits: Float32) -> None:
        """Moves a prefilled request, and as many siblings as find a slot, among the decoding ones."""
        leader_row = leader.row
        assert leader_row is not None
        started = [leader]
        while leader.siblings and self._cache.num_free:
            sibling = leader.siblings.pop(0)
            sibling.row = Row(self._cache.fork(leader_row.slot), ())
            sibling.admitted_at = leader.admitted_at
            started.append(sibling)
        # Those left over prefill again once a slot is free: waiting for one here could wait for ever.
        self._promote(leader.siblings)
        leader.siblings = []
        self._prefilling.remove(leader)
        for request in started:
            assert request.row is not None
            self._cache.swap(request.row.slot, len(self._decoding))
            request.row.num_logits = 1
            request.row.is_prompt = False
            self._decoding.append(request)
            self._rows.append(request.row)
        now = time.perf_counter()
        for request in started:
            request.prepare(eos_token_ids=self._eos_token_ids, workspace=self._workspace)
            request.first_token_at = now
            self._accept(request, logits)

    def _promote(self, siblings: list[Request]) -> None:
        """Queues the siblings of a leader that cannot serve them, in front of others of their client."""
        if siblings:
            leader, *leader.siblings = siblings
            self._waiting.append_left(leader)

    def _accept(self, request: Request, logits: Float32) -> None:
        try:
            token_id = request.accept(logits)
        except UserError as error:
            request.fail(error)
        else:
            assert request.row is not None
            request.row.token_ids = (token_id,)
            self.counts.num_generated_tokens += 1
        if request.is_finished:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        """Frees the slot; the last decoding request takes a decoding one's place, in list and cache."""
        row = request.row
        assert row is not None
        self._count_out(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
            self._promote(request.siblings)
            request.siblings = []
        else:
            if self.speculator is not None:
                self.speculator.forget(request)
            if self.prefix_cache is not None:
                self.prefix_cache.keep_completion(request)
            place = self._decoding.index(request)
            self._decoding[place] = self._decoding[-1]
            self._rows[place] = self._rows[-1]
            self._decoding.pop()
            self._rows.pop()
            self._cache.empty(row.slot)  # what it holds is not worth moving
            self._cache.swap(row.slot, len(self._decoding))
        self._cache.free(row.slot)
        request.row = None

    def _count_out(self, request: Request) -> None:
        """Takes a request that has ended from the books."""
        self._live.discard(request)
        reason = "error" if request.error is not None else request.finish_reason
        assert reason is not None
        self.counts.num_finished[reason] += 1


def _num_left(request: Request) -> int:
    return len(request.prompt_ids) - request.num_prefilled
