"""`mbd eval`: perplexity over stated windows, and the harness's numbers as its own `hf` model gives them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head, released_architecture
from modernbert_decoder.cli import main
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.errors import InputError
from modernbert_decoder.evaluation.perplexity import Measure, file_perplexities
from modernbert_decoder.evaluation.published import (
    COLUMNS,
    published_result,
    published_sizes,
    released_size,
)

CONTEXT = 128
TEXTS = ("Once upon a time there was a king. " * 9, "The fox ran home; the hare did not.", "Café " * 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = tiny_architecture(max_position_embeddings=CONTEXT)
    return write_checkpoint(tmp_path_factory.mktemp("evaluated") / "model", architecture)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(folder, dtype="float32") as llm:
        yield llm


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = []
    for i, text in enumerate(TEXTS):
        path = tmp_path / f"{i}.txt"
        path.write_text(text, encoding="utf-8")
        names.append(str(path))
    return names


def naive(llm: LLM, window: list[int], num_new: int) -> float:
    """Nats of the last tokens of a window, from one reading of it."""
    (score,) = llm.score([window])
    return -math.fsum(score.logprobs[len(score.logprobs) - num_new :])


# Perplexity of files


@pytest.mark.parametrize("stride", [None, 50, 13])
def test_concatenated_windows_predict_every_token_once(
    llm: LLM, files: list[str], stride: int | None
) -> None:
    tokenizer = llm.tokenizer
    ids = [i for text in TEXTS for i in [*tokenizer.encode(text), tokenizer.sep_token_id]]
    step, nats, known = stride or CONTEXT - 1, 0.0, 1
    for begin in range(0, len(ids), step):
        end = min(begin + CONTEXT, len(ids))
        if end > known:
            nats += naive(llm, ids[begin:end], end - known)
            known = end
    measure = Measure(stride=stride, concatenate=True)
    (found,) = file_perplexities(llm, files, measure=measure)
    assert found.num_tokens == len(ids) - 1
    assert found.num_documents == len(TEXTS)
    assert found.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.num_bytes, rel=1e-5)


@pytest.mark.parametrize("stride", [None, 40])
def test_documents_by_themselves_are_what_the_engine_scores(
    llm: LLM, files: list[str], stride: int | None
) -> None:
    scores = llm.score(list(TEXTS), stride=stride or CONTEXT - 1)
    *each, total = file_perplexities(llm, files, measure=Measure(stride=stride))
    assert [found.name for found in each] == files
    for found, score in zip(each, scores, strict=True):
        assert found.nats == pytest.approx(-score.total_logprob, rel=1e-6)
        assert found.perplexity == pytest.approx(score.perplexity, rel=1e-6)
    assert total.name == "all"
    assert total.num_tokens == sum(score.num_tokens for score in scores)
    assert total.nats == pytest.approx(-sum(score.total_logprob for score in scores), rel=1e-6)


def test_rows_of_a_file_are_documents(llm: LLM, files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS), encoding="utf-8")
    *_, expected = file_perplexities(llm, files, measure=Measure())
    *_, found = file_perplexities(llm, [str(path)], measure=Measure(), column="body")
    assert (found.num_documents, found.nats) == (3, pytest.approx(expected.nats, rel=1e-6))
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1: "):
        list(file_perplexities(llm, [str(path)], measure=Measure()))


@pytest.mark.parametrize("concatenate", [False, True])
def test_a_stride_beyond_the_window_is_refused(llm: LLM, files: list[str], concatenate: bool) -> None:
    with pytest.raises(InputError, match="stride"):
        list(file_perplexities(llm, files, measure=Measure(stride=CONTEXT, concatenate=concatenate)))


def test_the_measure_is_that_of_the_model_cards(shared: Path, tmp_path: Path) -> None:
    books = sorted((shared / "corpus").glob("wilde-*.txt"))[:2]
    if not books:
        pytest.skip("the corpus is not there")
    files, ids = [], []
    with LLM("storyteller", dtype="float32", max_context=512) as llm:
        for book in books:
            text = book.read_text(encoding="utf-8")[:6000]
            path = tmp_path / book.name
            path.write_text(text, encoding="utf-8")
            files.append(str(path))
            ids += [*llm.tokenizer.encode(text), llm.tokenizer.sep_token_id]
        windows = [ids[begin : begin + 512] for begin in range(0, len(ids) - 1, 511)]
        nats = -sum(score.total_logprob for score in llm.score(windows))
        (found,) = file_perplexities(llm, files, measure=Measure(stride=511, concatenate=True))
    num_bytes = sum(Path(file).stat().st_size for file in files)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert 1.0 < found.bits_per_byte < 2.0  # a trained model on ordinary English


def test_eval_prints_what_it_measured(
    folder: Path, llm: LLM, files: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "-m", str(folder), "--dtype", "float32", "--stride", "50"]
    assert main([*arguments, *files]) == 0
    out = capfd.readouterr().out
    assert "in windows of 128 tokens every 50, each behind [CLS]" in out
    assert len(out.splitlines()) == 1 + len(files) + 1 + 2
    assert main([*arguments, *files, "--json", "--concatenate"]) == 0
    report = json.loads(capfd.readouterr().out)
    (expected,) = file_perplexities(llm, files, measure=Measure(stride=50, concatenate=True))
    assert report["files"][0]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert (report["window"], report["stride"], report["concatenate"]) == (CONTEXT, 50, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give files"),
        (["a.txt", "--tasks", "sciq"], "one of the two"),
        (["a.txt", "--limit", "3"], "--limit goes with --tasks"),
        (["--tasks", "sciq", "--stride", "3"], "--stride goes with files"),
        (["--tasks", "lambada_file"], "name it with --data lambada_file=FILE.jsonl"),
        (["--tasks", "sciq", "--data", "lambada_file=x"], "not among the tasks"),
        (["--tasks", "sciq", "--data", "sciq"], "names no file"),
        (["missing.txt"], "there is no file missing.txt"),
    ],
)
def test_eval_refuses_what_it_would_not_heed(
    folder: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "-m", str(folder), *arguments]) == 2
    assert message in capfd.readouterr().err


# Likelihoods in the engine


def test_likelihoods_equal_the_scores_of_the_whole_texts(llm: LLM) -> None:
    context = llm.tokenizer.encode("Once upon a time there was a")
    tails = [list(b" king"), list(b" k"), list(b" very old queen"), list(b" king")]
    (several,) = llm.iter_likelihoods([(context, tails)])
    for tail, likelihood in zip(tails, several, strict=True):
        (score,) = llm.score([[*context, *tail]])
        assert likelihood.logprob == pytest.approx(math.fsum(score.logprobs[-len(tail) :]), abs=1e-4)
        ((alone,),) = llm.iter_likelihoods([(context, [tail])])
        assert alone.logprob == pytest.approx(likelihood.logprob, abs=1e-4)
        assert alone.is_greedy is likelihood.is_greedy


def test_greedy_continuations_are_told_from_others(llm: LLM) -> None:
    from modernbert_decoder.engine.sampling_params import SamplingParams

    context = llm.tokenizer.encode("The old king")
    (output,) = llm.generate([context], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    best = list(output.outputs[0].token_ids)
    wrong = best[0] ^ 1
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    (after_wrong,) = llm.generate([[*context, wrong]], params)  # greedy, but for its first token
    wrong_first = [wrong, *after_wrong.outputs[0].token_ids]
    wrong_last = [*best[:-1], best[-1] ^ 1]
    (found,) = llm.iter_likelihoods([(context, [best, wrong_first, wrong_last, best[:1]])])
    assert [likelihood.is_greedy for likelihood in found] == [True, False, False, True]
    alone = llm.iter_likelihoods([(context, [tail]) for tail in (best, wrong_first, wrong_last)])
    assert [likelihood.is_greedy for (likelihood,) in alone] == [True, False, False]


def test_likelihoods_of_bad_items_say_what_is_wrong(llm: LLM) -> None:
    bad = [([], [[1]]), ([1], []), ([1], [[]]), ([1], [[5000]]), ([1] * CONTEXT, [[1, 2]]), ([1], [[2]])]
    *errors, good = llm.iter_likelihoods(bad)
    messages = [getattr(error, "message", "") for error in errors]
    for message, part in zip(
        messages,
        ["no token ids", "no continuations", "no token ids", "from 0 to 319", "shorten the context"],
        strict=True,
    ):
        assert part in message
    assert len(good) == 1


def test_likelihoods_need_a_language_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "classifier", tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION))
    with LLM(tmp_path / "classifier") as classifier, pytest.raises(InputError, match="classification head"):
        classifier.iter_likelihoods([([1], [[2]])])


# The published table


def test_published_results_are_those_of_the_paper() -> None:
    assert published_sizes() == ("17m", "32m", "68m", "150m", "400m", "1b")
    means = {"17m": 36.4, "32m": 38.7, "68m": 41.8, "150m": 46.2, "400m": 53.1, "1b": 59.0}
    for size, mean in means.items():
        values = [published_result(size, task, metric) for task, metric in COLUMNS.values()]
        assert 100 * np.mean(np.array(values, float)) == pytest.approx(mean, abs=0.06)
    assert published_result("1b", "lambada_file", "acc") == 0.584
    assert published_result("1b", "mmlu", "acc") is None


def test_released_sizes_are_recognized() -> None:
    assert released_size(released_architecture("150m")) == "150m"
    assert released_size(tiny_architecture()) is None


def test_tasks_without_the_harness_say_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    data = f"lambada_file={tmp_path}"
    assert main(["eval", "-m", str(folder), "--tasks", "lambada_file", "--data", data]) == 2
    assert 'pip install "modernbert-decoder[eval]"' in capfd.readouterr().err
