"""What engines are opened with holds over HTTP: drafts, memory, adapters; and one that hangs shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import Gate, RunningServer, metric, running, until

from adapter_files import write_adapter
from checkpoints import tiny_architecture, write_checkpoint
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.errors import InputError
from modernbert_decoder.serving.models import Registry, State, opener
from modernbert_decoder.serving.settings import EngineSettings, ModelSource, parse_models

PROMPTS = ["Once upon a time", "abcabcabcabc", "\N{SNOWMAN}", "a" * 300]


def texts(server: RunningServer, model: str, **settings: Any) -> list[str]:
    reply = server.post("/v1/completions", {"model": model, "prompt": PROMPTS, "max_tokens": 30, **settings})
    assert reply.status_code == 200, reply.text
    return [choice["text"] for choice in reply.json()["choices"]]


def expected(llm: LLM, **settings: Any) -> list[str]:
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=30, **settings))
    return [output.outputs[0].text for output in outputs]


def failure(sources: Sequence[ModelSource], settings: EngineSettings) -> str:
    """Why a server with these models ends before it is ready."""

    async def load() -> str:
        registry = Registry(sources, opener(settings))
        await registry.load()
        assert registry.state is State.FAILED
        await registry.close()
        return str(registry.failure)

    return asyncio.run(load())


# a model that drafts


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with the vocabulary of "tiny"."""
    architecture = tiny_architecture(
        num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=1
    )
    return write_checkpoint(tmp_path_factory.mktemp("small") / "small", architecture, seed=9)


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_greedy_completions_are_the_same_with_a_model_that_drafts(
    folders: dict[str, Path], small: Path, alone: LLM, name: str
) -> None:
    draft = {"small": small, "tiny": folders["tiny"]}[name]
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    with running([source], engine=EngineSettings(draft=str(draft))) as server:
        found = [
            server.post(
                "/v1/completions",
                {"model": "tiny", "prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True},
            ).json()["choices"][0]["text"]
            for prompt in PROMPTS
        ]
        assert found == expected(alone, temperature=0, ignore_eos=True)
        assert metric(server, 'mbd_drafted_tokens_total{model="tiny"}') > 0
        # The same model guesses right unless its rounding interferes, another random one hardly ever.
        assert (metric(server, 'mbd_accepted_tokens_total{model="tiny"}') > 0) >= (name == "tiny")
        assert texts(server, "tiny", temperature=0, ignore_eos=True) == found


def test_a_model_with_other_tokens_cannot_draft(folders: dict[str, Path]) -> None:
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    assert "another vocabulary" in failure([source], EngineSettings(draft="storyteller"))


# memory


@pytest.fixture(scope="module")
def narrow(folders: dict[str, Path]) -> Iterator[RunningServer]:
    """A server whose running requests may have the keys and values of some 600 tokens."""
    with LLM(folders["tiny"], dtype="float32") as llm:
        limit = llm.cache.peak_bytes(600)
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    with running([source], engine=EngineSettings(kv_bytes=limit)) as server:
        yield server


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "ab", "max_tokens": 700},
        {"prompt": "a" * 700, "max_tokens": 1},
        {"prompt": "ab", "max_tokens": 200, "n": 8, "seed": 1},
        {"prompt": ["ab", "a" * 700], "max_tokens": 1},
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_can_never_fit_the_memory_is_refused(
    narrow: RunningServer, body: dict[str, Any], is_streamed: bool
) -> None:
    response = narrow.post("/v1/completions", {"model": "tiny", "stream": is_streamed, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert "bytes of keys and values" in error["message"]
    assert error["param"] in ("prompt", "max_tokens", "n")
    assert narrow.until_idle("tiny").kv_bytes_reserved == 0


def test_requests_that_do_not_fit_together_wait_for_each_other(narrow: RunningServer) -> None:
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
    most = 0
    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(narrow.post, "/v1/completions", body) for _ in range(6)]
        while not all(each.done() for each in replies):
            most = max(most, narrow.stats("tiny").num_running)
    assert {each.result().status_code for each in replies} == {200}
    assert len({each.result().json()["choices"][0]["text"] for each in replies}) == 1
    assert 0 < most < 6


@pytest.mark.parametrize("size", [0, 1 << 26])
def test_a_prompt_that_comes_again_is_found_and_answered_alike(folders: dict[str, Path], size: int) -> None:
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    body = {"model": "tiny", "prompt": "abc" * 100, "max_tokens": 20, "temperature": 0, "logprobs": 1}
    with running([source], engine=EngineSettings(prefix_cache_bytes=size)) as server:
        first, second = (server.post("/v1/completions", body).json()["choices"] for _ in range(2))
        assert first == second
        found = metric(server, 'mbd_prefix_hit_tokens_total{model="tiny"}')
    assert (found > 200) is bool(size)


# adapters


@pytest.fixture(scope="module")
def adapter(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "tales", folders["tiny"], seed=3, scale=2.0)


def test_an_adapter_is_a_model_of_its_own_beside_the_one_it_is_for(
    folders: dict[str, Path], adapter: Path, alone: LLM
) -> None:
    sources = parse_models([f"tiny={folders['tiny']}:float32"], [f"tales={adapter}"])
    with running(sources) as server, LLM(folders["tiny"], dtype="float32", adapter=adapter) as adapted:
        cards = server.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), ("tales", "tiny")]
        for model, llm in (("tales", adapted), ("tiny", alone)):
            assert texts(server, model, temperature=0) == expected(llm, temperature=0)
        assert texts(server, "tales", temperature=0) != texts(server, "tiny", temperature=0)
        without_name = server.post("/tokenize", {"prompt": "a"})
        assert without_name.status_code == 200


def test_an_adapter_that_does_not_fit_ends_the_server(folders: dict[str, Path], adapter: Path) -> None:
    sources = parse_models(["storyteller:float32"], [f"tales={adapter}"])
    assert "cannot be merged" in failure(sources, EngineSettings())


def test_adapters_are_spelled_name_model_folder() -> None:
    first, second, both = parse_models(["a=x:int8", "b=y"], ["m=b=folder", "n=a=odd=folder"])[1:]
    assert first == ModelSource("b", "y")
    assert second == ModelSource("m", "y", None, adapter="folder", parent="b")
    assert both == ModelSource("n", "x", "int8", adapter="odd=folder", parent="a")
    (_, only) = parse_models(["a=x"], ["m=odd=folder"])
    assert only == ModelSource("m", "x", None, adapter="odd=folder", parent="a")


@pytest.mark.parametrize(
    ("models", "adapter_spelling", "words"),
    [
        (["a=x", "b=y"], "m=folder", "say which of them"),
        (["a=x"], "m", "there is no folder"),
        (["a=x"], "m=", "there is no folder"),
        (["a=x"], "m=a=", "there is no folder"),
        (["a=x"], "=folder", "cannot be served under the name"),
        (["a=x"], "a b=folder", "cannot be served under the name"),
        (["a=x"], "a=folder", "2 models are called 'a'"),
    ],
)
def test_adapters_that_are_not_clear_are_refused(
    models: list[str], adapter_spelling: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        parse_models(models, [adapter_spelling])


# an engine that hangs


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/score"])
def test_a_server_is_not_ready_while_a_step_does_not_end(folders: dict[str, Path], path: str) -> None:
    sources = [ModelSource(name, str(folders["tiny"]), "float32") for name in ("tiny", "other")]
    with running(sources, step_timeout=0.2) as server, ThreadPoolExecutor(1) as pool:
        gate = Gate(server.engine("tiny").llm, "read" if path == "/v1/score" else "step")
        gate.is_open.clear()
        try:
            field = "input" if path == "/v1/score" else "prompt"
            answer = pool.submit(server.post, path, {"model": "tiny", field: "abc"})
            until(lambda: server.get("/ready").status_code == 503, server)
            told = server.get("/ready").json()
            assert told["status"] == "stalled"
            assert "tiny has been running" in told["reason"]
            assert "other" not in told["reason"]
            assert server.get("/health").status_code == 200
            # The other model is served meanwhile.
            assert server.post(path, {"model": "other", field: "abc"}).status_code == 200
        finally:
            gate.is_open.set()
        assert answer.result().status_code == 200
        until(lambda: server.get("/ready").status_code == 200, server)
        assert server.get("/ready").json()["reason"] is None


def test_an_idle_engine_is_ready_however_long_it_has_been_idle(folders: dict[str, Path]) -> None:
    source = ModelSource("tiny", str(folders["tiny"]), "float32")
    with running([source], step_timeout=0.001) as server:
        server.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3})
        server.until_idle("tiny")
        until(lambda: server.engine("tiny").step_seconds == 0, server)
        ended = time.monotonic()
        until(lambda: time.monotonic() > ended + 0.01, server)
        assert server.get("/ready").status_code == 200
