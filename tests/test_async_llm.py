"""An engine behind event loops: everyone gets what they get alone, may leave any time, and leaves nothing."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from checkpoints import CLS, random_ids, tiny_architecture, write_checkpoint
from modernbert_decoder import (
    LLM,
    AsyncLLM,
    EngineClosedError,
    EngineFailedError,
    InputError,
    QueueFullError,
    RequestTimeoutError,
    SamplingParams,
)
from modernbert_decoder.architecture import Head
from modernbert_decoder.engine import engine_thread, ticket
from modernbert_decoder.engine.outputs import RequestOutput, StreamChunk
from modernbert_decoder.engine.speculation import Speculation
from test_llm_streams import generated, joined

Result = TypeVar("Result")

ARCHITECTURE = tiny_architecture(window=16)
# Only a deadlock takes this long; nothing is measured.
DEADLOCK_SECONDS = 60
ENDLESS = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), ARCHITECTURE)


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_context": 300, "max_batch_tokens": 64}
    with LLM(folder, max_slots=4, chunk_size=32, **options) as opened:
        yield opened
        assert_all_free(opened)


def test_an_engine_that_cannot_be_made_batch_invariant_leaves_its_llm_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bytes:
        raise MemoryError("no more")

    with LLM(folder, dtype="float32", threads=1, max_context=300, speculation=Speculation()) as llm:
        stepwise = llm._runtime._stepwise
        assert stepwise is not None
        monkeypatch.setattr(llm._runtime, "_stepwise", stepwise._replace(build=fail))
        most = llm._driver.scheduler.max_kv_bytes

        async def check() -> None:
            with pytest.raises(MemoryError, match="no more"):
                AsyncLLM(llm, max_kv_bytes=1 << 20)
            assert llm._driver.scheduler.max_kv_bytes == most
            async with AsyncLLM(llm, batch_invariant=False) as engine:
                assert (await engine.generate([CLS, 65], SamplingParams(max_tokens=3))).outputs[0].token_ids

        asyncio.run(check())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION, id2label={0: "no", 1: "yes"})
    folder = write_checkpoint(tmp_path_factory.mktemp("classifier"), architecture)
    with LLM(folder, dtype="float32", threads=1, max_context=300, max_batch_tokens=64) as opened:
        yield opened


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine on an event loop of its own; fails instead of waiting for ever."""

    async def within_reason() -> Result:
        async with asyncio.timeout(DEADLOCK_SECONDS):
            return await coroutine

    return asyncio.run(within_reason())


def assert_all_free(llm: LLM) -> None:
    assert llm.cache.num_free == llm.cache.num_slots
    assert llm.cache.used_bytes() == 0


async def idle(engine: AsyncLLM) -> None:
    """Waits until no request is left."""
    await asyncio.wrap_future(engine._engine.when_idle())


@contextmanager
def held(engine: AsyncLLM) -> Iterator[None]:
    """Keeps the engine from looking at what is submitted meanwhile: it then sees it all at once."""
    release = threading.Event()

    def hold() -> None:
        assert release.wait(DEADLOCK_SECONDS)

    with engine._engine._lock:
        engine._engine._leave(hold)
    try:
        yield
    finally:
        release.set()


class Gate:
    """Holds the engine before every step until it is let through."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = 0
        self.is_open = False
        self._step = llm._driver.scheduler.step
        self._permits = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        monkeypatch.setattr(llm._driver.scheduler, "step", self._pass)

    def _pass(self) -> None:
        self._arrived.release()
        if not self.is_open:
            assert self._permits.acquire(timeout=DEADLOCK_SECONDS)
        self.num_steps += 1
        self._step()

    async def reached(self) -> None:
        """Waits until the engine stands before a step: what earlier steps gave is delivered by then."""
        assert await asyncio.to_thread(self._arrived.acquire, timeout=DEADLOCK_SECONDS)

    async def steps(self, count: int) -> None:
        """Lets the engine, which stands before a step, take `count` of them."""
        for _ in range(count):
            self._permits.release()
            await self.reached()

    def open(self) -> None:
        """Lets everything through."""
        self.is_open = True
        self._permits.release(1000)


@asynccontextmanager
async def gated(engine: AsyncLLM, gate: Gate) -> AsyncIterator[None]:
    """Opens the gate at the end, whatever happens, so that nothing hangs."""
    try:
        yield
    finally:
        gate.open()
        await engine.close()


# --- outputs ---


def test_everyone_gets_what_they_get_alone(llm: LLM) -> None:
    asked = []
    for i in range(24):
        prompt = random_ids(ARCHITECTURE, [3, 17, 40, 90][i % 4], seed=i)
        settings: dict[str, Any] = [
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": i},
            {"temperature": 0.8, "seed": i, "n": 3, "logprobs": 2},
            {"temperature": 0.0, "stop": ["a", "e"], "repetition_penalty": 1.2},
        ][i % 4]
        asked.append((prompt, SamplingParams(max_tokens=5 + i, **settings)))
    expected = [generated(llm, *each) for each in asked]

    async def ask(engine: AsyncLLM, i: int) -> dict[int, Any]:
        prompt, params = asked[i]
        if i % 3:
            stream = engine.stream(prompt, params, client=f"client {i % 5}")
            return joined([chunk async for chunk in stream])
        output = await engine.generate(prompt, params, client=f"client {i % 5}")
        assert output.prompt_token_ids == tuple(prompt)
        return {o.index: (o.text, o.token_ids, o.logprobs, *reasons(o)) for o in output.outputs}

    def reasons(output: Any) -> tuple[Any, Any]:
        return output.finish_reason, output.stop_reason

    async def main() -> list[dict[int, Any]]:
        async with AsyncLLM(llm) as engine:
            return await asyncio.gather(*(ask(engine, i) for i in range(len(asked))))

    for output, alone in zip(run(main()), expected, strict=True):
        assert without_logprobs(output) == without_logprobs(alone)
        for (*_, tables, _, _), (*_, alone_tables, _, _) in zip(output.values(), alone.values(), strict=True):
            assert (tables is None) == (alone_tables is None)
            assert [list(table) for table in tables or ()] == [list(table) for table in alone_tables or ()]


def without_logprobs(outputs: dict[int, Any]) -> dict[int, Any]:
    """Log-probabilities depend on the batch in their last digits."""
    return {index: (*values[:2], *values[3:]) for index, values in outputs.items()}


def test_one_engine_serves_several_event_loops_one_after_the_other_and_at_once(llm: LLM) -> None:
    engine = AsyncLLM(llm)
    alone = generated(llm, [CLS, 7], SHORT)

    async def ask() -> dict[int, Any]:
        return joined([chunk async for chunk in engine.stream([CLS, 7], SHORT)])

    assert [run(ask()) for _ in range(3)] == [alone] * 3
    outputs: list[Any] = []
    threads = [threading.Thread(target=lambda: outputs.append(run(ask()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLOCK_SECONDS)
    assert outputs == [alone] * 4
    run(engine.close())


def test_several_engines_work_side_by_side(llm: LLM, classifier: LLM, folder: Path) -> None:
    expected = generated(llm, [CLS, 7], ENDLESS)
    labels = [output.label for output in classifier.classify(["one", "two"])]

    async def main(other: LLM) -> None:
        async with AsyncLLM(llm) as first, AsyncLLM(other) as second, AsyncLLM(classifier) as third:
            outputs = await asyncio.gather(
                first.generate([CLS, 7], ENDLESS),
                second.generate([CLS, 7], ENDLESS),
                third.classify(["one", "two"]),
            )
        assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids == expected[0][1]
        assert [output.label for output in outputs[2]] == labels

    with LLM(folder, dtype="float32", threads=1, max_context=300) as other:
        run(main(other))


def test_a_slow_reader_gets_everything_in_few_pieces_and_holds_nobody_up(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=100, ignore_eos=True)
    expected = generated(llm, [CLS, 7], params)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            stream = engine.stream([CLS, 7], params)
            chunks = [await anext(stream)]
            await engine.generate([CLS, 8], ENDLESS)  # longer than the stream: by then it has ended
            await idle(engine)
            assert_all_free(llm)
            assert len(stream._ticket._chunks) <= 2 * params.n
            chunks += [chunk async for chunk in stream]
            assert len(chunks) <= 1 + 2 * params.n
            assert joined(chunks) == expected

    run(main())


def test_a_fast_reader_gets_every_token_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            stream = engine.stream([CLS, 7], ENDLESS)
            await gate.reached()
            for _ in range(5):
                await gate.steps(1)
                assert len((await anext(stream)).token_ids) == 1
            assert stream.prompt_token_ids == (CLS, 7)

    run(main())


# --- leaving ---


def closed(stream: Any, task: asyncio.Task[Any]) -> Coroutine[Any, Any, None]:
    result: Coroutine[Any, Any, None] = stream.aclose()
    return result


async def cancelled(stream: Any, task: asyncio.Task[Any]) -> None:
    task.cancel()


@pytest.mark.parametrize("leave", [closed, cancelled])
@pytest.mark.parametrize("state", ["decoding", "prefilling", "waiting"])
def test_who_leaves_frees_their_slot_within_one_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, leave: Callable[..., Any], state: str
) -> None:
    expected = generated(llm, [CLS, 9], ENDLESS)
    gate = Gate(llm, monkeypatch)

    async def read(stream: Any) -> list[StreamChunk]:
        return [chunk async for chunk in stream]

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            stays = asyncio.create_task(read(engine.stream([CLS, 9], ENDLESS)))
            await asyncio.sleep(0)
            if state == "waiting":  # all other slots are taken
                full = SamplingParams(temperature=1.0, n=3, seed=1, max_tokens=150, ignore_eos=True)
                others = engine.stream([CLS, 5], full)
            prompt = random_ids(ARCHITECTURE, 250) if state == "prefilling" else [CLS, 7]
            params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True)
            stream = engine.stream(prompt, params)
            task = asyncio.create_task(read(stream))
            await gate.reached()
            await gate.steps(3)
            request = stream._ticket.requests[0]
            assert (request.row is None) == (state == "waiting")
            assert (request.first_token_at > 0) == (state == "decoding")
            await leave(stream, task)
            await asyncio.wait([task])
            await gate.steps(2)  # the one before which it stands, and one to see what came of it
            assert request.finish_reason == "aborted"
            assert request.row is None
            if state == "waiting":
                await others.aclose()
            gate.open()
            assert joined(await stays) == expected
            assert stream._ticket.is_ended

    run(main())


def test_cancelling_generate_frees_its_slot(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            task = asyncio.create_task(engine.generate([CLS], ENDLESS))
            await gate.reached()
            await gate.steps(2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            num_steps = gate.num_steps
            gate.open()
            await idle(engine)
            assert gate.num_steps <= num_steps + 1
            assert_all_free(llm)

    run(main())


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_stream_that_is_dropped_frees_its_slot(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, has_begun: bool
) -> None:
    gate = Gate(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            stream = engine.stream([CLS], ENDLESS)
            await gate.reached()
            if has_begun:
                await gate.steps(2)
                await anext(stream)
            num_steps = gate.num_steps
            del stream
            gc.collect()
            gate.open()
            await idle(engine)
            assert gate.num_steps <= num_steps + 1
            assert_all_free(llm)

    run(main())


def test_leaving_a_loop_over_a_stream_frees_its_slot(llm: LLM) -> None:
    async def read(engine: AsyncLLM) -> None:
        async for _ in engine.stream([CLS], ENDLESS):
            raise ValueError("the reader has had enough")

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(ValueError, match="enough"):
                await read(engine)
            gc.collect()
            await idle(engine)
            assert engine.stats().num_generated_tokens < 150
            assert_all_free(llm)

    run(main())


def test_readers_whose_loop_is_closed_leave_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(llm, monkeypatch)
    engine = AsyncLLM(llm)
    kept = []

    async def vanish() -> None:
        kept.append(engine.stream([CLS], ENDLESS))
        await gate.reached()

    async def main() -> None:
        async with gated(engine, gate):
            gate.open()
            await idle(engine)
            assert_all_free(llm)
            assert gate.num_steps < 10

    run(vanish())
    run(main())
    assert kept[0]._ticket.is_ended


# --- waiting ---


def test_one_request_too_many_is_refused_and_told_when_to_come_back(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm, max_waiting=3)
        async with gated(engine, gate):
            with held(engine):  # four slots are free, so seven may come at once
                tasks = [asyncio.create_task(engine.generate([CLS, i], SHORT)) for i in range(7)]
                await asyncio.sleep(0)
            await gate.reached()
            for _ in range(2):  # none of them run; four of them run, and three wait
                with pytest.raises(QueueFullError) as refused:
                    engine.stream([CLS], SHORT)
                assert 1 <= refused.value.retry_after <= 60
                await gate.steps(1)
            assert engine.stats().num_waiting == 3
            assert engine.stats().num_running == 4
            gate.open()
            await asyncio.gather(*tasks)
            assert len((await engine.generate([CLS], SHORT)).outputs[0].token_ids) == 5

    run(main())


@pytest.mark.parametrize(("step_seconds", "expected"), [(2, 10), (8, 40), (1000, 60), (0.001, 1)])
def test_the_wait_is_estimated_from_what_ended_lately(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, step_seconds: float, expected: float
) -> None:
    gate = Gate(llm, monkeypatch)
    clock = Clock(monkeypatch)
    params = SamplingParams(temperature=0, max_tokens=1)

    async def main() -> None:
        engine = AsyncLLM(llm, max_waiting=36)
        async with gated(engine, gate):
            with held(engine):
                tasks = [asyncio.create_task(engine.generate([CLS, i], params)) for i in range(40)]
                await asyncio.sleep(0)
                with pytest.raises(QueueFullError) as refused:
                    await engine.generate([CLS], params)
                assert refused.value.retry_after == 5  # nothing is known
            await gate.reached()
            for _ in range(8):  # four end with every step
                clock.now += step_seconds
                await gate.steps(1)
            more = [asyncio.create_task(engine.generate([CLS, i], params)) for i in range(32)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError) as refused:
                await engine.generate([CLS], params)
            # Half of 40 that wait take five steps.
            assert refused.value.retry_after == pytest.approx(expected, rel=0.2)
            gate.open()
            await asyncio.gather(*tasks, *more)

    run(main())


def test_clients_take_turns(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(llm, monkeypatch)
    ended = []

    async def ask(engine: AsyncLLM, client: str) -> None:
        await engine.generate([CLS], SHORT, client=client)
        ended.append(client)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            with held(engine):
                tasks = [asyncio.create_task(ask(engine, client)) for client in "aaaaaaaaaaaabbcc"]
                await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(*tasks)

    run(main())
    assert sorted(ended[:8]) == list("aaaabbcc")


def test_requests_that_may_need_too_much_memory_are_refused_and_others_wait_for_it(llm: LLM) -> None:
    async def main() -> None:
        limit = 2 * llm.cache.peak_bytes(2 + 20)
        async with AsyncLLM(llm, max_kv_bytes=limit) as engine:
            assert engine.stats().kv_bytes_limit == limit
            with pytest.raises(InputError, match=f"{limit:,}"):
                engine.stream([CLS], SamplingParams(max_tokens=100))
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            streams = [engine.stream([CLS, i], params) for i in range(8)]
            for stream in streams:
                async for _ in stream:
                    stats = engine.stats()
                    assert stats.num_running <= 2
                    assert stats.kv_bytes_used <= limit
                    assert stats.kv_bytes_reserved <= limit

    run(main())


# --- time ---


class Clock:
    """The engine's clock, which stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (engine_thread, ticket):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)


def test_a_request_without_time_has_no_turn(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(RequestTimeoutError, match="0 seconds") as ended:
                await engine.generate([CLS], ENDLESS, timeout=0)
            assert ended.value.output is None
            with pytest.raises(RequestTimeoutError):
                await anext(engine.stream([CLS], ENDLESS, timeout=0))
            assert engine.stats().num_finished == {"timeout": 2}
            assert engine.stats().num_generated_tokens == 0

    run(main())


def test_what_there_was_in_time_is_not_lost(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generated(llm, [CLS, 7], ENDLESS)[0]
    gate = Gate(llm, monkeypatch)
    clock = Clock(monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            whole = asyncio.create_task(engine.generate([CLS, 7], ENDLESS, timeout=30))
            stream = engine.stream([CLS, 7], ENDLESS, timeout=30)
            later = asyncio.create_task(engine.generate([CLS, 7], ENDLESS, timeout=50))
            patient = asyncio.create_task(engine.generate([CLS, 7], ENDLESS))
            await gate.reached()
            await gate.steps(4)
            clock.now += 40
            await gate.steps(2)
            with pytest.raises(RequestTimeoutError, match="30 seconds") as ended:
                await whole
            output = ended.value.output
            assert isinstance(output, RequestOutput)
            assert 4 <= len(output.outputs[0].token_ids) <= 6
            assert output.outputs[0].token_ids == expected[1][: len(output.outputs[0].token_ids)]
            assert output.outputs[0].finish_reason == "timeout"
            chunks = [chunk async for chunk in stream]
            assert [chunk.finish_reason for chunk in chunks][-1] == "timeout"
            ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
            assert 4 <= len(ids) <= 6
            assert tuple(ids) == expected[1][: len(ids)]
            assert "".join(chunk.text for chunk in chunks) == llm.tokenizer.decode(ids)
            clock.now += 20
            await gate.steps(2)
            with pytest.raises(RequestTimeoutError, match="50 seconds"):
                await later
            gate.open()
            assert (await patient).outputs[0].token_ids == expected[1]

    run(main())


# --- failures ---


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["network", "step", "delivery"])
def test_a_failure_ends_every_request_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], place: str
) -> None:
    expected = generated(llm, [CLS, 7], SHORT)[0][1]
    gate = Gate(llm, monkeypatch)
    failing = {
        "network": (llm._runtime, "step"),
        "step": (llm._driver.scheduler, "_accept"),
        "delivery": (ticket.Ticket, "collect"),
    }

    def fail(*arguments: Any) -> Any:
        monkeypatch.setattr(*failing[place], working)  # once only
        raise error("injected")

    working: Any = None

    async def main() -> None:
        nonlocal working
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            tasks = [asyncio.create_task(engine.generate([CLS, i], ENDLESS)) for i in range(6)]
            await asyncio.sleep(0)
            stream = engine.stream([CLS], ENDLESS)
            await gate.reached()
            await gate.steps(3)
            working = getattr(*failing[place])
            monkeypatch.setattr(*failing[place], fail)
            gate.open()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [EngineFailedError] * 6
            assert "injected" in str(results[0])
            with pytest.raises(EngineFailedError, match="injected"):
                async for _ in stream:
                    pass
            await idle(engine)
            assert_all_free(llm)
            output = await engine.generate([CLS, 7], SHORT)
            assert output.outputs[0].token_ids == expected

    run(main())


def test_exceptions_thrown_into_the_thread_anywhere_leave_nobody_waiting(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {i: generated(llm, [CLS, i], SHORT)[0][1] for i in range(8)}
    step = llm._runtime.step
    thread_ids: list[int] = []

    def recorded(rows: Any) -> Any:
        thread_ids.append(threading.get_ident())
        if len(thread_ids) % 7 == 0:  # comes some bytecodes later, wherever that is
            error = ctypes.py_object(ZeroDivisionError)
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_ids[-1]), error) == 1
        return step(rows)

    async def ask(engine: AsyncLLM, i: int) -> bool:
        try:
            output = await engine.generate([CLS, i], SHORT)
        except EngineFailedError:
            return False
        assert output.outputs[0].token_ids == expected[i]
        return True

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            monkeypatch.setattr(llm._runtime, "step", recorded)
            rounds = [await asyncio.gather(*(ask(engine, i) for i in range(8))) for _ in range(10)]
            monkeypatch.setattr(llm._runtime, "step", step)
            assert {True, False} == {each for answers in rounds for each in answers}
            assert await ask(engine, 7)

    run(main())


def test_a_request_that_can_choose_no_token_fails_alone(llm: LLM) -> None:
    bans = dict.fromkeys(range(ARCHITECTURE.vocab_size), -np.inf)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            other = engine.stream([CLS], SHORT)
            with pytest.raises(InputError, match="no token is left"):
                await engine.generate([CLS], SamplingParams(temperature=0, logit_bias=bans))
            assert [chunk async for chunk in other][-1].finish_reason == "length"

    run(main())


# --- reading ---


class HeldNetwork:
    """Holds the reading of texts until it may go on."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_reads = 0
        self.go_on = threading.Event()
        self._reached = threading.Event()
        self._read = llm._runtime.read
        monkeypatch.setattr(llm._runtime, "read", self._pass)

    def _pass(self, piece: Any, **options: Any) -> Any:
        self.num_reads += 1
        self._reached.set()
        assert self.go_on.wait(DEADLOCK_SECONDS)
        return self._read(piece, **options)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, DEADLOCK_SECONDS)


def test_texts_are_read_as_by_the_llm(llm: LLM, classifier: LLM) -> None:
    texts = ["one", "a text that is a little longer than the others", "three"]

    async def main() -> None:
        async with AsyncLLM(llm) as engine, AsyncLLM(classifier) as other:
            stream = engine.stream([CLS], ENDLESS)
            scores, embedded, ranked, labels = await asyncio.gather(
                engine.score(texts, top_logprobs=2),
                engine.embed(texts, pooling="mean"),
                engine.rank("one", ["two", "three"], normalization="token"),
                other.classify(texts, client="somebody", timeout=1000),
            )
            await stream.aclose()
        assert [score.token_ids for score in scores] == [score.token_ids for score in llm.score(texts)]
        vectors = np.stack([output.embedding for output in embedded])
        np.testing.assert_allclose(vectors, llm.embed(texts, pooling="mean"), atol=1e-5)
        assert [output.num_tokens for output in embedded] == [score.num_tokens + 2 for score in scores]
        expected = llm.rank("one", ["two", "three"], normalization="token")
        assert [each.candidate for each in ranked] == [each.candidate for each in expected]
        assert [output.label for output in labels] == [each.label for each in classifier.classify(texts)]

    run(main())


def test_streams_take_a_step_between_any_two_batches_of_texts(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    step, read = llm._runtime.step, llm._runtime.read

    def recorded_step(rows: Any) -> Any:
        events.append("step")
        return step(rows)

    def recorded_read(piece: Any, **options: Any) -> Any:
        events.append("read")
        return read(piece, **options)

    monkeypatch.setattr(llm._runtime, "step", recorded_step)
    monkeypatch.setattr(llm._runtime, "read", recorded_read)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            params = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
            stream = engine.stream([CLS], params)
            await anext(stream)
            jobs = [engine.embed([f"text number {i}, and some more"] * 20) for i in range(6)]
            await asyncio.gather(*jobs)
            assert [chunk async for chunk in stream]

    run(main())
    assert events.count("step") == 250
    assert events.count("read") >= 20
    last_step = len(events) - events[::-1].index("step")
    assert "readread" not in "".join(events[:last_step])


def test_a_text_that_cannot_be_read_is_its_callers_error(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(InputError, match="text 1: "):
                await engine.embed(["fine", "x" * 1000])
            with pytest.raises(InputError, match="classif"):
                await engine.classify("no classifier")
            with pytest.raises(InputError, match="normalization"):
                await engine.rank("a", ["b"], normalization="none")
            assert len(await engine.score("fine")) == 1

    run(main())


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_a_reading_job_that_is_given_up_ends_with_its_next_batch(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    network = HeldNetwork(llm, monkeypatch)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            task = asyncio.create_task(engine.embed(["a text of some length"] * 50, timeout=30))
            await network.reached()
            if how == "cancelled":
                task.cancel()
            else:
                loop = asyncio.get_running_loop()
                now = loop.time() + 40
                monkeypatch.setattr(loop, "time", lambda: now)
            expected = asyncio.CancelledError if how == "cancelled" else RequestTimeoutError
            with pytest.raises(expected):
                await task
            network.go_on.set()
            await asyncio.wrap_future(engine._desk.when_idle())
            assert network.num_reads == 1
            assert engine.stats().num_reading == 0
            assert len(await engine.embed("another")) == 1

    run(main())


def test_reading_jobs_wait_in_turns_and_too_many_are_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = HeldNetwork(llm, monkeypatch)
    ended = []

    async def ask(engine: AsyncLLM, client: str) -> None:
        await engine.embed(f"text of {client}", client=client)
        ended.append(client)

    async def main() -> None:
        async with AsyncLLM(llm, max_waiting=7) as engine:
            tasks = [asyncio.create_task(ask(engine, client)) for client in "aaaaaaaaabb"]
            await asyncio.sleep(0)
            assert engine.stats().num_reading == 11
            with pytest.raises(QueueFullError):
                await engine.embed("one more")
            network.go_on.set()
            await asyncio.gather(*tasks)

    run(main())
    assert ended.count("b") == 2
    assert "b" in ended[:7]  # four of a may have run before b came


# --- the end ---


def test_draining_lets_running_requests_end_and_takes_no_more(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            tasks = [asyncio.create_task(engine.generate([CLS, i], SHORT)) for i in range(6)]
            await gate.reached()
            drained = asyncio.create_task(engine.drain(DEADLOCK_SECONDS))
            await asyncio.sleep(0)
            with pytest.raises(EngineClosedError):
                engine.stream([CLS], SHORT)
            with pytest.raises(EngineClosedError):
                await engine.score("a text")
            gate.open()
            await drained
            outputs = await asyncio.gather(*tasks)
            assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 6

    run(main())


@pytest.mark.parametrize("end", ["drain", "close"])
def test_what_is_left_at_the_end_ends_politely(llm: LLM, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    expected = generated(llm, [CLS, 0], ENDLESS)[0][1]
    gate = Gate(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            streams = [engine.stream([CLS, i], ENDLESS) for i in range(3)]
            whole = asyncio.create_task(engine.generate([CLS, 0], ENDLESS))
            await asyncio.sleep(0)
            waiting = engine.stream([CLS, 9], ENDLESS)
            late = asyncio.create_task(engine.generate([CLS, 9], ENDLESS))
            await gate.reached()
            await gate.steps(3)
            ending = asyncio.create_task(engine.drain(0) if end == "drain" else engine.close())
            await asyncio.sleep(0)
            gate.open()
            await ending
            for stream in streams:
                chunks = [chunk async for chunk in stream]
                assert chunks[-1].finish_reason == "aborted"
                assert chunks[0].token_ids
            (output,) = (await whole).outputs
            assert output.finish_reason == "aborted"
            assert output.token_ids == expected[: len(output.token_ids)] != ()
            for task in (late, asyncio.ensure_future(anext(waiting))):
                with pytest.raises(EngineClosedError):
                    await task
            assert_all_free(llm)

    run(main())


def test_closing_ends_reading_jobs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    network = HeldNetwork(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        tasks = [asyncio.create_task(engine.embed(["some text"] * 40)) for _ in range(7)]
        await network.reached()
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        network.go_on.set()
        await closing
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineClosedError] * 7

    run(main())


def test_a_closed_engine_leaves_no_thread_and_the_llm_to_its_owner(llm: LLM) -> None:
    def new_threads() -> list[str]:
        started = {*threading.enumerate()} - before
        return [each.name for each in started if each.name.startswith("modernbert-decoder")]

    async def main() -> None:
        engine = AsyncLLM(llm)
        with pytest.raises(InputError, match="AsyncLLM"):
            AsyncLLM(llm)
        await asyncio.gather(engine.generate([CLS], SHORT), engine.embed("a text"))
        assert len(new_threads()) == 2
        await engine.close()
        await engine.close()
        await engine.drain(1)
        assert not new_threads()
        for request in (engine.generate([CLS], SHORT), engine.embed("a text")):
            with pytest.raises(EngineClosedError):
                await request
        assert len(llm.score("a text")) == 1
        assert generated(llm, [CLS], SHORT)
        async with AsyncLLM(llm) as again:
            del engine
            gc.collect()
            await again.generate([CLS], SHORT)
            assert llm._driver._carrier is not None

    before = {*threading.enumerate()}
    run(main())


def test_an_engine_that_is_dropped_gives_the_llm_back(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm, max_kv_bytes=1_000_000)
        limit = engine.stats().kv_bytes_limit
        await engine.generate([CLS], SHORT)
        del engine
        gc.collect()
        assert llm._driver._carrier is None
        async with AsyncLLM(llm) as again:
            assert again.stats().kv_bytes_limit > limit

    run(main())


def test_an_idle_engine_does_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    turn = engine_thread.EngineThread._turn

    def counted(self: Any) -> None:
        turns.append(threading.get_ident())
        turn(self)

    monkeypatch.setattr(engine_thread.EngineThread, "_turn", counted)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            await engine.generate([CLS], SHORT)
            engine._engine._executor.submit(turns.append, 0).result()  # only an idle thread takes this
            assert turns.pop() == 0
            num_turns = len(turns)
            assert num_turns <= 7
            await engine.generate([CLS], SHORT)
            assert len({*turns}) == 1, "another thread"

    run(main())


def test_closing_the_llm_itself_ends_requests_with_an_error(folder: Path) -> None:
    async def main() -> None:
        llm = LLM(folder, dtype="float32", threads=1, max_context=300)
        async with AsyncLLM(llm) as engine:
            task = asyncio.create_task(engine.generate([CLS], ENDLESS))
            stream = engine.stream([CLS], ENDLESS)
            await anext(stream)
            await asyncio.to_thread(llm.close)
            with pytest.raises(EngineClosedError):
                await task
            with pytest.raises(EngineClosedError):
                async for _ in stream:
                    pass
            with pytest.raises(EngineClosedError):
                await engine.generate([CLS], SHORT)
            with pytest.raises(EngineClosedError):
                await engine.score("a text")

    run(main())


PROGRAM = """
import asyncio
from modernbert_decoder import AsyncLLM, LLM, SamplingParams
engine = AsyncLLM(LLM({folder!r}, dtype="float32", threads=1, max_context=100))
async def main():
    stream = engine.stream([256], SamplingParams(max_tokens=50, ignore_eos=True))
    await anext(stream)
    await engine.embed("a text")
    return await engine.generate([256], SamplingParams(max_tokens=2, ignore_eos=True))
print(len(asyncio.run(main()).outputs[0].token_ids))
"""


def test_a_program_that_forgets_to_close_ends_all_the_same(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(folder=str(folder))],
        capture_output=True,
        text=True,
        timeout=DEADLOCK_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


# --- numbers and arguments ---


def test_the_numbers_are_those_of_the_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(llm, monkeypatch)

    async def main() -> None:
        engine = AsyncLLM(llm)
        async with gated(engine, gate):
            with held(engine):
                tasks = [asyncio.create_task(engine.generate([CLS, i, 5], SHORT)) for i in range(6)]
                await asyncio.sleep(0)
            await gate.reached()
            await gate.steps(2)
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_slots) == (4, 2, 4)
            assert stats.num_prompt_tokens == 4 * 3
            assert stats.num_generated_tokens == 4 * 2
            assert stats.kv_bytes_used == 4 * llm.cache.bytes_at(4)
            assert stats.kv_bytes_reserved == 4 * llm.cache.peak_bytes(3 + 5)
            assert stats.kv_bytes_limit == 4 * llm.cache.peak_bytes(300)
            assert stats.num_finished == {}
            gate.open()
            await asyncio.gather(*tasks)
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_reading) == (0, 0, 0)
            assert (stats.kv_bytes_used, stats.kv_bytes_reserved) == (0, 0)
            assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (18, 30)
            assert stats.num_finished == {"length": 6}
            assert (stats.prefix_hit_tokens, stats.num_drafted, stats.num_accepted) == (0, 0, 0)

    run(main())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"client": 3}, "client"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": "soon"}, "timeout"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(llm: LLM, options: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(InputError, match=message):
                engine.stream([CLS], SHORT, **options)
            with pytest.raises(InputError, match=message):
                await engine.generate([CLS], SHORT, **options)
            with pytest.raises(InputError, match=message):
                await engine.score("a text", **options)

    run(main())


@pytest.mark.parametrize("options", [{"max_waiting": -1}, {"max_waiting": 2.5}, {"max_kv_bytes": 0}])
def test_limits_that_cannot_be_used_are_refused(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        AsyncLLM(llm, **options)


@pytest.mark.parametrize("prompt", ["", [], [100_000], "x" * 2000])
def test_prompts_that_cannot_be_used_are_refused_at_once(llm: LLM, prompt: Any) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(InputError):
                engine.stream(prompt, SHORT)

    run(main())
