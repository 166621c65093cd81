"""`python -m benchmarks.serving.soak`: our server under everything that clients do, for minutes.

Streams of 1, 8, 32 and 64 clients, each compared with the same request alone; then, beside eight such
clients, a flood past the queue, clients that vanish, slow readers, and bodies that are cut off, malformed or
too large. Each of these must be answered as it deserves, no text may be another than alone, at the end every
slot must be free, and memory may not have grown since the first phase with most clients. Prints one line per
phase; exit code 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from benchmarks.serving.load import Workload, ask, local_address, resident_bytes
from benchmarks.serving.servers import RunningServer, ours

# The server is batch-invariant: in each, a request gets the same whatever stands beside it.
DTYPES = ("float32", "int8", "int4", "w8a8")
CLIENTS = (1, 8, 32, 64)
_WELL_BEHAVED = 8
_DIFFERENT_REQUESTS = 24
_FLAT = 1.15  # of resident memory
_QUEUE = 64
_BURST = 3 * _QUEUE
_TOO_LARGE = 5_000_000
_REFUSED = "status 429"
# How much longer a phase may take in which something has still to be seen.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Nuisance:
    """A client that is not as clients should be, and comes again and again.

    Attributes:
        name: as the report says it.
        data: what it sends.
        status: that it must be answered with, at least once, and otherwise only with 429; None: it leaves
            before there is an answer.
        reads: how often it reads before it leaves.
        pause: seconds between these.
        count: how many of them there are.
    """

    name: str
    data: bytes
    status: int | None
    reads: int = 1
    pause: float = 0.0
    count: int = 2

    async def once(self, address: tuple[str, int]) -> int | None:
        """Sends and reads; the status that came."""
        reader, writer = await asyncio.open_connection(*address)
        status: int | None = None
        try:
            writer.write(self.data)
            for number in range(self.reads):
                part = await reader.read(256)
                if number == 0 and part:
                    status = int(part.split(maxsplit=2)[1])
                if not part:
                    break
                await asyncio.sleep(self.pause)
        finally:
            writer.transport.abort()
        return status


class Soak:
    """One server and the answers that it must give."""

    def __init__(self, url: str, process_id: int) -> None:
        self._address, self._path = local_address(url)
        self._url = url
        self._process_id = process_id
        self._workload = Workload(prompt_words=(4, 16, 64, 200), output_tokens=(8, 32, 100))
        self._expected: dict[int, str] = {}
        self.problems: Counter[str] = Counter()

    def _body(self, number: int) -> dict[str, object]:
        how: dict[str, object] = {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}
        return {"model": "bench", **self._workload.request(0, number), **how}

    async def prepare(self) -> None:
        """Asks for every answer alone."""
        for number in range(_DIFFERENT_REQUESTS):
            answer = await ask(self._address, self._path, self._body(number))
            if answer.error is not None:
                raise RuntimeError(f"a request alone failed: {answer.error}")
            self._expected[number] = answer.text

    async def _ask(self, number: int, who: str, *, may_be_refused: bool) -> str:
        """One request, of which problems are noted; what came of it."""
        answer = await ask(self._address, self._path, self._body(number))
        if answer.error is None:
            if answer.text != self._expected[number]:
                self.problems[f"{who}: another text than alone"] += 1
            return "answered"
        if not (may_be_refused and answer.error == _REFUSED):
            self.problems[f"{who}: {answer.error}"] += 1
        return answer.error

    async def phase(self, clients: int, seconds: float, *, may_be_refused: bool = False) -> str:
        """Streams of so many clients at a time."""
        deadline = time.perf_counter() + seconds
        before = sum(self.problems.values())
        seen: Counter[str] = Counter()

        async def client(index: int) -> None:
            draw = random.Random(index)
            while time.perf_counter() < deadline:
                number = draw.randrange(_DIFFERENT_REQUESTS)
                outcome = await self._ask(number, f"{clients} clients", may_be_refused=may_be_refused)
                seen[outcome] += 1
                if outcome != "answered":
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(client(index) for index in range(clients)))
        new = sum(self.problems.values()) - before
        told = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
        return f"{clients} clients: {told}, {new} problems, {self.memory() / 1e6:.0f} MB"

    async def trouble(self, seconds: float) -> str:
        """A flood, vanishing clients, slow readers and nonsense beside eight well-behaved clients."""
        deadline = time.perf_counter() + seconds
        seen: Counter[str] = Counter()
        jobs: list[Awaitable[object]] = [self._flood(deadline, seen)]
        for each in self._nuisances():
            jobs += [self._repeat(each, deadline, seen) for _ in range(each.count)]
        well_behaved, *_ = await asyncio.gather(
            self.phase(_WELL_BEHAVED, seconds, may_be_refused=True), *jobs
        )
        wanted = [f"{each.name}: {each.status}" for each in self._nuisances()]
        for name in (*wanted, f"flood: {_REFUSED}"):
            if not seen[name]:
                self.problems[f"never seen: {name}"] += 1
        told = ", ".join(f"{name} x {count}" for name, count in sorted(seen.items()))
        return f"trouble: {told}; beside it {well_behaved}"

    def _nuisances(self) -> list[Nuisance]:
        stream = self._raw(json.dumps({**self._body(1), "max_tokens": 100}).encode())
        return [
            Nuisance("vanished", stream, 200, count=4),
            Nuisance("read slowly", stream, 200, reads=200, pause=0.02, count=4),
            Nuisance("half a body", stream[:-40], None, reads=0),
            Nuisance("no HTTP", b"\x16\x03\x01 hello\r\n\r\n", 400),
            Nuisance("bad JSON", self._raw(b'{"model": NaN'), 400),
            Nuisance("too large", self._raw(b" " * _TOO_LARGE), 413, count=1),
        ]

    async def _flood(self, deadline: float, seen: Counter[str]) -> None:
        while not _is_over(deadline, has_been_seen=bool(seen[f"flood: {_REFUSED}"])):
            numbers = [i % _DIFFERENT_REQUESTS for i in range(_BURST)]
            burst = [self._ask(number, "flood", may_be_refused=True) for number in numbers]
            for outcome in await asyncio.gather(*burst):
                seen[f"flood: {outcome}"] += 1
            await asyncio.sleep(0.5)

    async def _repeat(self, nuisance: Nuisance, deadline: float, seen: Counter[str]) -> None:
        wanted = f"{nuisance.name}: {nuisance.status}"
        while not _is_over(deadline, has_been_seen=nuisance.status is None or bool(seen[wanted])):
            try:
                status = await nuisance.once(self._address)
            except OSError:  # a connection that is closed while more is on its way to it
                seen[f"{nuisance.name}: cut off"] += 1
            else:
                seen[f"{nuisance.name}: {status}"] += 1
                if status not in (nuisance.status, 429):
                    self.problems[f"{nuisance.name}: {status}"] += 1
            await asyncio.sleep(0.02)

    def _raw(self, data: bytes) -> bytes:
        lines = (
            f"POST {self._path} HTTP/1.1",
            f"Host: {self._address[0]}",
            "Content-Type: application/json",
            "Connection: close",
            f"Content-Length: {len(data)}",
        )
        return "\r\n".join((*lines, "", "")).encode() + data

    async def end(self) -> str:
        """Waits until nothing runs, which must come soon."""
        names = ("mbd_requests_running", "mbd_requests_waiting", "mbd_readings", "mbd_kv_reserved_bytes")
        values: dict[str, float] = {}
        for _ in range(300):
            values = await asyncio.to_thread(self._metrics, names)
            if not any(values.values()):
                return f"end: everything is free, {self.memory() / 1e6:.0f} MB"
            await asyncio.sleep(0.1)
        self.problems[f"left over: {values}"] += 1
        return f"end: left over {values}"

    def _metrics(self, names: tuple[str, ...]) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return {
            line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)
        }

    def memory(self) -> int:
        """Resident bytes of the server."""
        return resident_bytes(self._process_id)


def _is_over(deadline: float, *, has_been_seen: bool) -> bool:
    """Whether a client stops: in time, or later where nobody has seen yet what has to be seen."""
    return time.perf_counter() >= deadline + (0 if has_been_seen else _PATIENCE_SECONDS)


async def soak(
    url: str,
    process_id: int,
    *,
    seconds: float,
    clients: Sequence[int] = CLIENTS,
    has_own_process: bool = True,
) -> Counter[str]:
    """All phases; what was not as it should be.

    Args:
        url: of the server, whose queue holds 64 requests and whose model is called `bench`.
        process_id: of the server.
        seconds: of each phase.
        clients: of the first phases; the last of them is repeated.
        has_own_process: whether the process is the server's alone, so that its memory must not grow.
    """
    run = Soak(url, process_id)
    await run.prepare()
    for count in clients:
        print(await run.phase(count, seconds), flush=True)
    full = run.memory()
    sizes: dict[str, int] = {}
    for name, work in (
        ("the second phase of most clients", run.phase(clients[-1], seconds)),
        ("trouble", run.trouble(seconds)),
        ("its aftermath", run.phase(_WELL_BEHAVED, seconds / 4)),
        ("the end", run.end()),
    ):
        print(await work, flush=True)
        sizes[name] = run.memory()
    for name, size in sizes.items():
        if has_own_process and size > _FLAT * full:
            run.problems[f"memory grew from {full} to {size} bytes by {name}"] += 1
    return run.problems


def main(arguments: list[str] | None = None) -> int:
    """Starts a server and soaks it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="storyteller")
    parser.add_argument("--dtype", choices=DTYPES, default="int8")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the six phases")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    setup = ours(
        options.model, options.dtype, threads=options.threads, options=("--max-waiting", str(_QUEUE))
    )
    with RunningServer(setup, threads=options.threads) as server:
        problems = asyncio.run(soak(server.url, server.process_id, seconds=options.seconds))
    for problem, count in problems.items():
        print(f"NOT AS IT SHOULD BE: {problem} ({count} times)")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
