"""`pipeline(...)` on the engine against transformers' own pipeline and classes, on equal random checkpoints.

The reference's tokenizer of text generation feeds `[CLS] text` without `[SEP]`, as the engine does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

import modernbert_decoder.pytorch  # noqa: E402
from modernbert_decoder import pipeline  # noqa: E402
from modernbert_decoder.architecture import Head  # noqa: E402
from modernbert_decoder.pipelines.torch_pipeline import prompt_without_sep  # noqa: E402
from pipeline_checkpoints import CLASSIFIER, NLI_LABELS, write_with_tokenizer  # noqa: E402

# What the documentation promises of scores.
TOLERANCE = 1e-4
SHORT = ["The fox ran home.", "No!", "A ship came over the sea, and nobody saw it.", "🦊 ran"]
LONG = ["The old king lived by the sea. " * 40, "It rained. " * 90]  # past the window of 64
TEXTS = [*SHORT, *LONG]
PAIRS = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
LABELS = ["animals", "the sea", "a long war in winter"]
PROMPTS = ["Once upon a time", "\n", LONG[0][:600]]

# Older pipelines let their own max_new_tokens win over max_length, and stop at a stop sequence's first token.
as_documented = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
    reason="this release of transformers does not do what its documentation says",
)
CLASSIFIERS: Mapping[str, dict[str, Any]] = {
    "two labels": {"id2label": {0: "bad", 1: "good"}},
    "five labels": {"id2label": {i: f"label {i}" for i in range(5)}},
    "single label": {"id2label": NLI_LABELS, "problem_type": "single_label_classification"},
    "multi-label": {"id2label": NLI_LABELS, "problem_type": "multi_label_classification"},
    "one label": {"id2label": {0: "score"}},
    "regression": {"id2label": {0: "score"}, "problem_type": "regression"},
    "regression of three": {"id2label": NLI_LABELS, "problem_type": "regression"},
}


def reference(task: str, name: str, folder: Path, *, classes: Any = transformers) -> Any:
    """transformers' pipeline with its own class of that name, or ours, whatever classes are registered."""
    model = getattr(classes, f"ModernBertDecoder{name}").from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device=-1)


def close_to(expected: Any) -> Any:
    if isinstance(expected, float):
        return pytest.approx(expected, abs=1e-6, rel=TOLERANCE)
    if isinstance(expected, Mapping):
        return {key: close_to(value) for key, value in expected.items()}
    if isinstance(expected, list):
        return [close_to(value) for value in expected]
    return expected


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that threads only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- text generation ---


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = write_with_tokenizer(tmp_path_factory.mktemp("lm"))
    theirs = reference("text-generation", "ForCausalLM", folder)
    prompt_without_sep(theirs.tokenizer)
    with pipeline("text-generation", folder) as ours:  # type: ignore[attr-defined]
        yield ours, theirs


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 40},
        pytest.param({"max_length": 170}, marks=as_documented),
        {"max_new_tokens": 10, "return_full_text": False},
        {"max_new_tokens": 10, "return_tensors": True},
        {"max_new_tokens": 40, "repetition_penalty": 1.4},
        {"max_new_tokens": 12, "prefix": "Listen: "},
        {"max_new_tokens": 30, "eos_token_id": list(range(5, 300)), "min_new_tokens": 9},
        {"max_new_tokens": 12, "skip_special_tokens": False},
        pytest.param({"max_new_tokens": 40, "stop_sequence": ["e", "a"]}, marks=as_documented),
        {"max_new_tokens": 12, "add_special_tokens": False},
    ],
    ids=str,
)
def test_greedy_generation_is_identical(arguments: dict[str, Any], generators: Any) -> None:
    ours, theirs = generators
    expected = [theirs(prompt, do_sample=False, **arguments) for prompt in PROMPTS]
    assert ours(PROMPTS, do_sample=False, **arguments) == expected
    assert ours(PROMPTS[0], do_sample=False, **arguments) == expected[0]


# --- text classification ---


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classification_gives_the_same_labels_and_scores(name: str, tmp_path: Path) -> None:
    folder = write_with_tokenizer(tmp_path / "m", head=CLASSIFIER, **CLASSIFIERS[name])
    theirs = reference("text-classification", "ForSequenceClassification", folder)
    with pipeline("text-classification", folder) as ours:  # type: ignore[attr-defined]
        for inputs in (TEXTS[0], TEXTS, PAIRS[0], PAIRS):
            for arguments in ({}, {"top_k": None}, {"top_k": 2}, {"top_k": 1}):
                assert ours(inputs, **arguments) == close_to(theirs(inputs, **arguments))
        for function in ("sigmoid", "softmax", "none"):
            options = {"top_k": None, "function_to_apply": function}
            assert ours(TEXTS, **options) == close_to(theirs(TEXTS, **options))


@pytest.mark.parametrize("max_length", [6, 11, 64, 65, 200])
@pytest.mark.parametrize("truncation", [True, "longest_first", "only_first", "only_second"])
def test_truncated_texts_and_pairs_give_the_same_scores(
    truncation: Any, max_length: int, classifiers: Any
) -> None:
    ours, theirs = classifiers
    options = {"top_k": None, "truncation": truncation, "max_length": max_length}
    long_and_short = [{"text": LONG[0], "text_pair": "It."}, {"text": "It.", "text_pair": LONG[0]}]
    inputs: list[Any] = {"only_first": long_and_short[:1], "only_second": long_and_short[1:]}.get(
        truncation, [*TEXTS, *PAIRS]
    )
    assert ours(inputs, **options) == close_to([theirs(item, **options) for item in inputs])


@pytest.fixture(scope="module", params=["upstream", "wing"])
def classifiers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The engine, and transformers' pipeline on its own classes or on those of the PyTorch wing."""
    folder = write_with_tokenizer(tmp_path_factory.mktemp("cls"), head=CLASSIFIER, id2label=NLI_LABELS)
    classes = transformers if request.param == "upstream" else modernbert_decoder.pytorch
    theirs = reference("text-classification", "ForSequenceClassification", folder, classes=classes)
    own = "modernbert_decoder" if request.param == "wing" else "transformers"
    assert type(theirs.model).__module__.startswith(f"{own}.")
    with pipeline("text-classification", folder) as ours:  # type: ignore[attr-defined]
        yield ours, theirs


def test_pairs_and_texts_beyond_the_window_give_the_references_scores(classifiers: Any) -> None:
    ours, theirs = classifiers
    for inputs in (TEXTS, PAIRS):
        assert ours(inputs, top_k=None) == close_to(theirs(inputs, top_k=None))


def test_padding_and_batches_give_the_references_scores(classifiers: Any) -> None:
    ours, theirs = classifiers
    assert ours(TEXTS, top_k=None, batch_size=4) == close_to(theirs(TEXTS, top_k=None, batch_size=4))


# --- zero-shot classification ---


@pytest.mark.parametrize(
    "labels",
    [NLI_LABELS, {0: "entailment", 1: "neutral", 2: "contradiction"}, {0: "not_entailment", 1: "entailment"}],
    ids=str,
)
def test_zero_shot_by_entailment_is_equal(labels: Mapping[int, str], tmp_path: Path) -> None:
    folder = write_with_tokenizer(tmp_path / "m", head=CLASSIFIER, id2label=labels)
    theirs = reference("zero-shot-classification", "ForSequenceClassification", folder)
    with pipeline("zero-shot-classification", folder) as ours:  # type: ignore[attr-defined]
        for options in (
            {"candidate_labels": LABELS},
            {"candidate_labels": "animals, the sea,war"},
            {"candidate_labels": LABELS, "multi_label": True},
            {"candidate_labels": LABELS[:1]},
            {"candidate_labels": LABELS, "hypothesis_template": "It is about {}, is it not?"},
        ):
            assert ours(TEXTS, **options) == close_to(theirs(TEXTS, **options))
        assert ours(TEXTS[0], LABELS) == close_to(theirs(TEXTS[0], LABELS))


def test_zero_shot_cuts_the_text_and_not_the_hypothesis_as_transformers_does(tmp_path: Path) -> None:
    folder = write_with_tokenizer(
        tmp_path / "m", head=CLASSIFIER, id2label=NLI_LABELS, max_position_embeddings=128
    )
    theirs = reference("zero-shot-classification", "ForSequenceClassification", folder)
    theirs.tokenizer.model_max_length = 128
    with pipeline("zero-shot-classification", folder) as ours:  # type: ignore[attr-defined]
        assert ours(LONG, LABELS) == close_to(theirs(LONG, LABELS))
        long_hypothesis = {"hypothesis_template": "The old king lived by the sea. " * 9 + "It is {}."}
        assert ours(LONG, LABELS, **long_hypothesis) == close_to(theirs(LONG, LABELS, **long_hypothesis))


# --- feature extraction ---


def test_features_are_equal(tmp_path: Path) -> None:
    folder = write_with_tokenizer(tmp_path / "m", head=Head.NONE)
    theirs = reference("feature-extraction", "Model", folder)
    with pipeline("feature-extraction", folder) as ours:  # type: ignore[attr-defined]
        for text, got in zip(TEXTS, ours(TEXTS), strict=True):
            expected = theirs(text)
            assert np.shape(got) == np.shape(expected)
            scale = np.abs(expected).max()
            assert np.abs(np.subtract(got, expected)).max() <= TOLERANCE * scale
        assert np.shape(ours(TEXTS[0], return_tensors=True)) == tuple(
            theirs(TEXTS[0], return_tensors=True).shape
        )


# --- the PyTorch wing ---


def test_the_torch_wing_is_transformers_pipeline_with_our_classes(tmp_path: Path) -> None:
    from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM

    folder = write_with_tokenizer(tmp_path / "m")
    for arguments in ({"engine": "torch"}, {"framework": "pt"}, {"engine": "torch", "device": "cpu"}):
        wing: Any = pipeline("text-generation", folder, dtype=torch.float32, **arguments)
        assert isinstance(wing, transformers.TextGenerationPipeline)
        assert isinstance(wing.model, ModernBertDecoderForCausalLM)
        assert wing.model.dtype == torch.float32
    with pipeline("text-generation", folder) as ours:  # type: ignore[attr-defined]
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
        assert ours(PROMPTS[0], **options) == wing(PROMPTS[0], **options)
    shared: Any = pipeline("text-generation", wing.model, tokenizer=wing.tokenizer)
    assert shared.model is wing.model


def test_the_torch_wing_runs_the_bundled_model_by_name() -> None:
    wing: Any = pipeline("text-generation", "storyteller", engine="torch", dtype="float32", batch_size=2)
    with pipeline("text-generation", "storyteller") as ours:  # type: ignore[attr-defined]
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
        assert ours(PROMPTS[:2], **options) == wing(PROMPTS[:2], **options)


def test_a_gpu_is_the_torch_wing_with_our_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is told to have one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    from modernbert_decoder.pytorch import ModernBertDecoderConfig

    folder = write_with_tokenizer(tmp_path / "m", head=CLASSIFIER)
    calls: list[dict[str, Any]] = []
    registered: list[bool] = []

    def recorded(**arguments: Any) -> str:
        calls.append(arguments)
        return "built"

    register = modernbert_decoder.pytorch.register_auto_classes

    def register_and_tell() -> None:
        registered.append(True)
        register()

    # The library puts another object of its name in its place when it is imported.
    monkeypatch.setattr(sys.modules["transformers"], "pipeline", recorded)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(modernbert_decoder.pytorch, "register_auto_classes", register_and_tell)
    for device, expected in ((0, 0), ("cuda:0", "cuda:0"), (torch.device("cuda", 0), "cuda:0")):
        assert pipeline("text-classification", folder, device=device, top_k=2) == "built"
        assert calls.pop() == {
            "task": "text-classification",
            "model": str(folder),
            "device": expected,
            "dtype": "auto",
            "top_k": 2,
        }
        assert registered.pop()
    chosen = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[ModernBertDecoderConfig]
    assert chosen is modernbert_decoder.pytorch.ModernBertDecoderForSequenceClassification
    with pytest.raises(ValueError, match="PyTorch sees 1 such device here"):
        pipeline("text-classification", folder, device=1)
    assert not calls


def test_a_model_object_has_its_dtype_already(tmp_path: Path) -> None:
    folder = write_with_tokenizer(tmp_path / "m", head=CLASSIFIER)
    wing: Any = pipeline("text-classification", folder, engine="torch", dtype="float32")
    again: Any
    for dtype in ("auto", None, torch.float32):
        again = pipeline("text-classification", wing.model, tokenizer=wing.tokenizer, dtype=dtype)
        assert again.model.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype 'float16' comes too late: the model is loaded, as float32"):
        pipeline("text-classification", wing.model, tokenizer=wing.tokenizer, dtype=torch.float16)


def test_the_torch_wing_warns_of_a_classifier_that_is_not_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_with_tokenizer(tmp_path / "m")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        wing: Any = pipeline("text-classification", folder, engine="torch")
    assert "classifier.weight" in caplog.text
    assert "newly initialized" in caplog.text
    assert wing("Hello")[0]["label"].startswith("LABEL_")


def test_the_torch_wing_refuses_the_engines_formats_and_absent_devices(tmp_path: Path) -> None:
    folder = write_with_tokenizer(tmp_path / "m")
    with pytest.raises(ValueError, match="dtype 'int8' is a format of the engine"):
        pipeline("text-generation", folder, engine="torch", dtype="int8")
    with pytest.raises(ValueError, match="device 'tpu' is not known"):
        pipeline("text-generation", folder, engine="torch", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="PyTorch sees no such device here"):
            pipeline("text-generation", folder, device=torch.device("cuda", 0))
