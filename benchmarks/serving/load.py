"""Clients that keep a server busy for some time, and what they see: `python -m benchmarks.serving.load URL`.

Works with every server that has OpenAI's /v1/completions. The client is a few lines on plain sockets, because
it shares the processors with the server it measures. Only addresses of this machine are taken. Standard
library only.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Of prompts in words of about a token and a half, and of completions in tokens: drawn for every request.
PROMPT_WORDS = (8, 32, 64, 128, 256)
OUTPUT_TOKENS = (16, 32, 64, 128)
_SYLLABLES = ("an", "be", "co", "da", "er", "fi", "go", "hi", "in", "ja", "ke", "lo", "mi", "no", "or", "pa")
_LONGEST_SECONDS = 3600
_RSS_SECONDS = 1.0


@dataclass(frozen=True)
class Workload:
    """What clients ask for.

    Attributes:
        prefix_words: words that all prompts begin with.
        prompt_words: further words, one of these numbers for each request.
        output_tokens: likewise.
        extra: fields of every request.
        salt: another one makes other prompts, which no cache has seen; the shared beginning stays.
    """

    prefix_words: int = 0
    prompt_words: Sequence[int] = PROMPT_WORDS
    output_tokens: Sequence[int] = OUTPUT_TOKENS
    extra: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "ignore_eos": True})
    salt: str = ""

    def request(self, client: int, number: int) -> dict[str, Any]:
        """The same for every server."""
        draw = random.Random(f"{self.salt}/{client}/{number}")
        prefix = words(random.Random("prefix"), self.prefix_words)
        prompt = prefix + words(draw, draw.choice(self.prompt_words))
        return {
            "prompt": prompt,
            "max_tokens": draw.choice(self.output_tokens),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


def words(draw: random.Random, count: int) -> str:
    """So many words with a space in front of each.

    >>> len(words(random.Random(1), 3).split())
    3
    """
    return "".join(" " + "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(count))


@dataclass
class Answer:
    """One request as its client saw it; times are seconds from its beginning.

    Attributes:
        arrivals: of every chunk that had text.
        text: of all chunks.
        error: what went wrong, if anything did.
    """

    began: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class LoadResult:
    """One server under one number of clients; times in seconds.

    Attributes:
        errors: message and how often.
        first_token: 50th and 95th percentile of the time to the first token.
        between: the same of the time between chunks.
        rss: resident bytes of the server's process over time, if it was watched.
    """

    clients: int
    seconds: float
    requests: int
    errors: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float
    first_token: tuple[float, float]
    between: tuple[float, float]
    rss: list[int]


async def ask(address: tuple[str, int], path: str, body: Mapping[str, Any]) -> Answer:
    """One streamed completion on a connection of its own."""
    answer = Answer(time.perf_counter())
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    try:
        transport, reply = await loop.create_connection(
            lambda: _Reply(answer, loop.create_future()), *address
        )
    except OSError as error:
        answer.error = type(error).__name__
        return answer
    try:
        transport.write(head.encode() + data)
        await reply.ended
    finally:
        transport.close()
    return answer


class _Reply(asyncio.Protocol):
    """Reads an answer's lines as they come; sizes of HTTP's own chunks are lines of their own and skipped.

    Attributes:
        ended: done when the answer has come to its end, or its connection.
    """

    def __init__(self, answer: Answer, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self._answer = answer
        self._rest = b""
        self._has_status = self._is_done = False

    def data_received(self, data: bytes) -> None:
        """A part of the answer, whole lines or not."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._has_status:
                self._has_status = True
                status = line.split()
                if len(status) < 2 or status[1] != b"200":
                    self._answer.error = f"status {status[1].decode() if len(status) > 1 else 'missing'}"
            elif self._answer.error is None and line.startswith(b"data: "):
                if line.startswith(b"data: [DONE]"):
                    self._is_done = True
                else:
                    self._add(json.loads(line[6:]))
        if self._answer.error is not None:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """The answer's end, or its early end."""
        answer = self._answer
        if answer.error is None:
            if exc is not None:
                answer.error = type(exc).__name__
            elif not self._has_status:
                answer.error = "status missing"
            elif not self._is_done:
                answer.error = "the stream broke off"
        if not answer.completion_tokens:  # a server that does not count: it sends a chunk per token
            answer.completion_tokens = len(answer.arrivals)
        self._end()

    def _add(self, value: dict[str, Any]) -> None:
        answer = self._answer
        if "error" in value:
            answer.error = str(value["error"].get("code") or value["error"].get("message"))
            return
        if value.get("usage"):
            answer.prompt_tokens = value["usage"]["prompt_tokens"]
            answer.completion_tokens = value["usage"]["completion_tokens"]
        choices = value["choices"]
        if not choices:
            return
        self._is_done = self._is_done or any(choice.get("finish_reason") for choice in choices)
        text = choices[0].get("text", "")
        if text or not answer.arrivals:
            answer.arrivals.append(time.perf_counter() - answer.began)
            answer.text += text

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def _client(
    number: int, address: tuple[str, int], path: str, model: str, workload: Workload, deadline: float
) -> list[Answer]:
    """Asks one request after the other until time is up; the last one is finished."""
    answers: list[Answer] = []
    while time.perf_counter() < deadline:
        body = {"model": model, **workload.request(number, len(answers))}
        answers.append(await ask(address, path, body))
        if answers[-1].error is not None:
            await asyncio.sleep(0.05)  # an error that comes at once is not to be asked for without end
    return answers


async def _watch(process_id: int | None, samples: list[int]) -> None:
    while process_id is not None:
        samples.append(resident_bytes(process_id))
        await asyncio.sleep(_RSS_SECONDS)


def resident_bytes(process_id: int) -> int:
    """Of a process; 0 where the system does not tell."""
    status = Path(f"/proc/{process_id}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


async def run_load(
    url: str,
    *,
    model: str,
    clients: int,
    seconds: float,
    workload: Workload,
    process_id: int | None = None,
) -> LoadResult:
    """Keeps `clients` requests running for `seconds`.

    Raises:
        ValueError: the address is not one of this machine, or the time is too long.
    """
    address, path = local_address(url)
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise ValueError(f"seconds must be at most {_LONGEST_SECONDS}, got {seconds}")
    samples: list[int] = []
    watching = asyncio.ensure_future(_watch(process_id, samples))
    began = time.perf_counter()
    runs = [_client(number, address, path, model, workload, began + seconds) for number in range(clients)]
    answers = [answer for each in await asyncio.gather(*runs) for answer in each]
    elapsed = time.perf_counter() - began
    watching.cancel()
    return summarized(answers, clients=clients, seconds=elapsed, rss=samples)


def local_address(url: str) -> tuple[tuple[str, int], str]:
    """Host and port, and the path of completions.

    Raises:
        ValueError: it is no loopback address.

    >>> local_address("http://127.0.0.1:8000")
    (('127.0.0.1', 8000), '/v1/completions')
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise ValueError(f"only servers of this machine are put under load, not {host}")
    return (host, parts.port or 80), parts.path.rstrip("/") + "/v1/completions"


def summarized(
    answers: Sequence[Answer], *, clients: int, seconds: float, rss: Sequence[int] = ()
) -> LoadResult:
    """What all clients saw.

    >>> good = Answer(0.0, [0.5, 0.6, 0.8], prompt_tokens=10, completion_tokens=3)
    >>> result = summarized([good, Answer(0.0, error="status 429")], clients=1, seconds=2.0)
    >>> result.tokens_per_second, result.errors, result.first_token[0]
    (1.5, {'status 429': 1}, 0.5)
    """
    good = [answer for answer in answers if answer.error is None]
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    gaps = [
        later - earlier
        for answer in good
        for earlier, later in zip(answer.arrivals, answer.arrivals[1:], strict=False)
    ]
    tokens = sum(answer.completion_tokens for answer in good)
    return LoadResult(
        clients=clients,
        seconds=seconds,
        requests=len(answers),
        errors=errors,
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        completion_tokens=tokens,
        tokens_per_second=tokens / seconds,
        first_token=percentiles([answer.arrivals[0] for answer in good if answer.arrivals]),
        between=percentiles(gaps),
        rss=list(rss),
    )


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 95th; zeros where there is nothing."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]


def main(arguments: list[str] | None = None) -> int:
    """One run against a server that is there already; prints JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.load", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("url", help="of a server on this machine, as http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prefix-words", type=int, default=0, help="that all prompts share")
    parser.add_argument("--extra", type=json.loads, help="JSON: fields of every request")
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    options = parser.parse_args(arguments)
    workload = Workload(prefix_words=options.prefix_words)
    if options.extra is not None:
        workload = Workload(prefix_words=options.prefix_words, extra=options.extra)
    result = asyncio.run(
        run_load(
            options.url,
            model=options.model,
            clients=options.clients,
            seconds=options.seconds,
            workload=workload,
            process_id=options.pid,
        )
    )
    print(json.dumps(asdict(result), indent=1))
    return 1 if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
