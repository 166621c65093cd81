"""What a user can do wrong ends in exit code 2 and a message on one screen, never in a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from checkpoints import BUNDLED_ARCHITECTURE
from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint
from modernbert_decoder.cli import generate, main
from modernbert_decoder.errors import InputError

PROMPT = "Once upon a time"
MBD = (sys.executable, "-m", "modernbert_decoder.cli")
SCREEN_LINES = 24
SCREEN_CHARACTERS = 24 * 80


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MBD_DEBUG", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model to damage."""
    return Path(shutil.copytree(find_checkpoint(BUNDLED_MODEL), tmp_path / "model"))


def check_message(code: int, out: str, message: str) -> str:
    """A user's error: nothing on standard output, one screen on standard error; returns the message."""
    assert code == 2, message
    assert out == ""
    assert message.startswith("mbd: error: ")
    assert "Traceback" not in message
    assert len(message.splitlines()) <= SCREEN_LINES
    assert len(message) <= SCREEN_CHARACTERS
    return message


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail, in this process."""
    code = main(arguments)
    captured = capsys.readouterr()
    return check_message(code, captured.out, captured.err)


def run(
    *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """`mbd` as a process of its own."""
    return subprocess.run(
        [*MBD, *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, **(environment or {})},
        timeout=120,
        check=False,
        **options,
    )


def error_of_process(*arguments: str, **options: Any) -> str:
    done = run(*arguments, **options)
    return check_message(done.returncode, done.stdout.decode(), done.stderr.decode())


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "model.safetensors"
    tensors = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def truncate_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(10_000))


def narrow_intermediate_size(model: Path) -> None:
    change_config(model, intermediate_size=512)


def remove_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def extend_tokenizer(model: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens(["[beyond]"])
    tokenizer.save(str(model / "tokenizer.json"))


def move_eos_outside(model: Path) -> None:
    change_config(model, eos_token_id=50_000)


def put_nan_into_a_matrix(model: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.3.mlp.Wi.weight"][0, 0] = np.nan

    change_tensors(model, change)


def put_nan_into_a_norm(model: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.final_norm.weight"][0] = np.nan

    change_tensors(model, change)


def drop_a_tensor(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop("model.final_norm.weight"))


def leave_only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def remove_config(model: Path) -> None:
    (model / "config.json").unlink()


def nest_tokenizer_config(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("[" * 100_000)


def put_an_endless_number_into_the_header(model: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %b]}}' % (b"1" * 5000)
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


DAMAGES = [
    (truncate_weights, "cut off"),
    (scramble_weights, "damaged"),
    (narrow_intermediate_size, "misshapen"),
    (drop_a_tensor, "1 missing: model.final_norm.weight"),
    (remove_tokenizer, "no tokenizer.json"),
    (extend_tokenizer, f"beyond the embedding's {BUNDLED_ARCHITECTURE.vocab_size} rows"),
    (move_eos_outside, "eos_token_id is 50000"),
    (put_nan_into_a_matrix, "NaN"),
    (put_nan_into_a_norm, "NaN"),
    (leave_only_a_pickle, "Pickle files are refused"),
    (remove_config, "config.json"),
    (nest_tokenizer_config, "tokenizer_config.json"),
    (put_an_endless_number_into_the_header, "its header is not valid JSON"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_generate_says_what_is_wrong_with_a_model(
    damage: Callable[[Path], None], words: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    assert words in error_of(capsys, "generate", "--model", str(model), PROMPT)


@pytest.mark.parametrize("damage", [put_nan_into_a_matrix, put_nan_into_a_norm])
def test_float32_refuses_nan_too(
    damage: Callable[[Path], None], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    assert "NaN" in error_of(capsys, "generate", "--model", str(model), "--dtype", "float32", PROMPT)


@pytest.mark.parametrize("damage", [truncate_weights, narrow_intermediate_size, put_nan_into_a_matrix])
def test_quantize_of_a_damaged_model_leaves_nothing_behind(
    damage: Callable[[Path], None], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    before = sorted(tmp_path.iterdir())
    error_of(capsys, "quantize", "--dtype", "int8", str(model), str(tmp_path / "packed"))
    assert sorted(tmp_path.iterdir()) == before


ARGUMENTS = [
    (("generate", ""), "the prompt is empty"),
    (("generate", "--max-tokens", "2000", PROMPT), "--max-tokens is 2000, but the context holds 1024"),
    (("generate", "word " * 2000), "shorten the prompt"),
    (("generate", "--max-tokens", "context", "word " * 2000), "shorten the prompt"),
    (("generate", "--max-tokens", "many", PROMPT), "neither a number nor the word context"),
    (("generate", "--max-tokens", "0", PROMPT), "max_tokens must be an integer, at least 1"),
    (("generate", "--temperature", "-1", PROMPT), "temperature must be"),
    (("generate", "--top-p", "3", PROMPT), "top_p must be between 0 and 1"),
    (("generate", "--temperature", "0", "--n", "2", PROMPT), "n must be 1 when temperature is 0"),
    (("generate", "--stop", "", PROMPT), "stop must not contain an empty string"),
    (("generate", "--logprobs", "1", PROMPT), "add --json"),
    (
        ("generate", "--json", "--logprobs", "50000", PROMPT),
        f"size of the vocabulary ({BUNDLED_ARCHITECTURE.vocab_size})",
    ),
    (("generate", "--threads", "0", PROMPT), "threads"),
    (("generate", "--threads", "100000", PROMPT), "threads"),
    (("generate", "--n", "1000000000", PROMPT), "n must be an integer, between 1 and 16384"),
    (
        ("generate", "--max-context", "5000", PROMPT),
        "max_context must be an integer from 2 to the model's 1024, got 5000",
    ),
    (("generate", "--dtype", "int3", PROMPT), "int3"),
    (("generate", "--revision", "main", PROMPT), "revision 'main' applies to models on the Hub"),
    (("generate", "--model", "no/such/place", PROMPT), "Tried:"),
    (("generate", "--flavour", "vanilla", PROMPT), "Try `mbd generate --help`"),
    (
        ("run", "--task", "translation", PROMPT),
        "mbd run knows text-generation, text-classification, zero-shot",
    ),
    (("run", "--task", "text-classification", PROMPT), "no trained classifier (it is a language model)"),
    (("run", "--task", "zero-shot-classification", PROMPT), "candidate_labels must be"),
    (
        ("run", "--task", "feature-extraction", "--seed", "1", PROMPT),
        "--seed does nothing for feature-extraction",
    ),
    (("run", "--candidate-labels", "a,b", PROMPT), "--candidate-labels does nothing for text-generation"),
    (("run", "--device", "tpu", PROMPT), "device 'tpu' is not available"),
    (("run", "--device", "cuda:7", PROMPT), "device 'cuda:7' is not available"),
    (("info", "./no-such-folder"), "no model found"),
    (("info",), "Missing argument"),
    (("quantize", "--dtype", "int8", "--quiet", "--json", "storyteller", "out"), "contradict"),
    (("bench", "--size", "17m", "storyteller"), "--size brings its own random weights"),
    (("genrate",), "No such command"),
]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS, ids=lambda value: " ".join(value)[:50])
def test_a_wrong_argument_is_explained(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(capsys, *arguments)


@pytest.mark.parametrize("device", ["0", "cuda", "gpu"])
def test_a_gpu_is_refused_where_the_runtime_has_none(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "runs models on the CPU" in error_of(capsys, "run", "--device", device, PROMPT)


@pytest.mark.parametrize("stdin", [b"", b"\n"])
def test_an_empty_standard_input_is_an_empty_prompt(stdin: bytes) -> None:
    assert "the prompt is empty" in error_of_process("generate", stdin=stdin)


def test_invalid_utf8_on_standard_input_is_refused_with_the_place() -> None:
    message = error_of_process("generate", stdin="Café".encode("latin-1"))
    assert "not valid UTF-8 (byte 3 is 0xe9)" in message


def test_invalid_utf8_on_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    argument = os.fsdecode("Café".encode("latin-1"))
    assert "not valid UTF-8" in error_of(capsys, "generate", argument)


def test_an_unknown_model_while_offline_lists_what_was_tried(tmp_path: Path) -> None:
    message = error_of_process(
        *("generate", "--model", "nobody/no-such-model", PROMPT),
        environment={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert "HF_HUB_OFFLINE" in message
    assert "bundled models: storyteller" in message


def test_a_cache_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    # Below a file nobody can create a folder, not even root, whom permissions do not stop.
    (tmp_path / "file").write_text("")
    arguments = ("generate", "--seed", "1", "--max-tokens", "5", PROMPT)
    done = run(*arguments, environment={"MBD_CACHE": str(tmp_path / "file" / "cache")})
    assert done.returncode == 0
    assert done.stdout == run(*arguments).stdout
    warning = done.stderr.decode()
    assert warning.startswith("mbd: warning: quantized weights cannot be kept")
    assert warning.count("\n") == 1
    assert ".py" not in warning


def test_an_unknown_configuration_key_is_a_warning_on_one_line(model: Path) -> None:
    change_config(model, colour_of_the_cover="green")
    done = run("generate", "--model", str(model), "--dtype", "float32", "--max-tokens", "5", PROMPT)
    assert done.returncode == 0
    assert done.stderr.startswith(b"mbd: warning: ")
    assert b"colour_of_the_cover" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is POSIX's")
def test_a_disk_that_fills_up_while_quantizing_leaves_nothing_behind(tmp_path: Path) -> None:
    def limit_file_size() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    place = tmp_path / "place"
    message = error_of_process(
        *("quantize", "--dtype", "int8", "storyteller", str(place / "packed")), preexec_fn=limit_file_size
    )
    assert f"cannot write {place / 'packed'}" in message
    assert list(place.iterdir()) == []


def test_quantize_keeps_what_stands_at_the_destination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "out" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    arguments = ("quantize", "--dtype", "int8", "storyteller", str(notes.parent))
    assert "not empty" in error_of(capsys, *arguments)
    assert "not a model folder" in error_of(capsys, *arguments, "--overwrite")
    assert "is a file" in error_of(capsys, *arguments[:-1], str(notes))
    assert notes.read_text() == "mine"


def test_packed_weights_are_neither_packed_again_nor_read_in_another_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = str(tmp_path / "packed")
    assert main(["quantize", "--quiet", "--dtype", "int8", "storyteller", packed]) == 0
    again = error_of(capsys, "quantize", "--dtype", "int4", packed, str(tmp_path / "again"))
    assert "quantize the original" in again
    assert "holds int8 weights" in error_of(capsys, "generate", "--model", packed, "--dtype", "int4", PROMPT)


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_shows_the_traceback_of_a_users_error(
    way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "variable":
        monkeypatch.setenv("MBD_DEBUG", "1")
    assert main([*(["--debug"] if way == "option" else []), "generate", "--top-p", "3", PROMPT]) == 2
    message = capsys.readouterr().err
    assert message.startswith("Traceback")
    assert InputError.__name__ in message
    assert message.splitlines()[-1].startswith("mbd: error: top_p")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(generate.command, "callback", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["generate", PROMPT])


def test_a_clean_up_that_ctrl_c_broke_is_still_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AssertionError("the clean-up met a half-finished step")

    monkeypatch.setattr(generate.command, "callback", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["generate", PROMPT]) == 130
