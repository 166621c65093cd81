"""The engine in lm-evaluation-harness: the numbers of the harness's own `hf` model, from local files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import CLS, PAD, SEP, tiny_architecture, write_checkpoint
from modernbert_decoder.cli import main
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.errors import InputError

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from modernbert_decoder.evaluation.harness import (
    TASKS_FOLDER,
    TaskOptions,
    _results,
    comparison_rows,
    run_tasks,
)
from modernbert_decoder.evaluation.harness_model import EngineModel
from modernbert_decoder.evaluation.published import published_tasks

CONTEXT = 192
# Two float32 implementations; a sum over some dozens of tokens.
TOLERANCE = 1e-3
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = tiny_architecture(max_position_embeddings=CONTEXT)
    path = write_checkpoint(tmp_path_factory.mktemp("harness") / "model", architecture)
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineModel]:
    model = EngineModel(str(folder), dtype="float32")
    yield model
    model.llm.close()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """The harness's `hf` model with transformers' class, and a tokenizer with the template `[CLS] A`."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    import tokenizers
    from lm_eval.models.huggingface import HFLM

    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", CLS)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="[CLS]",
        cls_token="[CLS]",
        eos_token="[SEP]",
        sep_token="[SEP]",
        pad_token="[PAD]",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (CLS, SEP, PAD)
    model = transformers.ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.")
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, add_bos_token=True, device="cpu")


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i, metadata=("task", i, 1))
        for i, each in enumerate(arguments)
    ]


PAIRS = (
    ("The fox", " ran home"),
    ("The fox", " slept"),
    ("The fox ", "ran home"),  # the space goes to the continuation
    ("The fox", " r"),
    ("", " Once upon"),
    ("", "[CLS]Once upon"),
    ("[CLS]The fox", " ran"),
    ("Question: who?\nAnswer:", " a king"),
    ("x" * (CONTEXT + 40), " and more"),  # cut off its beginning
    ("y" * (CONTEXT - 5), "abcde"),  # [CLS], 187, and 5 of which the last is not fed: fits exactly
    ("y" * (CONTEXT - 4), "abcde"),  # one too many
    ("Café 😀", " à la carte"),
)


def test_loglikelihoods_are_those_of_the_harness(engine: EngineModel, reference: Any) -> None:
    expected = reference.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    found = engine.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (logprob, is_greedy), (theirs, is_theirs) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(theirs, abs=TOLERANCE)
        assert is_greedy is is_theirs


def test_greedy_continuations_are_found_by_both(engine: EngineModel, reference: Any) -> None:
    (text,) = engine.generate_until(
        requests("generate_until", ("The fox", {"max_gen_toks": 3})), disable_tqdm=True
    )
    (found,) = engine.loglikelihood(requests("loglikelihood", ("The fox", text)), disable_tqdm=True)
    (theirs,) = reference.loglikelihood(requests("loglikelihood", ("The fox", text)), disable_tqdm=True)
    assert found[1] is theirs[1]


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_is_added_as_the_harness_is_told(
    folder: Path, engine: EngineModel, reference: Any, add_bos_token: bool
) -> None:
    own = EngineModel(engine.llm, add_bos_token=add_bos_token)
    reference.add_bos_token = add_bos_token
    try:
        pairs = [pair for pair in PAIRS if pair[0]]
        expected = reference.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    finally:
        reference.add_bos_token = True
    found = own.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=TOLERANCE)


def test_rolling_loglikelihoods_are_those_of_the_harness(engine: EngineModel, reference: Any) -> None:
    texts = (("The fox ran home.",), ("Once upon a time. " * 30,), ("z" * (CONTEXT - 1),), ("z" * CONTEXT,))
    expected = reference.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = engine.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=3 * TOLERANCE)


def test_generated_texts_are_those_of_the_harness(engine: EngineModel, reference: Any) -> None:
    settings = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    contexts = [("The fox", settings), ("Once upon a time", settings), ("q" * (CONTEXT + 9), settings)]
    contexts += [("The old king", {"max_gen_toks": 9, "until": "zzz", "temperature": 0.0})]
    expected = reference.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    found = engine.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert found == expected


def test_settings_of_generation_that_the_engine_lacks_are_refused(engine: EngineModel) -> None:
    bad = requests("generate_until", ("The fox", {"num_beams": 4}))
    with pytest.raises(InputError, match="the engine has no num_beams=4"):
        engine.generate_until(bad, disable_tqdm=True)


def test_sampled_texts_repeat_with_the_seed(engine: EngineModel) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 20, "max_gen_toks": 8}
    asked = requests("generate_until", ("The fox", settings), ("The fox", settings))
    first, second = engine.generate_until(asked, disable_tqdm=True)
    assert first != second
    assert engine.generate_until(asked, disable_tqdm=True) == [first, second]


def test_candidates_of_one_context_share_its_reading(engine: EngineModel) -> None:
    fed: list[int] = []
    read = engine.llm.iter_likelihoods

    def counted(items: Any) -> Any:
        listed = list(items)
        fed.extend(len(continuations) for _, continuations in listed)
        return read(listed)

    engine.llm.iter_likelihoods = counted  # type: ignore[method-assign]
    try:
        pairs = [("The fox", f" {word}") for word in ("ran", "slept", "sang")] + [("The hare", " ran")]
        engine.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    finally:
        engine.llm.iter_likelihoods = read  # type: ignore[method-assign]
    assert sorted(fed) == [1, 3]


# Tasks from local files

QUESTIONS = [
    {"question": "The fox ran", "choices": ["home", "away from the dogs", "up"], "answer": 0},
    {"question": "A king has a", "choices": ["crown", "tail", "shell"], "answer": "crown"},
    {"question": "Snow is", "choices": ["hot", "cold"], "answer": 1},
]
PASSAGES = [{"text": "The fox ran all the way home"}, {"text": "Once upon a time there was a king\n"}]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    files = {
        "lambada_file": PASSAGES,
        "multiple_choice_file": QUESTIONS,
        "texts_file": [{"text": "The fox ran home. " * 20}],
    }
    paths = {}
    for task, rows in files.items():
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[task] = str(path)
    return paths


def test_local_tasks_give_what_the_harness_computes_itself_without_a_network(
    engine: EngineModel, reference: Any, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    tasks = ("lambada_file", "multiple_choice_file", "texts_file")
    found = run_tasks(engine.llm, TaskOptions(tasks=tasks, data_files=data))
    manager = TaskManager(
        include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"data_files": data}
    )
    expected = simple_evaluate(reference, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
    assert {result.task for result in found} == set(tasks)
    assert len(found) == 2 + 2 + 3
    for result in found:
        theirs = expected["results"][result.task][f"{result.metric},none"]
        assert result.value == pytest.approx(theirs, rel=1e-4), result
    counts = {result.task: result.num_documents for result in found}
    assert counts == {"lambada_file": 2, "multiple_choice_file": 3, "texts_file": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "metrics"),
    [
        ("loglikelihood", {"doc_to_text": "q", "doc_to_target": "a"}, {"acc"}),
        (
            "multiple_choice",
            {"doc_to_text": "q", "doc_to_choice": ["a", "slept", "ran home"], "doc_to_target": "n"},
            {"acc", "acc_norm"},
        ),
    ],
)
def test_a_task_file_of_ones_own_gives_what_the_harness_computes(
    engine: EngineModel,
    reference: Any,
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    metrics: set[str],
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = tmp_path / "rows.jsonl"
    documents = [{"q": f"The fox, number {i},", "a": " x", "n": i % 3} for i in range(6)]
    rows.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "my_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")},
        "output_type": kind,
        "test_split": "test",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
        ],
        **settings,
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "my_task.yaml").write_text(json.dumps(task))  # JSON is YAML
    options = TaskOptions(tasks=("my_task",), data_files={}, include_path=folder, limit=5)
    found = {each.metric: each for each in run_tasks(engine.llm, options)}
    assert found.keys() == metrics
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = simple_evaluate(reference, tasks=["my_task"], task_manager=manager, bootstrap_iters=0, limit=5)
    for metric, result in found.items():
        assert result.num_documents == 5
        assert result.value == pytest.approx(expected["results"]["my_task"][f"{metric},none"])


def test_the_tasks_of_the_published_table_are_the_harness_own() -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    options = TaskOptions(tasks=("ettin",), data_files={})
    names = options.names()
    assert names == list(published_tasks())
    assert len(names) == 10
    tasks = Path(lm_eval.tasks.__file__).parent
    folders = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "siqa", "triviaqa", "winogrande")
    own = [str(tasks / folder) for folder in (*folders, "wsc273")]  # all of its thousands take long to read
    manager = TaskManager(include_path=own, include_defaults=False)
    assert all(manager.match_tasks([name]) == [name] for name in names)
    found = {"results": {"triviaqa": {"exact_match,remove_whitespace": 0.03, "alias": "triviaqa"}}}
    (result,) = _results(found, size="17m")
    assert (result.metric, result.value, result.published) == ("exact_match,remove_whitespace", 0.03, 0.026)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("lambada_file", {"text": "word"}, "line 1: `text` must be a text of two words or more"),
        ("multiple_choice_file", {"question": "q", "choices": ["a"], "answer": 0}, "two texts or more"),
        ("multiple_choice_file", {"question": "q", "choices": ["a", "b"], "answer": 2}, "`answer` is 2"),
        ("texts_file", {"body": "x"}, "`text` must be a text"),
    ],
)
def test_rows_that_are_no_documents_are_named(
    engine: EngineModel, tmp_path: Path, task: str, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        run_tasks(engine.llm, TaskOptions(tasks=(task,), data_files={task: str(path)}))


def test_lambada_from_the_shared_data(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "lambada" / "lambada_test.jsonl"
    if not source.is_file():
        pytest.skip("LAMBADA is not there")
    options = TaskOptions(tasks=("lambada_file",), data_files={"lambada_file": str(source)}, limit=20)
    with LLM("storyteller", dtype="float32") as llm:
        results = {result.metric: result for result in run_tasks(llm, options, size="17m")}
    assert results["acc"].num_documents == 20
    assert results["acc"].published == 0.23
    assert results["perplexity"].published is None
    header, rows = comparison_rows(list(results.values()), size="17m")
    assert "Ettin 17m" in header
    assert len(rows) == 2


def test_eval_prints_a_table_and_json(
    folder: Path, data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    common = ["eval", "-m", str(folder), "--dtype", "float32", "--tasks", "multiple_choice_file"]
    common += ["--data", f"multiple_choice_file={data['multiple_choice_file']}"]
    assert main([*common, "--published", "32m"]) == 0
    out = capfd.readouterr().out
    assert "Ettin 32m" in out
    assert "acc_norm" in out
    assert main([*common, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert {result["metric"] for result in report["results"]} == {"acc", "acc_norm"}
    assert main([*common, "--published", "3m"]) == 2
    assert "choose one of 17m" in capfd.readouterr().err


def test_the_harness_itself_runs_our_model_by_its_name(folder: Path, data: dict[str, str]) -> None:
    # `lm_eval` knows no plug-ins; a task file that names a function of ours makes it import us.
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "modernbert-decoder"),
        *("--model_args", f"pretrained={folder},dtype=float32"),
        *("--tasks", str(TASKS_FOLDER / "lambada_file.yaml"), "--metadata"),
        json.dumps({"data_files": {"lambada_file": data["lambada_file"]}}),
    ]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|lambada_file|" in done.stdout


def test_the_harness_command_line_knows_our_model_and_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.__main__
    from lm_eval.api.registry import get_model

    from modernbert_decoder.evaluation.__main__ import main as harness

    seen: list[list[str]] = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append(sys.argv[1:]))
    for arguments in (["--tasks", "sciq"], ["ls", "tasks"], ["-t", "sciq", "--include_path", "x"]):
        monkeypatch.setattr(sys, "argv", ["python", *arguments])
        harness()
    own = ["--include_path", str(TASKS_FOLDER)]
    assert seen == [["--tasks", "sciq", *own], ["ls", "tasks"], ["-t", "sciq", "--include_path", "x"]]
    assert get_model("modernbert-decoder") is EngineModel
    assert get_model("dummy") is not None  # the harness's own are still there
