"""`python -m benchmarks.serving.soak`: our server under everything that clients do, for minutes.

Streams of 1, 8, 32 and 64 clients, each compared with the same request alone; then a flood past the queue,
clients that vanish, slow readers and malformed bodies, all at once. At the end every slot must be free, no
answer wrong and memory no larger than after the first phase. Prints one line per phase; exit code 1 if
anything was not as it should be.
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
from collections.abc import Mapping

from benchmarks.serving.load import Workload, ask, local_address, resident_bytes
from benchmarks.serving.servers import RunningServer, ours

# Their kernels give a request the same result whatever stands beside it.
DTYPES = ("float32", "w8a8")
CLIENTS = (1, 8, 32, 64)
_DIFFERENT_REQUESTS = 24
_FLAT = 1.15  # of resident memory
_QUEUE = 64


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

    async def phase(self, clients: int, seconds: float) -> str:
        """Streams of so many clients at a time."""
        deadline = time.perf_counter() + seconds
        before = sum(self.problems.values())

        async def client(index: int) -> int:
            draw = random.Random(index)
            count = 0
            while time.perf_counter() < deadline:
                number = draw.randrange(_DIFFERENT_REQUESTS)
                answer = await ask(self._address, self._path, self._body(number))
                if answer.error is not None:
                    self.problems[f"{clients} clients: {answer.error}"] += 1
                elif answer.text != self._expected[number]:
                    self.problems[f"{clients} clients: another text than alone"] += 1
                count += 1
            return count

        counts = await asyncio.gather(*(client(index) for index in range(clients)))
        new = sum(self.problems.values()) - before
        return f"{clients} clients: {sum(counts)} requests, {new} problems, {self.memory() / 1e6:.0f} MB"

    async def trouble(self, seconds: float) -> str:
        """A flood, vanishing clients, slow readers and nonsense beside eight well-behaved clients."""
        deadline = time.perf_counter() + seconds
        seen: Counter[str] = Counter()

        async def flood() -> None:
            while time.perf_counter() < deadline:
                burst = [ask(self._address, self._path, self._body(i % 24)) for i in range(3 * _QUEUE)]
                for answer in await asyncio.gather(*burst):
                    seen[answer.error or "answered"] += 1
                    if answer.error not in (None, "status 429"):
                        self.problems[f"flood: {answer.error}"] += 1
                await asyncio.sleep(0.5)

        async def raw(data: bytes, *, reads: int, pause: float) -> None:
            reader, writer = await asyncio.open_connection(*self._address)
            writer.write(data)
            for _ in range(reads):
                if not await reader.read(256):
                    break
                await asyncio.sleep(pause)
            writer.close()

        async def repeat(name: str, data: bytes, *, reads: int, pause: float) -> None:
            while time.perf_counter() < deadline:
                try:
                    await raw(data, reads=reads, pause=pause)
                    seen[name] += 1
                except OSError:
                    seen[f"{name}, cut off"] += 1
                await asyncio.sleep(0.02)

        stream = self._raw({**self._body(1), "max_tokens": 100})
        jobs = [flood()]
        jobs += [repeat("vanished", stream, reads=1, pause=0) for _ in range(4)]
        jobs += [repeat("read slowly", stream, reads=200, pause=0.02) for _ in range(4)]
        jobs += [repeat("half a body", stream[:-40], reads=0, pause=0) for _ in range(2)]
        jobs += [repeat("nonsense", b"\x00\xff" * 200, reads=1, pause=0) for _ in range(2)]
        jobs += [repeat("bad JSON", self._raw_bytes(b'{"model": NaN'), reads=1, pause=0) for _ in range(2)]
        jobs += [repeat("too large", self._raw_bytes(b" " * 5_000_000), reads=1, pause=0)]
        await asyncio.gather(*jobs)
        return f"trouble: {dict(seen)}, {self.memory() / 1e6:.0f} MB"

    def _raw(self, body: Mapping[str, object]) -> bytes:
        return self._raw_bytes(json.dumps(body).encode())

    def _raw_bytes(self, data: bytes) -> bytes:
        lines = (
            f"POST {self._path} HTTP/1.1",
            "Host: x",
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


async def soak(url: str, process_id: int, *, seconds: float) -> Counter[str]:
    """All phases; what was not as it should be."""
    run = Soak(url, process_id)
    await run.prepare()
    sizes = []
    for clients in (*CLIENTS, CLIENTS[-1]):
        print(await run.phase(clients, seconds), flush=True)
        sizes.append(run.memory())
    print(await run.trouble(seconds), flush=True)
    print(await run.phase(8, seconds / 4), flush=True)
    print(await run.end(), flush=True)
    if run.memory() > _FLAT * sizes[-2]:
        run.problems[f"memory grew from {sizes[-2]} to {run.memory()} bytes"] += 1
    return run.problems


def main(arguments: list[str] | None = None) -> int:
    """Starts a server and soaks it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="storyteller")
    parser.add_argument("--dtype", choices=DTYPES, default="w8a8")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the seven phases")
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
