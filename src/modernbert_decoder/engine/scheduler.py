"""Continuous batching: admit, prefill in chunks, decode together, retire.

Each step gives every decoding request one token in one call, and then spends at most one chunk of tokens on
prompts, so that a long prompt delays running requests by no more than a chunk. Slots 0..d-1 belong to the
decoding requests in the order of their list, those behind to prompts being prefilled; requests that leave
are replaced by the last of their kind. This module knows requests and rows, not texts or sampling.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

from modernbert_decoder.engine.request import Float32, Request
from modernbert_decoder.engine.runtime import Row, Runtime
from modernbert_decoder.engine.selection import Workspace
from modernbert_decoder.errors import UserError


class Scheduler:
    """Runs requests on one runtime.

    Args:
        runtime: session and cache.
        eos_token_ids: tokens that end a text.
        chunk_size: most prompt tokens per step.

    Attributes:
        num_ended: requests that left a slot so far.
    """

    def __init__(self, runtime: Runtime, *, eos_token_ids: Sequence[int], chunk_size: int) -> None:
        self._runtime = runtime
        self._cache = runtime.cache
        self._eos_token_ids = tuple(eos_token_ids)
        self._chunk_size = chunk_size
        self._workspace = Workspace(runtime.architecture.vocab_size)
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._rows: list[Row] = []
        # Every request that has not ended, in whichever of the lists above, or between two of them.
        self._live: set[Request] = set()
        self.num_ended = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._decoding or self._prefilling or self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._decoding) + len(self._prefilling)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queues the completions of one prompt; the first carries the prefill for its siblings."""
        leader, *siblings = requests
        leader.siblings = siblings
        self._live.update((leader, *siblings))
        self._waiting.append(leader)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is; its slot is free for the next step."""
        if request.is_finished:
            return
        request.fail(None)
        self._live.discard(request)
        if request in self._waiting:
            self._waiting.remove(request)
            self._promote(request.siblings)
        elif request.row is not None:
            self._retire(request)
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
            self.fail_all(RuntimeError(f"a step of the engine failed: {error!r}"))
            raise

    def fail_all(self, error: Exception) -> None:
        """Ends every request with `error`, wherever a broken step left it, and frees every slot."""
        for request in self._live:
            request.fail(error)
            request.row = None
            request.siblings = []
            self.num_ended += 1
        for requests in (self._live, self._waiting, self._prefilling, self._decoding, self._rows):
            requests.clear()
        self._cache.reset()

    def _admit(self) -> None:
        """Gives waiting prompts their slots, in order.

        A prompt with several completions waits for a slot for each of them (or for all there are): fewer
        would mean to prefill it again for the rest.
        """
        num_slots = self._cache.num_slots
        num_kept = sum(min(len(request.siblings), num_slots - 1) for request in self._prefilling)
        while self._waiting:
            request = self._waiting[0]
            num_wanted = min(1 + len(request.siblings), num_slots)
            if self._cache.num_free - num_kept < num_wanted:
                return
            num_kept += num_wanted - 1
            self._waiting.popleft()
            request.row = Row(self._cache.allocate(), ())
            request.admitted_at = time.perf_counter()
            self._prefilling.append(request)

    def _decode(self) -> None:
        requests = tuple(self._decoding)
        for request, logits in zip(requests, self._runtime.step(self._rows), strict=True):
            self._accept(request, logits[0])

    def _prefill(self) -> None:
        budget = self._chunk_size
        chosen: list[tuple[Request, Row]] = []
        for request in self._prefilling:
            row = request.row
            assert row is not None
            end = min(request.num_prefilled + budget, len(request.prompt_ids))
            row.token_ids = request.prompt_ids[request.num_prefilled : end]
            row.num_logits = int(end == len(request.prompt_ids))
            chosen.append((request, row))
            budget -= len(row.token_ids)
            if budget <= 0:
                break
        results = self._runtime.step([row for _, row in chosen])
        for (request, row), logits in zip(chosen, results, strict=True):
            request.num_prefilled += len(row.token_ids)
            if request.num_prefilled == len(request.prompt_ids):
                self._start_decoding(request, logits[0])

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
            self._decoding.append(request)
            self._rows.append(request.row)
        now = time.perf_counter()
        for request in started:
            request.prepare(eos_token_ids=self._eos_token_ids, workspace=self._workspace)
            request.first_token_at = now
            self._accept(request, logits)

    def _promote(self, siblings: list[Request]) -> None:
        """Queues the siblings of a leader that cannot serve them, in front."""
        if siblings:
            leader, *others = siblings
            leader.siblings = others
            self._waiting.appendleft(leader)

    def _accept(self, request: Request, logits: Float32) -> None:
        try:
            token_id = request.accept(logits)
        except UserError as error:
            request.fail(error)
        else:
            assert request.row is not None
            request.row.token_ids = (token_id,)
        if request.is_finished:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        """Frees the slot; the last decoding request takes a decoding one's place, in list and cache."""
        row = request.row
        assert row is not None
        self.num_ended += 1
        self._live.discard(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
            self._promote(request.siblings)
            request.siblings = []
        else:
            place = self._decoding.index(request)
            self._decoding[place] = self._decoding[-1]
            self._rows[place] = self._rows[-1]
            self._decoding.pop()
            self._rows.pop()
            self._cache.empty(row.slot)  # what it holds is not worth moving
            self._cache.swap(row.slot, len(self._decoding))
        self._cache.free(row.slot)
        request.row = None
