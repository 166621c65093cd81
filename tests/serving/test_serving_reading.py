"""Embeddings, labels, scores, rankings and tokens over HTTP are the engine's."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from servers import RunningServer

from checkpoints import CLS, SEP
from modernbert_decoder.engine.llm import LLM

TEXTS = ["a cat", "two dogs bark", "", "\N{SNOWMAN}"]


@pytest.fixture(scope="module")
def classifier(folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(folders["labels"], dtype="float32") as llm:
        yield llm


def test_embeddings_are_the_engines_in_both_encodings(client: openai.OpenAI, alone: LLM) -> None:
    expected = alone.embed(TEXTS)
    for encoding in ("float", "base64"):
        reply = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=encoding)  # type: ignore[call-overload]
        vectors = [
            np.frombuffer(base64.b64decode(each.embedding), "<f4")
            if isinstance(each.embedding, str)
            else np.float32(each.embedding)
            for each in reply.data
        ]
        np.testing.assert_allclose(np.stack(vectors), expected, atol=1e-6)
        assert reply.usage.prompt_tokens == sum(len(text.encode()) + 2 for text in TEXTS)


def test_openais_client_decodes_its_own_default_encoding(client: openai.OpenAI, alone: LLM) -> None:
    reply = client.embeddings.create(model="tiny", input="a cat", dimensions=64)
    np.testing.assert_allclose(np.float32(reply.data[0].embedding), alone.embed("a cat")[0], atol=1e-6)


@pytest.mark.parametrize("given", ["a cat", [CLS, 65, SEP], [[CLS, 65], [66]], ["x"]], ids=str)
def test_every_form_of_input_is_taken(server: RunningServer, alone: LLM, given: Any) -> None:
    reply = server.post("/v1/embeddings", {"model": "tiny", "input": given, "pooling": "mean"}).json()
    vectors = [each["embedding"] for each in reply["data"]]
    np.testing.assert_allclose(vectors, alone.embed(given, pooling="mean"), atol=1e-6)


def test_a_bare_model_embeds_and_vectors_may_keep_their_length(server: RunningServer) -> None:
    reply = server.post("/v1/embeddings", {"model": "bare", "input": "a", "normalize": False}).json()
    assert abs(np.linalg.norm(reply["data"][0]["embedding"]) - 1) > 0.01


def test_classify_gives_labels_and_probabilities(server: RunningServer, classifier: LLM) -> None:
    pairs = [{"text": "a", "text_pair": "b"}, {"text": "c", "text_pair": ""}]
    for given, texts in (
        (TEXTS, TEXTS),
        (pairs, [("a", "b"), ("c", "")]),
        ([CLS, 70, SEP], [[CLS, 70, SEP]]),
    ):
        reply = server.post("/v1/classify", {"model": "labels", "input": given}).json()
        expected = classifier.classify(texts)
        assert [each["label"] for each in reply["data"]] == [each.label for each in expected]
        for each, own in zip(reply["data"], expected, strict=True):
            assert each["probs"] == pytest.approx(own.probabilities, abs=1e-6)
            assert each["labels"] == ["calm", "angry", "glad"]
            assert each["num_classes"] == 3
        assert reply["usage"]["prompt_tokens"] == sum(own.num_tokens for own in expected)


def test_long_texts_are_cut_only_on_request(server: RunningServer) -> None:
    body = {"model": "labels", "input": "a" * 50, "max_length": 20}
    refused = server.post("/v1/classify", body)
    assert refused.status_code == 400
    assert "50" in refused.json()["error"]["message"] or "52" in refused.json()["error"]["message"]
    cut = server.post("/v1/classify", {**body, "truncate": True}).json()
    assert cut["data"][0]["num_tokens"] == 20


def test_scores_of_texts_are_the_engines(server: RunningServer, alone: LLM) -> None:
    texts = ["Once upon", "a"]
    reply = server.post("/v1/score", {"model": "tiny", "input": texts, "return_tokens": True}).json()
    for each, own in zip(reply["data"], alone.score(texts), strict=True):
        assert each["score"] == pytest.approx(own.total_logprob, abs=1e-4)
        assert each["perplexity"] == pytest.approx(own.perplexity, rel=1e-4)
        assert each["bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=1e-4)
        assert [token["token_id"] for token in each["tokens"]] == list(own.token_ids)
        assert each["tokens"][0]["logprob"] is None
        assert [token["logprob"] for token in each["tokens"][1:]] == pytest.approx(own.logprobs, abs=1e-5)


def test_a_text_longer_than_the_context_is_scored_with_a_stride(server: RunningServer, alone: LLM) -> None:
    text = "ab " * 1000
    refused = server.post("/v1/score", {"model": "tiny", "input": text})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stride")
    reply = server.post("/v1/score", {"model": "tiny", "input": text, "stride": 1024}).json()
    (own,) = alone.score([text], stride=1024)
    assert reply["data"][0]["score"] == pytest.approx(own.total_logprob, rel=1e-5)


def test_continuations_are_scored_as_they_are_ranked(server: RunningServer, alone: LLM) -> None:
    pairs = {"text_1": ["Once", "He said"], "text_2": [" upon a time", " nothing"], "normalization": "token"}
    reply = server.post("/v1/score", {"model": "tiny", **pairs}).json()
    for each, first, second in zip(reply["data"], pairs["text_1"], pairs["text_2"], strict=True):
        (own,) = alone.rank(first, [second], normalization="token")
        assert each["score"] == pytest.approx(own.score, abs=1e-4)
        assert each["num_tokens"] == own.num_tokens
    one = server.post("/v1/score", {"model": "tiny", "text_1": "Once", "text_2": [" b", " a"]}).json()
    ranked = {each.candidate: each.score for each in alone.rank("Once", [" b", " a"])}
    assert [each["score"] for each in one["data"]] == pytest.approx([ranked[" b"], ranked[" a"]], abs=1e-4)


def test_rank_puts_the_likeliest_first(server: RunningServer, alone: LLM) -> None:
    body = {"text": "Once", "candidates": [" upon", " never", "!"], "normalization": "byte"}
    reply = server.post("/v1/rank", {"model": "tiny", **body}).json()
    expected = alone.rank(**body)  # type: ignore[arg-type]
    assert [each["candidate"] for each in reply["data"]] == [each.candidate for each in expected]
    assert [each["score"] for each in reply["data"]] == pytest.approx(
        [each.score for each in expected], abs=1e-4
    )


def test_tokens_go_back_to_their_text(server: RunningServer) -> None:
    reply = server.post(
        "/tokenize", {"model": "tiny", "prompt": "h\N{SNOWMAN}", "return_token_strs": True}
    ).json()
    assert reply["tokens"] == [CLS, *"h\N{SNOWMAN}".encode()]
    assert reply["token_strs"] == ["[CLS]", "h", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"]
    assert (reply["count"], reply["max_model_len"]) == (5, 2048)
    bare = server.post("/tokenize", {"prompt": "hi", "add_special_tokens": False}).json()
    assert bare["tokens"] == [*b"hi"]
    assert bare["token_strs"] is None
    back = server.post("/detokenize", {"tokens": reply["tokens"]}).json()
    assert back["prompt"] == "[CLS]h\N{SNOWMAN}"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": "a", "dimensions": 32}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": [999]}, "input"),
        ("/v1/embeddings", {"input": "a", "max_length": 5000}, "max_length"),
        ("/v1/score", {}, "input"),
        ("/v1/score", {"input": "a", "text_1": "b"}, "input"),
        ("/v1/score", {"text_1": "b"}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ""}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["the model", ""]}, "text_2"),
        ("/v1/score", {"text_1": "a ", "text_2": ["b", ""]}, "text_2"),
        ("/v1/score", {"text_1": "model " * 500, "text_2": ["model", "input"]}, "text_1"),
        ("/v1/score", {"input": "a", "normalization": "byte"}, "normalization"),
        ("/v1/rank", {"text": "a", "candidates": []}, "candidates"),
        ("/v1/rank", {"text": "model " * 500, "candidates": ["model"]}, "text"),
        ("/v1/rank", {"text": "a", "candidates": ["b"], "unconditional_text": "x"}, "unconditional_text"),
        ("/v1/classify", {"input": "a"}, "model"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_with_its_parameter(
    server: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    response = server.post(path, {"model": "tiny", **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("candidate", ["the model", "text", "nothing known"])
def test_a_candidate_that_adds_nothing_is_at_fault_whatever_it_says(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, candidate: str
) -> None:
    tokenizer = server.engine("tiny").llm.tokenizer
    encode = tokenizer.encode_continuations

    def adding_nothing(text: str, continuations: Any) -> Any:
        ids = encode(text, continuations)
        return dataclasses.replace(ids, tails=[ids.own for _ in continuations])

    monkeypatch.setattr(tokenizer, "encode_continuations", adding_nothing)
    for path, body, param in (
        ("/v1/rank", {"text": "Once", "candidates": [candidate]}, "candidates"),
        ("/v1/score", {"text_1": "Once", "text_2": candidate}, "text_2"),
    ):
        response = server.post(path, {"model": "tiny", **body})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert "adds nothing to the text's tokens" in error["message"]
