"""Who is served when: turns between clients, memory, shares of a chunk, and books that are always right.

The network is a fake that keeps tokens in the cache and derives the next one from what it reads there, so
that a slot whose contents were lost, mixed up or moved badly gives other tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from checkpoints import byte_tokenizer, random_ids, tiny_architecture
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import KVCache
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.errors import EngineFailedError, InputError
from modernbert_decoder.tokenizer import Tokenizer

ARCHITECTURE = tiny_architecture(window=16)
CONTEXT = 512


class FakeRuntime:
    """The cache is real; its first layer holds token ids, and the next token follows from all of them."""

    def __init__(self, num_slots: int) -> None:
        self.architecture = ARCHITECTURE
        self.cache = KVCache(ARCHITECTURE, num_slots=num_slots, capacity=CONTEXT)
        self.network_seconds = 0.0
        self.num_calls = 0
        self.fed: list[list[int]] = []
        self.is_broken = False
        self.is_batch_invariant = False

    def step(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        if self.is_broken:
            raise MemoryError("a broken kernel")
        self.num_calls += 1
        self.fed.append([len(row.token_ids) for row in rows])
        return [self._feed(row) for row in rows]

    def _feed(self, row: Row) -> NDArray[np.float32]:
        slot, count = row.slot, len(row.token_ids)
        memory = self.cache.layers[0][0][slot.index, 0, :, 0]
        memory[slot.length : slot.length + count] = row.token_ids
        slot.length += count
        logits = np.zeros((row.num_logits, ARCHITECTURE.vocab_size), np.float32)
        for i in range(row.num_logits):
            held = memory[: slot.length - row.num_logits + 1 + i]
            logits[i, following([int(token_id) for token_id in held])] = 1e4
        return logits


def following(ids: Sequence[int]) -> int:
    """The token behind others: one of the first 200, which end no text."""
    return zlib.crc32(repr(list(ids)).encode()) % 200


def expected_ids(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(following(ids))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder, ARCHITECTURE)


class Desk:
    """Makes requests and submits them."""

    def __init__(self, tokenizer: Tokenizer, *, num_slots: int, chunk_size: int) -> None:
        self.runtime = FakeRuntime(num_slots)
        self.scheduler = Scheduler(self.runtime, eos_token_ids=[], chunk_size=chunk_size)  # type: ignore[arg-type]
        self._tokenizer = tokenizer

    def submit(
        self, length: int, *, max_tokens: int = 3, n: int = 1, client: str = "", seed: int = 0
    ) -> list[Request]:
        params = SamplingParams(temperature=float(n > 1), n=n, seed=1, max_tokens=max_tokens)
        ids = random_ids(ARCHITECTURE, length, seed=seed)
        group = [
            Request(ids, params, tokenizer=self._tokenizer, max_tokens=max_tokens, index=index, client=client)
            for index in range(n)
        ]
        self.scheduler.check(group)
        self.scheduler.submit(group)
        return group

    def one(self, length: int, **options: Any) -> Request:
        return self.submit(length, **options)[0]

    def run(self, *, most_steps: int = 5000) -> None:
        while self.scheduler.has_work:
            self.scheduler.step()
            most_steps -= 1
            assert most_steps, "requests are never finished"


def in_order_of_admission(requests: Sequence[Request]) -> list[str]:
    return [request.client for request in sorted(requests, key=lambda each: each.admitted_at)]


# --- the queue ---


def test_clients_are_admitted_in_turns_and_each_in_its_own_order(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=1, chunk_size=64)
    requests = [desk.one(5, client=client, seed=i) for i, client in enumerate("aaaabbcab")]
    desk.run()
    assert in_order_of_admission(requests) == list("abcababaa")
    for client in "abc":
        admitted = [request.admitted_at for request in requests if request.client == client]
        assert admitted == sorted(admitted)


def test_a_client_that_comes_late_waits_for_one_request_of_each_other(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=1, chunk_size=64)
    requests = [desk.one(5, client=client) for client in "ab" * 20]
    desk.scheduler.step()
    late = desk.one(5, client="late")
    desk.run()
    ahead = [each for each in requests if each.admitted_at < late.admitted_at]
    assert len(ahead) <= 3  # the one that runs, and one of each client


def test_many_completions_of_one_client_do_not_keep_another_waiting(tokenizer: Tokenizer) -> None:
    """What finds no slot with the first of its group queues again, behind its client's turn."""
    desk = Desk(tokenizer, num_slots=2, chunk_size=64)
    many = desk.submit(5, n=12, client="many")
    desk.scheduler.step()
    other = desk.one(5, client="other")
    desk.run()
    assert sum(each.admitted_at < other.admitted_at for each in many) <= 4
    assert all(each.token_ids == many[0].token_ids for each in many)


def test_completions_that_find_no_slot_are_served_before_their_clients_next_prompt(
    tokenizer: Tokenizer,
) -> None:
    desk = Desk(tokenizer, num_slots=2, chunk_size=64)
    group = desk.submit(5, n=6)
    behind = desk.one(5)
    desk.run()
    assert all(request.admitted_at < behind.admitted_at for request in group)


@pytest.mark.parametrize("needs", ["slots", "memory"])
def test_a_large_request_is_not_overtaken_by_small_ones(tokenizer: Tokenizer, needs: str) -> None:
    desk = Desk(tokenizer, num_slots=4, chunk_size=64)
    cache = desk.runtime.cache
    if needs == "memory":
        desk.scheduler.max_kv_bytes = cache.peak_bytes(400)
    for i in range(3):
        desk.one(10, max_tokens=20, client="small", seed=i)
    desk.scheduler.step()
    if needs == "memory":
        (large,) = desk.submit(300, max_tokens=90, client="large")
    else:
        large = desk.submit(10, n=4, max_tokens=20, client="large")[0]
    late = []
    for i in range(30):  # more and more small ones, which would fit at once
        late.append(desk.one(5, max_tokens=2, client=f"client {i}"))
        desk.scheduler.step()
    assert large.admitted_at, "small requests kept it waiting"
    desk.run()
    assert all(each.admitted_at >= large.admitted_at for each in late)


def test_a_waiting_leader_that_is_aborted_leaves_its_place_to_its_siblings(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=2, chunk_size=64)
    running = desk.submit(5, n=2, max_tokens=30)
    first = desk.one(5)
    leader, sibling = desk.submit(5, n=2)
    behind = desk.one(5)
    desk.scheduler.step()
    desk.scheduler.abort(leader)
    desk.run()
    assert all(len(request.token_ids) == 30 for request in running)
    assert first.admitted_at < sibling.admitted_at < behind.admitted_at
    assert sibling.finish_reason == "length"


# --- memory ---


def test_no_more_is_admitted_than_the_memory_could_ever_be_asked_for(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=8, chunk_size=64)
    scheduler, cache = desk.scheduler, desk.runtime.cache
    scheduler.max_kv_bytes = 3 * cache.peak_bytes(50)
    requests = [desk.one(20 + i, max_tokens=30 - i, seed=i) for i in range(9)]
    most = 0
    while scheduler.has_work:
        scheduler.step()
        assert cache.used_bytes() <= scheduler.reserved_bytes <= scheduler.max_kv_bytes
        most = max(most, scheduler.num_running)
    assert most == 3
    assert scheduler.reserved_bytes == 0
    assert all(request.finish_reason == "length" for request in requests)


def test_memory_is_kept_for_completions_that_wait_for_their_prompt(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=8, chunk_size=10)
    scheduler, cache = desk.scheduler, desk.runtime.cache
    scheduler.max_kv_bytes = 3 * cache.peak_bytes(50)
    group = desk.submit(40, n=3, max_tokens=10)
    late = desk.one(10, max_tokens=5)
    scheduler.step()
    assert group[0].num_prefilled == 10
    assert not late.admitted_at
    assert scheduler.reserved_bytes == scheduler.max_kv_bytes
    while scheduler.has_work:
        scheduler.step()
        assert scheduler.reserved_bytes <= scheduler.max_kv_bytes
    assert late.finish_reason == "length"


@pytest.mark.parametrize(("n", "excess"), [(1, 1), (3, 1), (20, 1)])
def test_what_could_never_be_admitted_is_refused_with_the_numbers(
    tokenizer: Tokenizer, n: int, excess: int
) -> None:
    desk = Desk(tokenizer, num_slots=4, chunk_size=64)
    needed = min(n, 4) * desk.runtime.cache.peak_bytes(60)
    desk.scheduler.max_kv_bytes = needed
    desk.submit(40, n=n, max_tokens=20)
    desk.scheduler.max_kv_bytes = needed - excess
    with pytest.raises(InputError, match=f"{needed:,} bytes.*{needed - excess:,}"):
        desk.submit(40, n=n, max_tokens=20)


def test_peak_bytes_are_the_most_that_any_shorter_text_holds() -> None:
    cache = KVCache(ARCHITECTURE, num_slots=1, capacity=CONTEXT)
    held = [cache.bytes_at(length) for length in range(CONTEXT + 1)]
    assert any(held[i] > held[i + 1] for i in range(CONTEXT)), "a ring that wraps gives memory back"
    assert all(cache.peak_bytes(i) >= max(held[: i + 1]) for i in range(CONTEXT + 1))
    assert cache.peak_bytes(cache.ring_capacity) == held[cache.ring_capacity]


# --- shares of the chunk ---


def test_a_short_prompt_does_not_wait_for_a_long_one(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=4, chunk_size=40)
    long = desk.one(500)
    desk.scheduler.step()
    assert long.num_prefilled == 40
    short = desk.one(10)
    desk.scheduler.step()
    assert len(short.token_ids) == 1
    assert long.num_prefilled == 70  # and what the short one leaves of its half


@pytest.mark.parametrize("client", ["", "another"])
def test_a_long_prompt_goes_on_while_short_ones_come_without_end(tokenizer: Tokenizer, client: str) -> None:
    desk = Desk(tokenizer, num_slots=30, chunk_size=40)
    long = desk.one(400, client="")
    desk.scheduler.step()
    for i in range(40):
        desk.one(40, max_tokens=1, client=client, seed=i)
        before = long.num_prefilled
        desk.scheduler.step()
        if long.token_ids:
            break
        # Alone of its client it has every turn; with another one, every second.
        assert long.num_prefilled >= before + 20 or client
    assert long.token_ids
    assert desk.runtime.fed[-1]


def test_prompts_of_all_clients_advance_whatever_one_of_them_sends(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=30, chunk_size=40)
    flood = [desk.one(100, client="flood", seed=i) for i in range(20)]
    desk.scheduler.step()
    long = [desk.one(300, client=client) for client in ("one", "two")]
    num_steps = 0
    while not all(request.token_ids for request in long):
        before = [request.num_prefilled for request in long]
        for _ in range(3):
            desk.scheduler.step()
            num_steps += 1
        for request, count in zip(long, before, strict=True):
            assert request.token_ids or request.num_prefilled >= count + 20
    assert num_steps <= 3 * 300 / 20
    desk.run()
    assert all(request.token_ids for request in flood)


def test_equal_prompts_of_one_client_are_prefilled_one_after_the_other(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=4, chunk_size=40)
    requests = [desk.one(80, max_tokens=1, seed=i) for i in range(3)]
    for done in range(3):
        desk.scheduler.step()
        desk.scheduler.step()
        assert [bool(request.token_ids) for request in requests] == [i <= done for i in range(3)]


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64])
def test_every_step_spends_its_whole_chunk_and_no_more(tokenizer: Tokenizer, chunk_size: int) -> None:
    desk = Desk(tokenizer, num_slots=12, chunk_size=chunk_size)
    lengths = [3, 150, 9, 31, 64, 1, 100, 2, 77]
    requests = [desk.one(length, max_tokens=1, client=f"{i % 3}") for i, length in enumerate(lengths)]
    desk.run()
    fed = [sum(step) for step in desk.runtime.fed]
    assert fed[:-1] == [chunk_size] * (len(fed) - 1)
    assert sum(fed) == sum(lengths) == desk.scheduler.counts.num_prompt_tokens
    assert all(len(request.token_ids) == 1 for request in requests)


# --- books ---


def test_ends_are_counted_by_their_reasons(tokenizer: Tokenizer) -> None:
    desk = Desk(tokenizer, num_slots=2, chunk_size=64)
    aborted, late = desk.one(5, max_tokens=100), desk.one(6, max_tokens=100)
    waiting = desk.submit(5, n=2)
    desk.scheduler.step()
    desk.scheduler.abort(aborted)
    desk.scheduler.abort(late, "timeout")
    desk.scheduler.abort(waiting[0])
    desk.run()
    assert desk.scheduler.counts.num_finished == {"aborted": 2, "timeout": 1, "length": 1}
    assert desk.scheduler.num_ended == 4
    desk.one(5)
    desk.runtime.is_broken = True
    with pytest.raises(MemoryError):
        desk.scheduler.step()
    assert desk.scheduler.counts.num_finished["error"] == 1
    assert late.finish_reason == "timeout"
    assert desk.scheduler.counts.num_generated_tokens == 2 + 3


def test_an_end_before_its_time_shows_the_text_that_was_held_back(tokenizer: Tokenizer) -> None:
    """A stop string that has begun, or half a character, is text when nothing follows."""
    desk = Desk(tokenizer, num_slots=1, chunk_size=64)
    ids = random_ids(ARCHITECTURE, 5)
    wanted = expected_ids(ids, 4)
    text = tokenizer.decode(wanted)
    params = SamplingParams(temperature=0, max_tokens=50, stop=[text + "and more"])
    request = Request(ids, params, tokenizer=tokenizer, max_tokens=50)
    desk.scheduler.submit([request])
    for _ in range(4):
        desk.scheduler.step()
    shown = request.next_chunk()
    assert shown is not None
    desk.scheduler.abort(request, "timeout")
    rest = request.next_chunk()
    assert rest is not None
    assert rest.finish_reason == "timeout"
    assert rest.token_ids == ()
    assert shown.text + rest.text == text != shown.text
    assert request.next_chunk() is None


class Scheduling(RuleBasedStateMachine):
    """Anything in any order: submitting, aborting, stepping, failing."""

    tokenizer: Tokenizer

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(self.tokenizer, num_slots=4, chunk_size=23)
        self.scheduler = self.desk.scheduler
        self.cache = self.desk.runtime.cache
        self.scheduler.max_kv_bytes = 3 * self.cache.peak_bytes(90)
        self.requests: list[Request] = []
        self.num_failures = 0

    @rule(
        length=st.integers(1, 70),
        n=st.sampled_from([1, 1, 1, 2, 3, 7]),
        max_tokens=st.integers(1, 20),
        client=st.sampled_from(["", "a", "b"]),
        seed=st.integers(0, 3),
    )
    def submit(self, length: int, n: int, max_tokens: int, client: str, seed: int) -> None:
        needed = min(n, 4) * self.cache.peak_bytes(length + max_tokens)
        if needed > self.scheduler.max_kv_bytes:
            with pytest.raises(InputError):
                self.desk.submit(length, n=n, max_tokens=max_tokens, client=client, seed=seed)
        else:
            self.requests += self.desk.submit(length, n=n, max_tokens=max_tokens, client=client, seed=seed)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), reason=st.sampled_from(["aborted", "timeout"]))
    def abort(self, data: st.DataObject, reason: str) -> None:
        request = data.draw(st.sampled_from(self.requests[-8:]))
        had_ended = request.finish_reason
        self.scheduler.abort(request, reason)
        assert request.finish_reason == (had_ended or reason)
        assert request.row is None

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()

    @precondition(lambda self: self.scheduler.num_running)
    @rule()
    def fail(self) -> None:
        self.desk.runtime.is_broken = True
        with pytest.raises(MemoryError):
            self.scheduler.step()
        self.desk.runtime.is_broken = False
        assert all(request.is_finished for request in self.requests)
        assert not self.scheduler.has_work
        self.num_failures += 1

    @invariant()
    def books_are_right(self) -> None:
        scheduler, cache = self.scheduler, self.cache
        unfinished = {request for request in self.requests if not request.is_finished}
        assert scheduler._live == unfinished
        holding = [request for request in self.requests if request.row is not None]
        assert len(holding) == scheduler.num_running == cache.num_slots - cache.num_free
        assert all(not request.is_finished for request in holding)
        assert cache.used_bytes() <= scheduler.reserved_bytes <= scheduler.max_kv_bytes
        places = [request.row.slot.index for request in scheduler._decoding if request.row is not None]
        assert places == list(range(len(scheduler._decoding)))
        queued = [*scheduler._waiting, *scheduler._prefilling]
        siblings = [sibling for leader in queued for sibling in leader.siblings]
        assert len(scheduler._waiting) == len(list(scheduler._waiting))
        assert {*queued, *siblings, *scheduler._decoding} == unfinished
        assert len(queued) + len(siblings) + len(scheduler._decoding) == len(unfinished)
        assert scheduler.num_ended == len(self.requests) - len(unfinished)

    @invariant()
    def tokens_are_right(self) -> None:
        for request in self.requests[-10:]:
            assert request.token_ids == expected_ids(request.prompt_ids, len(request.token_ids))

    def teardown(self) -> None:
        self.desk.run()
        self.books_are_right()
        for request in self.requests:
            if request.error is not None:
                assert isinstance(request.error, EngineFailedError)
                assert self.num_failures
            elif request.finish_reason == "length":
                assert request.token_ids == expected_ids(request.prompt_ids, request.max_tokens)
        assert self.cache.num_free == self.cache.num_slots
        assert self.cache.used_bytes() == self.scheduler.reserved_bytes == 0


def test_the_books_are_right_whatever_happens(tokenizer: Tokenizer) -> None:
    machine = type("Machine", (Scheduling,), {"tokenizer": tokenizer})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
