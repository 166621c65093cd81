"""`pipeline(...)` on the engine: what it accepts and refuses, and the shapes of inputs and outputs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import modernbert_decoder
from adapter_files import write_adapter
from modernbert_decoder import LLM, InputError, ModelNotFoundError, SamplingParams, pipeline
from modernbert_decoder.architecture import Head
from modernbert_decoder.pipelines import factory, torch_pipeline
from modernbert_decoder.pipelines.engine_pipeline import EnginePipeline
from pipeline_checkpoints import CLASSIFIER, NLI_LABELS, write_with_tokenizer

TEXTS = ["The fox ran home.", "", "A ship came over the sea. " * 9, "No!"]
LABELS = ["animals", "the sea", "war"]
# One text alone and beside others: float32 sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Checkpoints by what they are."""
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "classifier": write_with_tokenizer(
            root / "classifier", head=CLASSIFIER, id2label={0: "bad", 1: "good"}
        ),
        "nli": write_with_tokenizer(root / "nli", head=CLASSIFIER, id2label=NLI_LABELS),
        "bare": write_with_tokenizer(root / "bare", head=Head.NONE),
        "language model": write_with_tokenizer(root / "language model"),
    }


@pytest.fixture(scope="module")
def classifier(folders: Mapping[str, Path]) -> Iterator[EnginePipeline]:
    with engine_pipeline("text-classification", folders["classifier"]) as opened:
        yield opened


@pytest.fixture(scope="module")
def story_llm() -> Iterator[LLM]:
    with LLM("storyteller", dtype="float32", threads=2) as opened:
        yield opened


def engine_pipeline(task: str | None, model: Any, **arguments: Any) -> EnginePipeline:
    built = pipeline(task, model, **arguments)
    assert isinstance(built, EnginePipeline)
    return built


def close_to(expected: Any) -> Any:
    """The same nested result with scores that may differ in the last digits."""
    if isinstance(expected, float):
        return pytest.approx(expected, abs=TOLERANCE)
    if isinstance(expected, Mapping):
        return {key: close_to(value) for key, value in expected.items()}
    if isinstance(expected, list):
        return [close_to(value) for value in expected]
    return expected


# --- the factory ---


def test_every_argument_of_transformers_pipeline_is_an_argument() -> None:
    transformers = pytest.importorskip("transformers")
    parameters = inspect.signature(pipeline).parameters
    theirs = inspect.signature(transformers.pipeline).parameters
    assert "kwargs" in parameters  # of the task, on both sides
    assert not set(theirs) - set(parameters)
    positional = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert list(theirs)[: len(positional)] == positional


def test_pipeline_is_a_public_name_and_loads_no_torch(folders: Mapping[str, Path]) -> None:
    assert "pipeline" in modernbert_decoder.__all__
    code = (
        "import sys; from modernbert_decoder import pipeline\n"
        f"with pipeline('text-classification', {str(folders['classifier'])!r}) as run: print(run('Hello'))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("classifier", "text-classification"),
        ("bare", "feature-extraction"),
        ("language model", "text-generation"),
    ],
)
def test_without_a_task_the_head_decides(name: str, task: str, folders: Mapping[str, Path]) -> None:
    with engine_pipeline(None, folders[name]) as run:
        assert run.task == task


def test_sentiment_analysis_is_text_classification(folders: Mapping[str, Path]) -> None:
    with engine_pipeline("sentiment-analysis", folders["classifier"]) as run:
        assert run.task == "text-classification"


def test_an_open_model_is_shared_and_stays_open(story_llm: LLM) -> None:
    for task in ("text-generation", "zero-shot-classification"):
        with engine_pipeline(task, story_llm) as run:
            assert run.model is story_llm
    assert story_llm.generate("Once")


def test_a_pipeline_closes_the_model_it_loaded(folders: Mapping[str, Path]) -> None:
    with engine_pipeline("text-classification", folders["classifier"]) as run:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        run("Hello")


def test_auto_is_the_precision_of_the_checkpoint(folders: Mapping[str, Path]) -> None:
    for dtype, scheme in (("auto", "float32"), (None, "float32"), ("int8", "int8"), ("float32", "float32")):
        with engine_pipeline("text-classification", folders["classifier"], dtype=dtype) as run:
            assert run.model.scheme.name == scheme


class TorchHalf:
    """What matters of `torch.float16`: its text."""

    def __str__(self) -> str:
        return "torch.float16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", TorchHalf()], ids=str)
def test_half_precision_is_float32_with_one_warning_at_the_callers_line(
    dtype: Any, folders: Mapping[str, Path]
) -> None:
    with pytest.warns(UserWarning, match="computed as float32 on the CPU") as caught:
        run = engine_pipeline("text-classification", folders["classifier"], dtype=dtype)
    with run:
        assert run.model.scheme.name == "float32"
    assert len(caught) == 1
    assert caught[0].filename.endswith("test_pipelines.py")


def test_torch_dtype_is_the_old_spelling(folders: Mapping[str, Path]) -> None:
    with engine_pipeline("text-classification", folders["classifier"], torch_dtype="int8") as run:
        assert run.model.scheme.name == "int8"


def test_a_packed_folder_keeps_its_format(tmp_path: Path) -> None:
    from modernbert_decoder.cli import main

    folder = tmp_path / "packed"
    assert main(["quantize", "--dtype", "int4", "--quiet", "storyteller", str(folder)]) == 0
    with engine_pipeline("text-generation", folder) as run:
        assert run.model.scheme.name.startswith("int4")


def test_an_adapter_is_merged_with_the_model(folders: Mapping[str, Path], tmp_path: Path) -> None:
    base = folders["language model"]
    adapter = write_adapter(tmp_path / "adapter", base, seed=1, scale=2.0)
    with (
        engine_pipeline(None, base, adapter=adapter) as run,
        LLM(base, dtype="float32", adapter=adapter) as llm,
        LLM(base, dtype="float32") as plain,
    ):
        assert run.task == "text-generation"
        (record,) = run("The fox", max_new_tokens=12, do_sample=False, return_full_text=False)
        params = SamplingParams(max_tokens=12, temperature=0)
        texts = [each.generate("The fox", params)[0].outputs[0].text for each in (llm, plain)]
    assert record["generated_text"] == texts[0]
    assert texts[0] != texts[1]


def test_an_adapter_that_is_not_there_is_named(folders: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json"):
        pipeline(None, folders["language model"], adapter=tmp_path)


def test_the_pytorch_wing_and_open_models_take_no_adapter(tmp_path: Path, story_llm: LLM) -> None:
    with pytest.raises(InputError, match="load the model with peft"):
        pipeline("text-generation", "storyteller", engine="torch", adapter=tmp_path)
    with pytest.raises(InputError, match="adapter and model_kwargs are decided"):
        pipeline("text-generation", story_llm, adapter=tmp_path)


def test_model_kwargs_reach_the_model(folders: Mapping[str, Path]) -> None:
    settings = {"threads": 1, "max_context": 99}
    with engine_pipeline("text-classification", folders["classifier"], model_kwargs=settings) as run:
        assert (run.model.threads, run.model.max_context) == (1, 99)


@pytest.mark.parametrize("device", [None, -1, "cpu", "CPU", "cpu:0"])
def test_every_spelling_of_the_cpu_is_the_engine(device: Any, folders: Mapping[str, Path]) -> None:
    with engine_pipeline("text-classification", folders["classifier"], device=device) as run:
        assert run("Hello")


@pytest.mark.parametrize("device", [0, "0", "cuda", "cuda:0", "cuda:1", "mps"])
def test_a_gpu_that_is_not_there_is_an_error(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = SimpleNamespace(device_count=lambda: 0)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=absent, xpu=absent, mps=absent))
    monkeypatch.setattr(torch_pipeline, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"PyTorch sees no such device here; .*device=\"cpu\""):
        pipeline("text-generation", "storyteller", device=device)


def test_without_torch_a_gpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pipeline, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"device '0' needs PyTorch.*pip install .*leave engine and device out"
    ):
        pipeline("text-generation", "storyteller", device=0)
    with pytest.raises(InputError, match='engine="torch" needs PyTorch'):
        pipeline("text-generation", "storyteller", engine="torch")


def test_framework_pt_asks_for_the_same_wing_as_engine_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        torch_pipeline,
        "torch_pipeline",
        lambda *positional, **named: asked.append((positional, named)) or "built",
    )
    for arguments in ({"engine": "torch"}, {"framework": "pt"}, {"engine": "torch", "framework": "pt"}):
        built: Any = pipeline(
            "text-generation", "storyteller", **arguments, batch_size=3, trust_remote_code=False
        )
        assert built == "built"
    assert asked[0] == asked[1] == asked[2]
    assert asked[0][1]["arguments"] == {"batch_size": 3}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task": "translation"}, "the tasks are text-generation, text-classification"),
    ({"model": None}, "model is missing"),
    ({"model": 3}, "model must be a name, a folder, an LLM or a PyTorch model, got int"),
    ({"engine": "tensorrt"}, "engine must be 'onnxruntime' or 'torch'"),
    ({"framework": "tf"}, 'framework must be "pt"'),
    ({"framework": "pt", "engine": "onnxruntime"}, "exclude each other"),
    ({"device": 1.5}, "device must be a number or a name"),
    ({"device": True}, "device must be a number or a name"),
    ({"engine": "onnxruntime", "device": "cuda:7"}, "this installation runs models on the CPU"),
    ({"dtype": "float8"}, "dtype 'float8' is not available"),
    ({"dtype": 16}, "dtype must be a name"),
    ({"dtype": "int8", "torch_dtype": "int8"}, "old spelling"),
    ({"engine": "torch", "task": None}, "task is missing"),
    ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ({"config": "x"}, "put config.json into the model's folder"),
    ({"tokenizer": "another"}, "put tokenizer.json into the model's folder"),
    ({"trust_remote_code": True}, "never runs code of a repository"),
    ({"device_map": "auto"}, 'use device. engine="torch"'),
    ({"token": "hf_x"}, "HF_TOKEN"),
    ({"use_fast": False}, "always the fast ones"),
    ({"num_workers": 2}, "threads"),
    ({"model_kwargs": {"attn_implementation": "sdpa"}}, "leave it out"),
    ({"model_kwargs": {"thread": 2}}, "did you mean threads?"),
    ({"max_new_token": 3}, "did you mean max_new_tokens?"),
    ({"flavour": 3}, "does not know the argument flavour"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        pipeline(**{"task": "text-generation", "model": "storyteller", **arguments})
    assert words in str(caught.value)


def test_what_says_nothing_new_is_accepted(folders: Mapping[str, Path]) -> None:
    folder = str(folders["classifier"])
    with engine_pipeline(
        "text-classification",
        folder,
        tokenizer=folder,
        trust_remote_code=False,
        use_fast=True,
        framework=None,
    ) as run:
        assert run("Hello")


def test_an_open_model_has_decided_device_and_format(story_llm: LLM) -> None:
    for arguments in (
        {"device": 0, "engine": "onnxruntime"},
        {"dtype": "int8"},
        {"model_kwargs": {"threads": 1}},
    ):
        with pytest.raises(InputError, match="model is an open LLM"):
            pipeline("text-generation", story_llm, **arguments)
    with pytest.raises(InputError, match="model is an LLM, which PyTorch cannot run"):
        pipeline("text-generation", story_llm, engine="torch")


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match="no/such-model"):
        pipeline("text-generation", "./no/such-model")


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        ("text-classification", "language model", "no trained classifier (it is a language model)"),
        ("text-classification", "bare", "no trained classifier (it is a bare decoder)"),
        ("zero-shot-classification", "bare", "no trained classifier"),
        ("zero-shot-classification", "classifier", "needs a classifier with a label named entailment"),
        ("text-generation", "classifier", "needs a language model, and this checkpoint is a classifier"),
    ],
)
def test_a_head_that_cannot_do_the_task_is_refused(
    task: str, name: str, words: str, folders: Mapping[str, Path]
) -> None:
    with pytest.raises(InputError) as caught:
        pipeline(task, folders[name])
    assert words in str(caught.value)


def test_a_refused_pipeline_closes_the_model_it_loaded(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(factory.LLM, "close", lambda self: closed.append(self))
    with pytest.raises(InputError):
        pipeline("text-classification", folders["bare"])
    assert len(closed) == 1


# --- inputs ---


def test_one_text_a_list_and_a_generator_give_the_same_results(classifier: EnginePipeline) -> None:
    listed = classifier(TEXTS)
    assert [classifier(text)[0] for text in TEXTS] == close_to(listed)
    lazily = classifier(text for text in TEXTS)
    assert not isinstance(lazily, list)
    assert list(lazily) == close_to(listed)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_results_do_not_depend_on_the_batch_size(batch_size: int, classifier: EnginePipeline) -> None:
    assert classifier(TEXTS, batch_size=batch_size) == close_to(classifier(TEXTS))
    assert list(classifier(iter(TEXTS), batch_size=batch_size)) == close_to(classifier(TEXTS))


def test_an_endless_stream_is_read_as_results_are_asked_for(classifier: EnginePipeline) -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "The fox ran home."

    results = classifier(texts(), batch_size=4)
    assert taken == 0
    for _ in range(5):
        next(results)
    assert taken == 8


def test_a_data_set_that_is_only_indexed_is_walked(classifier: EnginePipeline) -> None:
    class Column:
        def __len__(self) -> int:
            return len(TEXTS)

        def __getitem__(self, index: int) -> str:
            return TEXTS[index]

    assert list(classifier(Column())) == close_to(classifier(TEXTS))


def test_an_empty_list_gives_an_empty_list(classifier: EnginePipeline, story_llm: LLM) -> None:
    assert classifier([]) == []
    assert pipeline("text-generation", story_llm)([]) == []
    assert pipeline("zero-shot-classification", story_llm)([], LABELS) == []


@pytest.mark.parametrize("inputs", [("a", "b"), b"bytes", 7, None])
def test_inputs_of_another_kind_are_refused(inputs: Any, classifier: EnginePipeline) -> None:
    with pytest.raises(InputError, match="reads a text, a list of texts or an iterable"):
        classifier(inputs)


def test_an_item_of_another_kind_is_refused(classifier: EnginePipeline, story_llm: LLM) -> None:
    with pytest.raises(InputError, match="text-classification reads texts, got int: '5'"):
        classifier(["a", 5])
    with pytest.raises(InputError, match="no chat template"):
        pipeline("text-generation", story_llm)([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("text", ["\0", "\ud800", "🦊" * 40, "مرحبا بالعالم", "x" * 5000])
def test_odd_texts_are_classified(text: str, classifier: EnginePipeline) -> None:
    result = classifier(text, top_k=None, truncation=True)
    assert sum(entry["score"] for entry in result) == pytest.approx(1)


# --- text classification ---


def test_shapes_follow_top_k(classifier: EnginePipeline, folders: Mapping[str, Path]) -> None:
    best = classifier("Hello")
    assert [set(entry) for entry in best] == [{"label", "score"}]
    every = classifier("Hello", top_k=None)
    assert every[0] == close_to(best[0])
    assert [entry["score"] for entry in every] == sorted((entry["score"] for entry in every), reverse=True)
    assert classifier(["Hello"]) == close_to(best)
    assert classifier(["Hello"], top_k=1) == close_to([best])
    assert classifier(["Hello"], top_k=7) == close_to([every])
    with engine_pipeline("text-classification", folders["classifier"], top_k=None) as always:
        assert always(["Hello"]) == close_to([every])


def test_a_pair_is_a_dictionary_or_the_old_nested_list(classifier: EnginePipeline) -> None:
    pair = {"text": "The fox ran.", "text_pair": "It was tired."}
    result = classifier(pair)
    assert set(result) == {"label", "score"}
    assert classifier([pair, pair]) == close_to([result, result])
    assert classifier([[["The fox ran.", "It was tired."]]]) == close_to([result])
    assert classifier({"text": "The fox ran."}) == close_to(classifier("The fox ran.")[0])
    assert classifier([pair], top_k=None) != close_to(classifier([{"text": "The fox ran."}], top_k=None))


@pytest.mark.parametrize(
    "item", [["a", "b"], [["a", "b", "c"]], {"text": "a", "pair": "b"}, {"text_pair": "b"}]
)
def test_other_spellings_of_a_pair_are_refused(item: Any, classifier: EnginePipeline) -> None:
    with pytest.raises(InputError, match="text_pair"):
        classifier([item])


def test_the_function_to_apply_is_applied(classifier: EnginePipeline) -> None:
    raw = {e["label"]: e["score"] for e in classifier("Hello", top_k=None, function_to_apply="none")}
    logits = np.array([raw["bad"], raw["good"]])
    for name, expected in (
        ("sigmoid", 1 / (1 + np.exp(-logits))),
        ("softmax", np.exp(logits) / np.exp(logits).sum()),
        ("SOFTMAX", np.exp(logits) / np.exp(logits).sum()),
        ("default", np.exp(logits) / np.exp(logits).sum()),
    ):
        got = {e["label"]: e["score"] for e in classifier("Hello", top_k=None, function_to_apply=name)}
        assert [got["bad"], got["good"]] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "problem", "function"),
    [
        (1, None, "sigmoid"),
        (1, "regression", "none"),
        (3, "regression", "none"),
        (3, "multi_label_classification", "sigmoid"),
        (3, "single_label_classification", "softmax"),
    ],
)
def test_the_problem_type_chooses_the_function(
    labels: int, problem: str | None, function: str, tmp_path: Path
) -> None:
    id2label = {i: f"L{i}" for i in range(labels)}
    folder = write_with_tokenizer(tmp_path / "m", head=CLASSIFIER, id2label=id2label, problem_type=problem)
    with engine_pipeline("text-classification", folder) as run:
        assert run("Hello", top_k=None) == run("Hello", top_k=None, function_to_apply=function)


def test_truncation_cuts_where_it_says(classifier: EnginePipeline) -> None:
    long, cut = "A ship came over the sea. " * 500, "A ship came over"
    with pytest.raises(InputError, match="cut it with truncation=True: 'A ship"):
        classifier(long)
    num_tokens = len(classifier.tokenizer.encode_template(cut))
    expected = classifier(cut, function_to_apply="none")
    options: dict[str, Any] = {"max_length": num_tokens, "function_to_apply": "none"}
    assert classifier(long, truncation=True, **options) == close_to(expected)
    assert classifier(long, truncation="longest_first", padding=True, **options) == close_to(expected)
    with pytest.warns(UserWarning, match="as with truncation=True") as caught:
        assert classifier(long, **options) == close_to(expected)
    assert caught[0].filename.endswith("test_pipelines.py")
    whole = classifier({"text": cut, "text_pair": cut}, function_to_apply="none")
    options["max_length"] = 2 * num_tokens - 1
    for strategy, pair in (("only_first", (long, cut)), ("only_second", (cut, long))):
        item = {"text": pair[0], "text_pair": pair[1]}
        assert classifier(item, truncation=strategy, **options) == close_to(whole)


def test_without_max_length_texts_are_cut_at_the_tokenizers_limit(tmp_path: Path) -> None:
    folder = write_with_tokenizer(tmp_path / "m", head=CLASSIFIER)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "model_max_length": 10}), encoding="utf-8")
    text = "A ship came over the sea. " * 9
    with engine_pipeline("text-classification", folder, function_to_apply="none") as run:
        assert run(text, truncation=True) == run(text, truncation=True, max_length=10)
        assert run(text, truncation=True) != run(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"function_to_apply": "tanh"}, "function_to_apply must be default, sigmoid, softmax or none"),
        ({"truncation": "middle"}, "truncation must be True, False or one of"),
        ({"truncation": False, "max_length": 5}, "says where to cut, but truncation is False"),
        ({"truncation": True, "max_length": 10**6}, "the context holds 2048 tokens"),
        ({"truncation": True, "max_length": 0}, "max_length must be an integer of at least 1"),
        ({"truncation": True, "max_length": 1}, "the template alone needs 2"),
        ({"truncation": "only_second", "max_length": 2}, "there is no second text"),
        ({"padding": "left"}, "padding must be one of"),
        ({"return_all_scores": True}, "use top_k=None"),
        ({"add_special_tokens": False}, "template"),
        ({"candidate_labels": LABELS}, "does not know the argument candidate_labels"),
    ],
)
def test_arguments_of_classification_that_mean_nothing_are_refused(
    arguments: dict[str, Any], words: str, classifier: EnginePipeline
) -> None:
    with pytest.raises(InputError) as caught:
        classifier("Hello over there", **arguments)
    assert words in str(caught.value)


def test_a_megabyte_without_a_space_is_cut_by_every_pipeline(
    classifier: EnginePipeline, folders: Mapping[str, Path]
) -> None:
    huge = "x" * 1_000_000
    (cut,) = classifier(huge, truncation=True)
    assert cut == close_to(classifier(huge[:20_000], truncation=True)[0])
    assert classifier([huge, "Hello"], truncation=True)[1] == close_to(classifier("Hello")[0])
    with engine_pipeline("zero-shot-classification", folders["nli"]) as run:
        result = run(huge, LABELS)
        assert result["scores"] == close_to(run(huge[:20_000], LABELS)["scores"])
    with engine_pipeline("feature-extraction", folders["bare"], return_tensors=True) as run:
        states = run(huge, truncation=True, max_length=9)
        assert states == pytest.approx(run(huge[:500], truncation=True, max_length=9), abs=TOLERANCE)
        assert states.shape[:2] == (1, 9)


# --- zero-shot classification ---


def test_zero_shot_by_a_language_model_sorts_labels_and_sums_to_one(story_llm: LLM) -> None:
    run = pipeline("zero-shot-classification", story_llm)
    result = run("The fox and the hen lived in the wood.", LABELS)
    assert set(result) == {"sequence", "labels", "scores"}
    assert sorted(result["labels"]) == sorted(LABELS)
    assert result["scores"] == sorted(result["scores"], reverse=True)
    assert sum(result["scores"]) == pytest.approx(1)
    assert run(["The fox and the hen lived in the wood."], candidate_labels=", ".join(LABELS)) == [result]


@pytest.mark.parametrize("normalization", ["sum", "token", "byte", "unconditional"])
def test_zero_shot_scores_are_a_softmax_of_the_engines_ranking(normalization: str, story_llm: LLM) -> None:
    text, template = "The fox ran over the hill.", "This story is about {}."
    run = pipeline("zero-shot-classification", story_llm, hypothesis_template=template)
    result = run(text, LABELS, normalization=normalization)
    ranking = story_llm.rank(
        f"{text}\nThis story is about",
        [f" {label}." for label in LABELS],
        normalization=normalization,
        unconditional_text="This story is about" if normalization == "unconditional" else "",
    )
    values = np.exp([entry.score for entry in ranking])
    assert result["labels"] == [LABELS[entry.index] for entry in ranking]
    assert result["scores"] == pytest.approx((values / values.sum()).tolist(), rel=1e-4)
    if normalization == "unconditional":
        assert run(text, LABELS) == result  # the default


def test_a_label_judged_by_itself_is_above_a_half_if_the_text_makes_it_likelier(story_llm: LLM) -> None:
    run = pipeline("zero-shot-classification", story_llm)
    text = "The fox and the hen lived in the wood. The fox ran after the hen."
    together = run(text, ["foxes", "parliament"], multi_label=True)
    alone = [run(text, [label])["scores"][0] for label in together["labels"]]
    assert together["scores"] == pytest.approx(alone, rel=1e-4)
    ranking = story_llm.rank(
        f"{text}\nThis example is",
        [" foxes."],
        normalization="unconditional",
        unconditional_text="This example is",
    )
    assert run(text, ["foxes"])["scores"][0] == pytest.approx(1 / (1 + np.exp(-ranking[0].score)), rel=1e-4)


def test_zero_shot_cuts_a_text_that_does_not_fit(story_llm: LLM, folders: Mapping[str, Path]) -> None:
    long = "The fox ran over the hill. " * 1000
    result = pipeline("zero-shot-classification", story_llm)(long, LABELS)
    assert result["sequence"] == long
    assert sum(result["scores"]) == pytest.approx(1)
    with engine_pipeline("zero-shot-classification", folders["nli"]) as run:
        assert sum(run(long, LABELS)["scores"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["nli", "language model"])
def test_zero_shot_streams_and_batches_agree(name: str, folders: Mapping[str, Path]) -> None:
    with engine_pipeline("zero-shot-classification", folders[name], candidate_labels=LABELS) as run:
        listed = run(TEXTS)
        assert [result["sequence"] for result in listed] == TEXTS
        assert list(run(iter(TEXTS), batch_size=3)) == close_to(listed)
        assert [run(text) for text in TEXTS] == close_to(listed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "candidate_labels must be"),
        ({"candidate_labels": []}, "at least one text"),
        ({"candidate_labels": " , "}, "at least one text"),
        ({"candidate_labels": ["a", ""]}, "nothing empty"),
        ({"candidate_labels": LABELS, "hypothesis_template": "No place."}, "with {} where the label goes"),
        ({"candidate_labels": LABELS, "hypothesis_template": "{} {}"}, "with {} where the label goes"),
        ({"candidate_labels": LABELS, "multi_label": "yes"}, "multi_label must be True or False"),
        ({"candidate_labels": LABELS, "normalization": "mean"}, "normalization must be one of"),
        ({"candidate_labels": LABELS, "normalization": "sum", "multi_label": True}, "judged one by one"),
        ({"candidate_labels": LABELS, "multi_class": True}, "it is called multi_label"),
    ],
)
def test_arguments_of_zero_shot_that_mean_nothing_are_refused(
    arguments: dict[str, Any], words: str, story_llm: LLM
) -> None:
    with pytest.raises(InputError) as caught:
        pipeline("zero-shot-classification", story_llm)("The fox ran.", **arguments)
    assert words in str(caught.value)


def test_a_classifier_has_no_normalization(folders: Mapping[str, Path]) -> None:
    with (
        engine_pipeline("zero-shot-classification", folders["nli"]) as run,
        pytest.raises(InputError, match="normalization is for language models"),
    ):
        run("The fox ran.", LABELS, normalization="sum")


# --- feature extraction ---


def test_features_are_nested_lists_or_numpy_of_every_token(folders: Mapping[str, Path]) -> None:
    with engine_pipeline("feature-extraction", folders["bare"]) as run:
        nested = run("The fox ran.")
        num_tokens = len(run.tokenizer.encode_template("The fox ran."))
        array = run("The fox ran.", return_tensors="np")
        assert np.shape(nested) == array.shape == (1, num_tokens, 64)
        assert array.dtype == np.float32
        assert np.asarray(nested, np.float32) == pytest.approx(array)
        for alone, result in zip(TEXTS, run(TEXTS, return_tensors=True), strict=True):
            assert result == pytest.approx(run(alone, return_tensors=True), abs=TOLERANCE)


def test_features_of_a_cut_text_are_the_first_ones(folders: Mapping[str, Path]) -> None:
    with engine_pipeline("feature-extraction", folders["language model"], return_tensors=True) as run:
        whole = run("The fox ran over the hill.")
        cut = run("The fox ran over the hill.", tokenize_kwargs={"truncation": True, "max_length": 4})
        assert cut.shape[1] == 4
        assert cut[0, :3] == pytest.approx(whole[0, :3], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"return_tensors": "pt"}, 'engine="torch" returns PyTorch tensors'),
        ({"tokenize_kwargs": {"stride": 3}}, "tokenize_kwargs must be a dictionary of"),
        ({"tokenize_kwargs": {"truncation": True}, "truncation": True}, "given twice"),
        ({"pooling": "mean"}, "does not know the argument pooling"),
    ],
)
def test_arguments_of_extraction_that_mean_nothing_are_refused(
    arguments: dict[str, Any], words: str, folders: Mapping[str, Path]
) -> None:
    with engine_pipeline("feature-extraction", folders["bare"]) as run, pytest.raises(InputError) as caught:
        run("Hello", **arguments)
    assert words in str(caught.value)
