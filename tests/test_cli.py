"""The command line does what its help says: every command, its streams, its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoints import BUNDLED_ARCHITECTURE
from modernbert_decoder import __version__, machine
from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.cli import bench, completion_options, main
from modernbert_decoder.cli.application import COMMANDS
from modernbert_decoder.cli.interrupts import interrupts_deferred
from pipeline_checkpoints import CLASSIFIER, write_with_tokenizer

PROMPT = "Once upon a time"
MBD = (sys.executable, "-m", "modernbert_decoder.cli")
# The most frequent words of English prose, which gibberish of letters does not hit.
FUNCTION_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        """a all an and are as at be but by could did do down for from had have he her him his i if in into
        is it its me my no not now of on one or out said she so that the their them then there
        they this to up very was we were what when which who will with would you your""",
    )
)
# More text than is generated before a test is done with it.
ENDLESS = ("generate", "--n", "64", "--max-tokens", "context", "--ignore-eos", PROMPT)
HEAVY = ("numpy", "onnx", "onnxruntime", "tokenizers", "safetensors", "huggingface_hub", "tqdm", "torch")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MBD_DEBUG", raising=False)


def run(
    *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """`mbd` as a process of its own."""
    return subprocess.run(
        [*MBD, *arguments],
        input=stdin,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        timeout=120,
        check=False,
        **options,
    )


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `mbd` prints, in this process; it must succeed and say nothing else."""
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


# generate


def test_generate_prints_the_prompt_the_text_and_one_line_break(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "generate", "--seed", "1", "--max-tokens", "12", PROMPT)
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 10
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_no_echo_leaves_out_the_prompt_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--seed", "1", "--max-tokens", "12", PROMPT)
    whole = output(capsys, "generate", *options)
    assert PROMPT + output(capsys, "generate", "--no-echo", *options) == whole


def test_the_same_seed_gives_the_same_text_and_another_seed_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [
        output(capsys, "generate", "--seed", seed, "--max-tokens", "20", PROMPT) for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stdin", [b"Once upon a time", b"Once upon a time\n", b"Once upon a time\r\n"])
@pytest.mark.parametrize("arguments", [(), ("-",)], ids=["missing", "dash"])
def test_a_prompt_from_standard_input_equals_one_from_the_command_line(
    stdin: bytes, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("generate", "--seed", "1", "--max-tokens", "5")
    done = run(*options, *arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == output(capsys, *options, PROMPT)


def test_only_the_last_line_break_of_standard_input_is_taken_away() -> None:
    done = run("generate", "--json", "--max-tokens", "1", stdin=b"\na\n\n")
    assert json.loads(done.stdout)["prompt"] == "\na\n"


def test_json_is_one_object_and_holds_prompt_completions_and_timings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = output(
        capsys,
        *("generate", "--json", "--n", "2", "--seed", "3", "--max-tokens", "6", "--logprobs", "2"),
        PROMPT,
    )
    assert printed.count("\n") == 1
    report = json.loads(printed)
    assert report["prompt"] == PROMPT
    assert report["prompt_token_ids"][0] == 1
    assert [completion["index"] for completion in report["outputs"]] == [0, 1]
    for completion in report["outputs"]:
        assert completion["finish_reason"] in ("stop", "length")
        assert len(completion["logprobs"]) == len(completion["token_ids"]) <= 6
        chosen = [entries[0] for entries in completion["logprobs"]]
        assert [entry["token_id"] for entry in chosen] == completion["token_ids"]
        assert completion["cumulative_logprob"] == pytest.approx(sum(entry["logprob"] for entry in chosen))
    assert set(report["timings"]) == {
        "load_seconds",
        "time_to_first_token_seconds",
        "decode_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }
    assert report["sampling_params"]["top_k"] == 50
    assert report["kv_cache_bytes"] > 0


def test_several_completions_are_printed_one_after_the_other_and_labelled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--n", "3", "--seed", "5", "--max-tokens", "8", PROMPT)
    texts = [each["text"] for each in json.loads(output(capsys, "generate", "--json", *options))["outputs"]]
    expected = "".join(
        f"--- completion {number} of 3 ---\n{PROMPT}{text}" + "\n" * (not text.endswith("\n"))
        for number, text in enumerate(texts, 1)
    )
    assert output(capsys, "generate", *options) == expected


def test_max_tokens_context_fills_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--json", "--max-tokens", "context", "--max-context", "20", "--ignore-eos", PROMPT)
    report = json.loads(output(capsys, "generate", *options))
    assert len(report["prompt_token_ids"]) + len(report["outputs"][0]["token_ids"]) == 20


def test_stop_ends_the_text_in_front_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--json", "--seed", "1", "--stop", " the", "--stop", ",", PROMPT)
    completion = json.loads(output(capsys, "generate", *options))["outputs"][0]
    assert completion["stop_reason"] in (" the", ",")
    assert completion["stop_reason"] not in completion["text"]


def test_stats_go_to_standard_error_and_leave_standard_output_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--seed", "1", "--max-tokens", "8", PROMPT)
    plain = output(capsys, "generate", *options)
    assert main(["generate", "--stats", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == plain
    assert [line[:12].strip() for line in captured.err.splitlines()] == [
        "model",
        "prompt",
        "first token",
        "completion",
        "KV cache",
    ]


def share_of_function_words(text: str) -> float:
    words = re.findall("[a-z]+", text.lower())
    assert len(words) > 50
    return sum(word in FUNCTION_WORDS for word in words) / len(words)


def test_the_bundled_model_writes_english(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--no-echo", "--seed", "1", "--max-tokens", "120", "--ignore-eos")
    text = output(capsys, "generate", *options, PROMPT)
    assert share_of_function_words(text) >= 0.35, text
    assert share_of_function_words(text[::-1]) < 0.35, "the measure does not tell text from gibberish"


# run


def test_the_documented_run_command_reads_standard_input_and_writes_text() -> None:
    arguments = (
        "--task",
        "text-generation",
        "--model",
        "storyteller",
        "--device",
        "cpu",
        "--max-tokens",
        "5",
    )
    done = run("run", *arguments, stdin=b"The future of AI is\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"The future of AI is")


@pytest.mark.parametrize("device", ["cpu", "-1", "auto"])
def test_run_equals_generate_on_every_spelling_of_the_cpu(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--seed", "1", "--max-tokens", "5", PROMPT)
    assert output(capsys, "run", "--device", device, *options) == output(capsys, "generate", *options)


def test_run_labels_lines_of_standard_input_one_json_value_a_line() -> None:
    options = (
        "run",
        "--task",
        "zero-shot-classification",
        "--candidate-labels",
        "animals, the sea",
        "--threads",
        "1",
    )
    done = run(*options, stdin=b"The fox ran home.\r\n\nA ship.")
    assert (done.returncode, done.stderr) == (0, b"")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["sequence"] for result in results] == ["The fox ran home.", "", "A ship."]
    assert all(sorted(result["labels"]) == ["animals", "the sea"] for result in results)
    alone = run(*options, "The fox ran home.")
    assert json.loads(alone.stdout)["labels"] == results[0]["labels"]
    assert json.loads(alone.stdout)["scores"] == pytest.approx(results[0]["scores"], abs=1e-3)


def test_run_classifies_and_extracts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_with_tokenizer(tmp_path / "m", head=CLASSIFIER, id2label={0: "bad", 1: "good"})
    options = ("run", "--model", str(folder), "--dtype", "float32", "--task")
    best = json.loads(output(capsys, *options, "text-classification", "Hello"))
    every = json.loads(output(capsys, *options, "text-classification", "--top-k", "2", "Hello"))
    assert best == every[0]
    assert sum(entry["score"] for entry in every) == pytest.approx(1)
    raw = json.loads(output(capsys, *options, "text-classification", "--function-to-apply", "none", "Hello"))
    assert raw != best
    states = json.loads(output(capsys, *options, "feature-extraction", "--truncation", "word " * 3000))
    assert (len(states), len(states[0]), len(states[0][0])) == (1, 1024, 64)


# info, quantize, bench


def test_info_shows_architecture_sizes_and_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "info", "storyteller")
    kinds = BUNDLED_ARCHITECTURE.layer_kinds
    full = ", ".join(str(i) for i, kind in enumerate(kinds) if kind is LayerKind.FULL)
    for words in (
        f"full attention in {full}",
        "window of 64",
        f"{BUNDLED_ARCHITECTURE.num_parameters():,}",
        "F16",
        "at most tokens/s",
    ):
        assert words in text


def test_info_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(output(capsys, "info", "--json", "--threads", "1", "storyteller"))
    parts = report["parameters"]
    assert parts["total"] == parts["embedding"] + parts["body"] + parts["head"]
    assert parts["total"] == BUNDLED_ARCHITECTURE.num_parameters()
    bandwidth = report["machine"]["read_bytes_per_second"]
    steps = [entry["bytes_per_step"] for entry in report["decode"]["formats"].values()]
    assert steps == sorted(steps, reverse=True)
    for entry in report["decode"]["formats"].values():
        assert entry["ceiling_tokens_per_second"] * entry["bytes_per_step"] == pytest.approx(bandwidth)
    longest = report["kv_cache"][-1]
    assert longest["length"] == 1024
    share = BUNDLED_ARCHITECTURE.num_full_layers / BUNDLED_ARCHITECTURE.num_hidden_layers
    assert share < longest["bytes"] / longest["bytes_with_all_layers_in_full"] < share + 0.1


def test_a_quantized_folder_loads_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "packed")
    table = output(capsys, "quantize", "--dtype", "int4", "storyteller", folder)
    assert "lm_head.dense.weight" in table
    assert "became" in table.splitlines()[-1]
    options = ("--json", "--temperature", "0", "--max-tokens", "8", PROMPT)
    packed = json.loads(output(capsys, "generate", "--model", folder, *options))
    direct = json.loads(output(capsys, "generate", "--dtype", "int4", *options))
    assert packed["outputs"] == direct["outputs"]
    assert packed["dtype"] == direct["dtype"] == "int4 body, int8 vocabulary"
    assert json.loads(output(capsys, "info", "--json", folder))["stored_as"] == packed["dtype"]


def test_quantize_json_reports_every_matrix_and_the_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dtype", "int8", "--vocabulary-dtype", "float32", "--json", "storyteller")
    report = json.loads(output(capsys, "quantize", *arguments, str(tmp_path / "packed")))
    assert len(report["matrices"]) == 4 * BUNDLED_ARCHITECTURE.num_hidden_layers + 1
    assert all(0 < matrix["relative_error"] < 0.02 for matrix in report["matrices"])
    embedding = BUNDLED_ARCHITECTURE.vocab_size * BUNDLED_ARCHITECTURE.hidden_size
    layers = report["weight_bytes_after"] - 4 * embedding  # from float16
    assert 0 < layers < report["weight_bytes_before"] - 2 * embedding


def test_quiet_quantize_prints_nothing_and_overwrite_replaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    for _ in range(2):
        arguments = ("--dtype", "int8", "--quiet", "--overwrite", "storyteller", str(folder))
        assert output(capsys, "quantize", *arguments) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.fixture
def short_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(bench, "DECODE_TOKENS", 4)


@pytest.mark.usefixtures("short_bench")
def test_bench_measures_every_format_with_one_and_eight_sequences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = json.loads(output(capsys, "bench", "--json"))
    rows = [(row["dtype"], row["sequences"]) for row in report["measurements"]]
    assert rows == [
        (name, count) for name in ("float32", "int8", "int4 body, int8 vocabulary") for count in (1, 8)
    ]
    for row in report["measurements"]:
        low, high = row["decode_spread"]
        assert low <= row["decode_tokens_per_second"] <= high


@pytest.mark.usefixtures("short_bench")
def test_bench_runs_a_released_size_with_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "bench", "--size", "17m", "--dtype", "int4", "--threads", "1")
    assert text.startswith("17m with random weights: 16.9 M parameters, 1 threads")
    assert text.count("int4 body") == 2


# The command itself


def test_cache_shows_what_a_start_left_behind_and_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MBD_CACHE", str(folder))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}\n")
    assert main(["generate", "--max-tokens", "1", "The old king"]) == 0
    (folder / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(["cache", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stored = {
        name: sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        for name in ("packed", "graphs")
    }
    assert report == {"folder": str(folder), "bytes": stored, "cleared": False}
    assert min(stored.values()) > 0
    assert main(["cache", "--clear"]) == 0
    assert "now empty" in capsys.readouterr().out
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["notes.txt"]
    assert main(["generate", "--max-tokens", "1", "The old king"]) == 0


def test_the_command_line_knows_the_limit_of_threads() -> None:
    assert completion_options.MAX_THREADS == machine.MAX_THREADS


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--version") == f"mbd {__version__}\n"


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys) == output(capsys, "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed_and_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"  {command} " in output(capsys, "--help")
    assert output(capsys, command, "--help").startswith(f"Usage: mbd {command} ")


@pytest.mark.parametrize("arguments", [("--help",), *((command, "--help") for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: Sequence[str]) -> None:
    code = f"""
import sys
from modernbert_decoder.cli import main
main({list(arguments)!r})
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stderr.split())
    assert not loaded & set(HEAVY)
    if len(arguments) == 2:  # a command imports only itself
        others = {f"modernbert_decoder.cli.{name}" for name in COMMANDS if name != arguments[0]}
        assert not loaded & others


# Streams and signals


def test_ctrl_c_keeps_the_text_so_far_and_exits_with_130() -> None:
    expected = f"--- completion 1 of 64 ---\n{PROMPT}".encode()
    with subprocess.Popen([*MBD, *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        shown = process.stdout.read(len(expected) + 10)
        process.send_signal(signal.SIGINT)
        shown += process.stdout.read()
        said = process.stderr.read()
    assert (process.returncode, said) == (130, b"")
    assert shown.startswith(expected)
    assert shown.endswith(b"\n")


def test_ctrl_c_while_libraries_load_takes_effect_once_they_are_there() -> None:
    loaded = []

    def load() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            loaded.append("library")

    with pytest.raises(KeyboardInterrupt):
        load()
    assert loaded == ["library"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_pipe_ends_generation_quietly() -> None:
    with subprocess.Popen([*MBD, *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(4) == b"--- "
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_help_into_a_closed_pipe_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run("--help", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_told_in_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = run("generate", "--max-tokens", "5", PROMPT, stdout=full)
    assert done.returncode == 2
    assert done.stderr.decode() == "mbd: error: cannot write to standard output: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), (), ("generate", "--help")], ids=str)
def test_help_and_version_into_a_full_disk_are_told_in_one_line(
    arguments: Sequence[str], unbuffered: str
) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdout=full, environment={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert done.stderr.decode() == "mbd: error: cannot write to standard output: No space left on device\n"


def test_characters_that_the_encoding_lacks_become_question_marks() -> None:
    arguments = ("generate", "--max-tokens", "1", "--temperature", "0", "Café au lait")
    done = run(*arguments, environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.startswith(b"Caf? au lait")


def test_json_survives_every_encoding() -> None:
    done = run("generate", "--json", "--max-tokens", "1", "Café", environment={"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["prompt"] == "Café"


def test_without_a_terminal_there_are_no_progress_bars_or_escape_codes(tmp_path: Path) -> None:
    done = run("quantize", "--dtype", "int8", "storyteller", str(tmp_path / "packed"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert b"\r" not in done.stdout
