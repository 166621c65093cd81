"""The engine's labels, vectors and scores against the PyTorch wing and upstream, padded and in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.modernbert_decoder import modeling_modernbert_decoder as upstream

import modernbert_decoder.pytorch as wing
from checkpoints import random_ids, relative_error, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.llm import LLM

# What the project promises for float32, relative to the largest value.
TOLERANCE = 1e-4
# Past the window of 64, past a piece of 256, past the batch of 300 tokens, and equal ones among them.
LENGTHS = (1, 2, 12, 12, 13, 64, 65, 130, 256, 257, 299, 640)
HEADS: dict[str, dict[str, Any]] = {
    "single label": {"id2label": {i: f"label {i}" for i in range(5)}},
    "several labels": {
        "id2label": {i: f"label {i}" for i in range(4)},
        "problem_type": "multi_label_classification",
    },
    "regression": {"id2label": {0: "grade"}},
    "biases": {"classifier_bias": True, "norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "another activation": {"classifier_activation": "silu"},
}
CLASSES: dict[str, Any] = {"wing": wing, "upstream": upstream}


def padded(batch: list[list[int]], padding: int) -> dict[str, torch.Tensor]:
    """Ids and mask as transformers' tokenizers pad them, on the right."""
    longest = max(map(len, batch))
    rows = [ids + [padding] * (longest - len(ids)) for ids in batch]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def opened(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", threads=1, max_context=700, max_batch_tokens=300)


@pytest.mark.parametrize("reference", CLASSES)
@pytest.mark.parametrize("name", HEADS)
def test_labels_equal_those_of_a_padded_batch(tmp_path: Path, name: str, reference: str) -> None:
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION, **HEADS[name])
    folder = write_checkpoint(tmp_path, architecture)
    batch = [random_ids(architecture, length, seed=i) for i, length in enumerate(LENGTHS)]
    batch = [[token_id if token_id != 258 else 0 for token_id in ids] for ids in batch]
    model = CLASSES[reference].ModernBertDecoderForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(**padded(batch, 258)).logits.numpy()
    with opened(folder) as llm:
        outputs = llm.classify(batch)
    assert relative_error(np.array([output.logits for output in outputs]), expected) < TOLERANCE
    assert [output.label for output in outputs] == [architecture.id2label[i] for i in expected.argmax(1)]
    if name == "single label":
        probabilities = torch.softmax(torch.tensor(expected), 1).numpy()
    elif name == "several labels":
        probabilities = torch.sigmoid(torch.tensor(expected)).numpy()
    else:
        return
    assert relative_error(np.array([output.probabilities for output in outputs]), probabilities) < TOLERANCE


@pytest.mark.parametrize("reference", CLASSES)
@pytest.mark.parametrize("head", Head)
def test_states_and_vectors_equal_the_last_hidden_state(tmp_path: Path, head: Head, reference: str) -> None:
    architecture = tiny_architecture(head=head)
    folder = write_checkpoint(tmp_path, architecture)
    batch = [random_ids(architecture, length, seed=i) for i, length in enumerate(LENGTHS)]
    batch = [[token_id if token_id != 258 else 0 for token_id in ids] for ids in batch]
    module = CLASSES[reference]
    name = {
        Head.CAUSAL_LM: "ModernBertDecoderForCausalLM",
        Head.SEQUENCE_CLASSIFICATION: "ModernBertDecoderForSequenceClassification",
        Head.NONE: "ModernBertDecoderModel",
    }[head]
    model = getattr(module, name).from_pretrained(folder).eval()
    with torch.no_grad():
        states = getattr(model, "model", model)(**padded(batch, 258)).last_hidden_state.numpy()
    with opened(folder) as llm:
        ours = llm.hidden_states(batch)
        last = llm.embed(batch, normalize=False)
        mean = llm.embed(batch, pooling="mean", normalize=False)
    for i, ids in enumerate(batch):
        expected = states[i, : len(ids)]
        assert relative_error(ours[i], expected) < TOLERANCE
        assert relative_error(last[i], expected[-1]) < TOLERANCE
        assert relative_error(mean[i], expected.mean(0)) < TOLERANCE


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """Of every token of a text after the first, by the reference."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return np.asarray(expected)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lm"), tiny_architecture())


def loaded(folder: Path, reference: str) -> Any:
    return CLASSES[reference].ModernBertDecoderForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("reference", CLASSES)
def test_the_logprob_of_every_token_equals_the_references(language_model: Path, reference: str) -> None:
    model = loaded(language_model, reference)
    architecture = tiny_architecture()
    batch = [random_ids(architecture, length, seed=i) for i, length in enumerate(LENGTHS) if length > 1]
    with opened(language_model) as llm:
        scores = llm.score(batch)
    for ids, score in zip(batch, scores, strict=True):
        expected = log_probabilities(model, ids)
        assert relative_error(np.array(score.logprobs), expected) < TOLERANCE
        assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=TOLERANCE)
        assert score.total_logprob == pytest.approx(expected.sum(), rel=TOLERANCE)


@pytest.mark.parametrize("reference", CLASSES)
@pytest.mark.parametrize("stride", [1, 50, 127])
def test_the_logprobs_of_windows_equal_the_references(
    language_model: Path, reference: str, stride: int
) -> None:
    context, length = 128, 135 if stride == 1 else 260
    model = loaded(language_model, reference)
    ids = [256, *random_ids(tiny_architecture(), length - 1)]
    expected = [*log_probabilities(model, ids[:context])]
    for target in range(context, length):
        # The first window that reaches this token: it begins a number of strides behind the first token.
        begin = 1 + -(-(target - context + 1) // stride) * stride
        window = [256, *ids[begin : target + 1]]
        assert context - stride < len(window) <= context
        expected.append(log_probabilities(model, window)[-1])
    with LLM(language_model, dtype="float32", threads=1, max_context=context) as llm:
        (score,) = llm.score([ids], stride=stride)
    assert relative_error(np.array(score.logprobs), np.array(expected)) < TOLERANCE


@pytest.mark.parametrize("reference", CLASSES)
@pytest.mark.parametrize("normalization", ["sum", "token", "byte", "unconditional"])
def test_rankings_equal_the_references(language_model: Path, reference: str, normalization: str) -> None:
    model = loaded(language_model, reference)
    text = "The weather by the sea was often cold, and nobody went there but the fishermen."
    candidates = [" fine", " b", " \N{FOX FACE}", " a rather long continuation " * 4, "x"]

    def total(before: str, candidate: str) -> float:
        num_text = 1 + len(before.encode())
        ids = [256, *(before + candidate).encode()]
        return float(log_probabilities(model, ids)[num_text - 1 :].sum())

    expected = []
    for candidate in candidates:
        num_bytes = len(candidate.encode())  # of this tokenizer, as many tokens
        value = total(text, candidate)
        if normalization in ("token", "byte"):
            value /= num_bytes
        elif normalization == "unconditional":
            value -= total("", candidate)
        expected.append(value)
    with opened(language_model) as llm:
        ranked = llm.rank(text, candidates, normalization=normalization)
    assert [each.index for each in ranked] == sorted(range(5), key=lambda i: -expected[i])
    for each in ranked:
        assert each.total_logprob == pytest.approx(total(text, each.candidate), rel=TOLERANCE)
        assert each.score == pytest.approx(expected[each.index], rel=TOLERANCE, abs=TOLERANCE)
