"""Starting, stopping, keys, origins, health, metrics and logs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import httpx
import openai
import pytest
from click.testing import CliRunner
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from servers import RunningServer, events, metric, running

from modernbert_decoder.cli.serve import command
from modernbert_decoder.cli.serve import size as parse_size
from modernbert_decoder.engine.async_llm import AsyncLLM
from modernbert_decoder.errors import InputError
from modernbert_decoder.serving.access_log import ACCESS_LOGGER, LogFormatter
from modernbert_decoder.serving.auth import ApiKeys
from modernbert_decoder.serving.errors import ERROR_LOGGER
from modernbert_decoder.serving.models import EngineSettings, opener
from modernbert_decoder.serving.settings import ModelSource, ServerSettings, parse_models, read_api_keys

KEYS = ("first-key-0001", "second-key-0002")
ORIGIN = "https://example.org"
MBD = (sys.executable, "-m", "modernbert_decoder.cli")
LONG = {"model": "storyteller", "prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def locked(sources: tuple[ModelSource, ...]) -> Iterator[RunningServer]:
    """A server with two keys that pages of one origin may call."""
    with running(sources[:1], api_keys=KEYS, cors_origins=(ORIGIN,)) as started:
        yield started


# keys


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_the_api(locked: RunningServer, key: str) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer wrong-key-000",
        "Basic first-key-0001",
        "first-key-0001",
        "Bearer first-key-000",
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/tokenize", "/v1/completions", "/v1/nothing", "/PAGE/x", "//docs"]
)
def test_without_a_valid_key_nothing_is_told(locked: RunningServer, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = httpx.get(locked.url + path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/docs", "/openapi.json", "/health", "/ready"])
def test_what_holds_no_secret_needs_no_key(locked: RunningServer, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("modernbert_decoder.serving.auth.hmac.compare_digest", compare)
    keys = ApiKeys(lambda *_: None, keys=KEYS)  # type: ignore[arg-type, return-value]
    assert keys._is_valid(KEYS[0].encode())
    assert len(compared) == 2
    assert len({len(each) for pair in compared for each in pair}) == 1


def test_keys_come_from_a_file_and_bad_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\nfirst-key-0001\n  second-key-0002  \n")
    assert read_api_keys(path) == KEYS
    path.write_text("# none\n")
    with pytest.raises(InputError, match="holds no API key"):
        read_api_keys(path)
    with pytest.raises(InputError, match="cannot read"):
        read_api_keys(tmp_path / "missing")
    for key in ("short", "with a space", "na\u00efve-key"):
        with pytest.raises(InputError, match="at least 8 characters"):
            ServerSettings(models=parse_models(["storyteller"]), api_keys=(key,))


# who asks


def test_a_key_a_user_or_an_address_is_a_client_in_the_queue(
    locked: RunningServer, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = []
    for each in (locked, server):
        engine = each.engine("tiny")
        generate = engine.generate

        async def noting(*arguments: Any, _generate: Any = generate, **settings: Any) -> Any:
            clients.append(settings["client"])
            return await _generate(*arguments, **settings)

        monkeypatch.setattr(engine, "generate", noting)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}"}
        assert locked.post("/v1/completions", {**body, "user": "ann"}, headers=headers).status_code == 200
    server.post("/v1/completions", {**body, "user": "ann"})
    server.post("/v1/completions", body)
    assert all(client.startswith("key-") for client in clients[:2])
    assert len(set(clients[:2])) == 2
    assert clients[2:] == ["user-ann", "127.0.0.1"]


# browsers


def test_other_origins_are_let_in_only_when_asked_for(locked: RunningServer, server: RunningServer) -> None:
    ask = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = httpx.options(f"{locked.url}/v1/completions", headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    refused = httpx.get(f"{locked.url}/v1/models", headers={"Origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN  # or the page could not read why
    other = httpx.get(f"{locked.url}/health", headers={"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in other.headers
    closed = httpx.get(f"{server.url}/v1/models", headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in closed.headers


def test_page_and_documentation_load_nothing_from_elsewhere(server: RunningServer) -> None:
    for path in ("/", "/docs"):
        response = server.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert not re.search(r"https?://", policy)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"""(src|href)=["'](https?:)?//""", response.text)
        for name in re.findall(r"""(?:src|href)="([^"#]+)\"""", response.text):
            assert server.get(f"/{name}").status_code == 200, name
    assert server.get("/docs/start.js").headers["content-type"].startswith("text/javascript")


# health and metrics


def test_a_server_is_alive_before_it_is_ready(sources: tuple[ModelSource, ...]) -> None:
    is_allowed = threading.Event()
    open_model = opener(EngineSettings())

    def late(source: ModelSource) -> AsyncLLM:
        assert is_allowed.wait(60)
        return open_model(source)

    with running(sources[:1], open_model=late, is_awaited=False) as server:
        try:
            assert server.get("/health").status_code == 200
            starting = server.get("/ready")
            assert (starting.status_code, starting.json()["status"]) == (503, "starting")
            assert starting.json()["models"] == {"tiny": False}
            (card,) = server.get("/v1/models").json()["data"]
            assert (card["ready"], card["task"], card["capabilities"]) == (False, None, [])
            refused = server.post("/v1/completions", {"model": "tiny", "prompt": "a"})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        finally:
            is_allowed.set()


def test_metrics_count_requests_tokens_and_latencies(server: RunningServer) -> None:
    def numbers() -> list[float]:
        return [
            metric(server, 'mbd_requests_total{endpoint="/v1/completions",status="200"}'),
            metric(server, 'mbd_requests_total{endpoint="/v1/completions",status="404"}'),
            metric(server, 'mbd_generated_tokens_total{model="tiny"}'),
            metric(server, 'mbd_prompt_tokens_total{model="tiny"}'),
            metric(server, 'mbd_time_to_first_token_seconds_count{model="tiny"}'),
            metric(server, 'mbd_time_between_tokens_seconds_count{model="tiny"}'),
            metric(server, 'mbd_completions_total{model="tiny",reason="length"}'),
        ]

    before = numbers()
    body = {"model": "tiny", "prompt": "unheard of: qqq", "max_tokens": 6, "ignore_eos": True}
    assert server.post("/v1/completions", body).status_code == 200
    events(server.post("/v1/completions", {**body, "stream": True}))
    server.post("/v1/completions", {**body, "model": "none"})
    server.until_idle("tiny")
    after = numbers()
    assert [b - a for a, b in zip(before, after, strict=True)][:3] == [2, 1, 12]
    assert after[3] > before[3]
    assert after[4] - before[4] == 2
    assert after[5] - before[5] >= 2
    assert after[6] - before[6] == 2
    assert metric(server, 'mbd_slots{model="tiny"}') == 32
    assert metric(server, 'mbd_requests_running{model="tiny"}') == 0


def test_prometheus_parser_reads_the_metrics_with_the_type_they_are_sent_with(server: RunningServer) -> None:
    server.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2})
    response = server.get("/metrics")
    assert response.headers["content-type"] == CONTENT_TYPE_LATEST
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    kinds = {
        "mbd_requests": "counter",
        "mbd_generated_tokens": "counter",
        "mbd_time_to_first_token_seconds": "histogram",
        "mbd_kv_used_bytes": "gauge",
    }
    assert {name: families[name].type for name in kinds} == kinds
    assert all(family.documentation for family in families.values())
    models = {sample.labels["model"] for sample in families["mbd_slots"].samples}
    assert models == {"tiny", "labels", "bare", "chat", "storyteller", "exact"}
    buckets = [
        sample.value
        for sample in families["mbd_time_to_first_token_seconds"].samples
        if sample.name.endswith("_bucket") and sample.labels["model"] == "tiny"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] >= 1


def test_metrics_have_no_labels_that_clients_choose(server: RunningServer) -> None:
    server.get("/v1/secret-path")
    server.get("/v1/models/secret-model")
    server.post("/v1/completions", {"model": "secret-model", "prompt": "a"})
    assert "secret" not in server.get("/metrics").text


# logs


class Lines(logging.Handler):
    """Keeps every line in both formats."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._formatters = [LogFormatter(is_json=is_json) for is_json in (False, True)]

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [formatter.format(record) for formatter in self._formatters]


@pytest.fixture
def lines() -> Iterator[list[str]]:
    handler = Lines()
    loggers = [logging.getLogger(name) for name in (ACCESS_LOGGER, ERROR_LOGGER, "uvicorn", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler.lines
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_no_text_of_a_prompt_or_completion_is_ever_logged(
    server: RunningServer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "zxsecretxz"
    body = {"model": "tiny", "prompt": secret, "echo": True, "logprobs": 1, "max_tokens": 2}
    server.post("/v1/completions", body)
    events(server.post("/v1/completions", {**body, "stream": True}))
    server.post("/v1/completions", {**body, "stop": secret * 9, "temperature": 0})
    for wrong in ({"model": secret}, {"temperature": secret}, {secret: 1}, {"logit_bias": {secret: 1}}):
        server.post("/v1/completions", {**body, **wrong})
    httpx.post(f"{server.url}/v1/completions", content=secret, headers={"Content-Type": "application/json"})
    httpx.post(f"{server.url}/v1/completions?{secret}", content=secret, headers={"Content-Type": secret})
    server.get(f"/{secret}?{secret}")
    server.get(f"/v1/models/{secret}")
    for path in ("/v1/embeddings", "/v1/score"):
        server.post(path, {"model": "tiny", "input": secret})
    server.post("/v1/rank", {"model": "tiny", "text": secret, "candidates": [secret]})
    server.post("/tokenize", {"prompt": secret})
    server.get("/health", headers={"X-Forwarded-For": secret, "Host": secret})
    server.get(
        "/health", headers={"X-Forwarded-For": f"::1%{secret}", "Referer": secret, "User-Agent": secret}
    )
    server.post("/v1/chat/completions", {"model": "chat", "messages": [{"role": secret, "content": secret}]})

    def broken(prompt: Any, *_: Any, **__: Any) -> None:
        raise ZeroDivisionError(f"{prompt} {secret}")

    monkeypatch.setattr(server.engine("tiny"), "generate", broken)
    server.post("/v1/completions", body)
    assert sum('"message": "request"' in line for line in lines) >= 15
    assert any("ZeroDivisionError" in line for line in lines)
    assert not [line for line in lines if secret in line]


def test_a_log_line_tells_who_asked_for_what_and_how_it_went(server: RunningServer, lines: list[str]) -> None:
    body = {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 3,
        "ignore_eos": True,
        "user": "ann e",
        "stream": True,
    }
    response = server.post("/v1/completions", body)
    server.get("/health")  # one request later the line is certain to be there
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    (entry,) = [each for each in entries if each.get("request_id") == response.headers["x-request-id"]]
    known = (
        "client",
        "method",
        "endpoint",
        "status",
        "model",
        "stream",
        "prompt_tokens",
        "completion_tokens",
    )
    assert [entry[name] for name in known] == [
        "user-ann e",
        "POST",
        "/v1/completions",
        200,
        "tiny",
        True,
        4,
        3,
    ]
    assert entry["finish_reason"] == "length"
    assert 0 < entry["first_token_ms"] <= entry["ms"]
    text = next(line for line in lines if entry["request_id"] in line and not line.startswith("{"))
    assert 'client="user-ann e"' in text
    assert "\n" not in text


def test_the_same_requests_name_a_key_and_never_show_it(locked: RunningServer, lines: list[str]) -> None:
    httpx.get(f"{locked.url}/v1/models", headers={"Authorization": f"Bearer {KEYS[0]}"})
    locked.get("/health")
    assert any(" client=key-" in line for line in lines)
    assert not [line for line in lines if KEYS[0] in line]


# models and options


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("storyteller", ModelSource("storyteller", "storyteller")),
        ("storyteller:int4", ModelSource("storyteller:int4", "storyteller", "int4")),
        ("a=storyteller:w8a8", ModelSource("a", "storyteller", "w8a8")),
        ("jhu-clsp/ettin:int8", ModelSource("jhu-clsp/ettin:int8", "jhu-clsp/ettin", "int8")),
        ("x=/models/y:z", ModelSource("x", "/models/y:z")),
        ("/models/deep/ettin", ModelSource("ettin", "/models/deep/ettin")),
    ],
)
def test_models_are_spelled_name_model_dtype(spelling: str, expected: ModelSource) -> None:
    assert ModelSource.parse(spelling) == expected


@pytest.mark.parametrize("spelling", ["=storyteller", "a b=storyteller", "a=", ""])
def test_a_name_that_cannot_be_used_is_refused(spelling: str) -> None:
    with pytest.raises(InputError):
        ModelSource.parse(spelling)


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="2 models are called 'storyteller'"):
        parse_models(["storyteller", "storyteller"])


def test_several_dtypes_of_one_model_are_served_side_by_side() -> None:
    with running(parse_models(["storyteller:int4", "half=storyteller:w8a8"])) as server:
        dtypes = [model["dtype"] for model in server.get("/v1/models").json()["data"]]
        assert dtypes == ["int4 body, int8 vocabulary", "w8a8 body, int8 vocabulary"]
        for name in ("storyteller:int4", "half"):
            reply = server.post("/v1/completions", {"model": name, "prompt": "Once", "max_tokens": 2})
            assert reply.status_code == 200


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("2kB", 2000), ("1.5GiB", 3 * 2**29), ("4m", 4_000_000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_every_option_reaches_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServerSettings] = []
    monkeypatch.setattr("modernbert_decoder.serving.server.run", given.append)
    monkeypatch.setenv("MBD_API_KEY", "environment-key")
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS))
    options = {
        "--adapter": ["c=b=folder"],
        "--host": ["0.0.0.0"],
        "--port": ["81"],
        "--api-key-file": [str(keys)],
        "--allowed-host": ["one.example", "two.example"],
        "--cors-origin": [ORIGIN, "https://two.example"],
        "--max-body": ["2MiB"],
        "--max-waiting": ["17"],
        "--timeout": ["11.5"],
        "--step-timeout": ["7"],
        "--grace": ["3"],
        "--max-slots": ["5"],
        "--max-context": ["99"],
        "--kv-memory": ["3MB"],
        "--prefix-cache": ["1kB"],
        "--draft": ["lookup"],
        "--threads": ["1"],
        "--log-format": ["json"],
    }
    known = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert known == {*options, "--no-batch-invariant"}
    arguments = [word for name, values in options.items() for value in values for word in (name, value)]
    arguments += ["--no-batch-invariant", "a=storyteller:int4", "b=storyteller"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    settings = ServerSettings(
        models=parse_models(["a=storyteller:int4", "b=storyteller"], ["c=b=folder"]),
        host="0.0.0.0",
        port=81,
        api_keys=("environment-key", *KEYS),
        allowed_hosts=("one.example", "two.example"),
        cors_origins=(ORIGIN, "https://two.example"),
        max_body=2 * 2**20,
        timeout=11.5,
        step_timeout=7.0,
        grace=3.0,
        log_format="json",
        engine=EngineSettings(
            threads=1,
            max_slots=5,
            max_context=99,
            max_waiting=17,
            kv_bytes=3_000_000,
            prefix_cache_bytes=1000,
            draft="lookup",
            batch_invariant=False,
        ),
    )
    assert given == [settings]


def test_without_options_the_settings_are_their_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServerSettings] = []
    monkeypatch.setattr("modernbert_decoder.serving.server.run", given.append)
    monkeypatch.delenv("MBD_API_KEY", raising=False)
    assert CliRunner().invoke(command, ["storyteller"], catch_exceptions=False).exit_code == 0
    assert given == [ServerSettings(models=parse_models(["storyteller"]))]


def test_the_help_fits_a_screen() -> None:
    shown = CliRunner().invoke(command, ["--help"], terminal_width=80)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80


# the process


def start_process(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """`mbd serve`, and its address once it says so."""
    return start([*MBD, "serve", *arguments, "--port", "0"], **environment)


def start(command: Sequence[str], **environment: str) -> tuple[subprocess.Popen[str], str]:
    """A process that is a server, and its address once it says so."""
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert process.stderr is not None
    for line in process.stderr:
        match = re.search(r"listening on (http://[\d.:]+)", line)
        if match:
            return process, match[1]
    raise AssertionError("the server did not start")


def drained(stream: IO[str]) -> tuple[threading.Thread, io.StringIO]:
    """Reads what a process says, so that it never waits for us."""
    kept = io.StringIO()
    thread = threading.Thread(target=lambda: kept.write(stream.read()))
    thread.start()
    return thread, kept


def until_ready(url: str, status: str = "ready") -> None:
    for _ in range(20_000):
        if httpx.get(f"{url}/ready").json()["status"] == status:
            return
    raise AssertionError(f"it did not become {status}")


@pytest.mark.parametrize(
    ("number", "grace", "reason"),
    [(signal.SIGTERM, "0", "aborted"), (signal.SIGTERM, "60", "length"), (signal.SIGINT, "0", "aborted")],
    ids=str,
)
def test_a_signal_lets_streams_finish_or_ends_them_politely(
    number: signal.Signals, grace: str, reason: str
) -> None:
    process, url = start_process("storyteller", "--grace", grace, "--log-format", "json")
    assert process.stderr is not None
    reader, said = drained(process.stderr)
    try:
        until_ready(url)
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            assert next(lines).startswith("data: {")
            process.send_signal(number)
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == reason
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
        reader.join(60)
        process.stderr.close()
    entries = [json.loads(line) for line in said.getvalue().splitlines()]
    (entry,) = [each for each in entries if each.get("endpoint") == "/v1/completions"]
    assert entry["finish_reason"] == reason


# A server whose engine never comes back from a step.
STALLING = """
import threading
from modernbert_decoder.engine.driver import Driver
from modernbert_decoder.serving import server
from modernbert_decoder.serving.settings import ServerSettings, parse_models

Driver.step = lambda self: threading.Event().wait()
server._FAREWELL_SECONDS, server._CANCELLING_SECONDS = 0.5, 1.5
server.run(ServerSettings(models=parse_models(["storyteller"]), port=0, step_timeout=0.2, grace=0.0))
"""


# A server that cannot import either.
WITHOUT_PYTORCH = """
import sys

sys.modules.update(torch=None, transformers=None)
from modernbert_decoder.serving import server
from modernbert_decoder.serving.settings import ServerSettings, parse_models

server.run(ServerSettings(models=parse_models(["storyteller"]), port=0))
"""


def test_the_server_serves_without_pytorch() -> None:
    process, url = start([sys.executable, "-c", WITHOUT_PYTORCH])
    assert process.stderr is not None
    reader, said = drained(process.stderr)
    try:
        until_ready(url)
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": "Once", "max_tokens": 3, "ignore_eos": True}),
            ("/v1/completions", {"prompt": "Once", "structured_outputs": {"regex": "[ab]{3}"}}),
            ("/v1/embeddings", {"input": "Once"}),
            ("/v1/score", {"input": "Once"}),
        ]
        for path, body in bodies:
            response = httpx.post(url + path, json={"model": "storyteller", **body}, timeout=60)
            assert response.status_code == 200, response.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, said.getvalue()
    finally:
        process.kill()
        process.wait(60)
        reader.join(60)
        process.stderr.close()


def test_a_step_that_never_ends_does_not_keep_the_process_from_ending() -> None:
    process, url = start([sys.executable, "-c", STALLING])
    assert process.stderr is not None
    reader, said = drained(process.stderr)
    try:
        until_ready(url)
        asking = threading.Thread(target=expect_no_answer, args=(url,))
        asking.start()
        until_ready(url, "stalled")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        asking.join(60)
    finally:
        process.kill()
        process.wait(60)
        reader.join(60)
        process.stderr.close()
    assert "a step of storyteller does not end; the process ends without it" in said.getvalue()
    assert "endpoint=/v1/completions" in said.getvalue()


def expect_no_answer(url: str) -> None:
    with suppress(httpx.HTTPError):
        assert httpx.post(f"{url}/v1/completions", json=LONG, timeout=60).status_code >= 500


def test_a_model_that_is_not_there_ends_the_process_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*MBD, "serve", str(tmp_path), "--port", "0"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("mbd: error: ")


def test_an_address_in_use_is_told(server: RunningServer) -> None:
    done = subprocess.run(
        [*MBD, "serve", "storyteller", "--port", str(server.address[1])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot listen on 127.0.0.1" in done.stderr


def test_the_key_of_the_environment_is_asked_for() -> None:
    process, url = start_process("storyteller", MBD_API_KEY="environment-key")
    assert process.stderr is not None
    reader, _ = drained(process.stderr)
    try:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer environment-key"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reader.join(60)
        process.stderr.close()
