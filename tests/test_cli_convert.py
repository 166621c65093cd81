"""`mbd convert`: its summary, its JSON, and one plain message for every mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import byte_tokenizer, tiny_architecture, write_checkpoint
from encoder_checkpoints import (
    contents,
    encoder_tensors,
    flexbert_config,
    flexbert_tensors,
    write,
    write_encoder,
)
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.cli import main


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "decoder", tiny_architecture())
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_a_decoder_becomes_an_encoder_and_a_decoder_again(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(decoder), str(tmp_path / "encoder"), "--to", "encoder"]) == 0
    assert main(["convert", str(tmp_path / "encoder"), str(tmp_path / "back"), "--to", "decoder"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for part in (
        "decoder -> encoder",
        "4 joined from q, k and v, 2 renamed",
        "64 tokens to either side",
        "encoder -> decoder",
        "4 split into q, k and v, 2 renamed",
        "64 tokens, self included",
        "160000 full, 160000 sliding",
        "tokenizer.json",
    ):
        assert part in captured.out
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == _as_written(decoder, tmp_path).read_bytes()


def _as_written(decoder: Path, tmp_path: Path) -> Path:
    """The decoder's weights, which `write_checkpoint` wrote with the same header."""
    assert Checkpoint.open(tmp_path / "back").names() == Checkpoint.open(decoder).names()
    return decoder / "model.safetensors"


def test_json_is_one_object_with_the_counts(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--json", str(decoder), str(tmp_path / "out"), "--to", "encoder"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    report = json.loads(captured.out)
    assert (report["from"], report["to"], report["num_joined"], report["num_split"]) == (
        "decoder",
        "encoder",
        4,
        0,
    )
    assert report["num_read"] - report["num_written"] == 2 * 4
    assert report["window"] == 64
    assert report["rope_theta"] == {"full_attention": 160000.0, "sliding_attention": 160000.0}
    assert report["copied"] == ["tokenizer.json"]


def test_quiet_prints_nothing_and_overwrite_replaces(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", "--quiet", str(decoder), str(tmp_path / "out"), "--to", "encoder"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "exists and is not empty" in captured.err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.filterwarnings("default")
def test_a_limitation_is_a_warning_on_standard_error(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--quiet", str(decoder), str(tmp_path / "encoder"), "--to", "encoder"]) == 0
    config = json.loads((tmp_path / "encoder" / "config.json").read_text(encoding="utf-8"))
    del config["local_rope_theta"], config["rope_parameters"]
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = ["convert", "--json", str(tmp_path / "encoder"), str(tmp_path / "back"), "--to", "decoder"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("mbd: warning: transformers 4 will use the RoPE base 160000.0")
    assert json.loads(captured.out)["limitations"][0] in captured.err


@pytest.mark.filterwarnings("default")
def test_a_trainers_checkpoint_becomes_a_decoder_with_the_context_that_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = tiny_architecture(classifier_bias=True)
    config = flexbert_config(architecture, max_seq_len=..., max_position_embeddings=...)
    trainer = write(tmp_path / "trainer", config, flexbert_tensors(encoder_tensors(architecture)))
    arguments = ["convert", str(trainer), str(tmp_path / "decoder"), "--to", "decoder"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "--max-positions" in captured.err
    assert not (tmp_path / "decoder").exists()
    assert main([*arguments, "--max-positions", "777"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for part in (
        "flexbert -> decoder",
        "4 split into q, k and v",
        "1 copies of the tied embedding left out",
        "64 tokens, self included",
        "tokenizer.json",
    ):
        assert part in captured.out
    opened = Checkpoint.open(tmp_path / "decoder").architecture
    assert opened == replace(architecture, max_position_embeddings=777)
    # The same weights under the names of an encoder become the same decoder.
    encoder = write_encoder(tmp_path / "encoder", architecture)
    assert main(["convert", "--quiet", str(encoder), str(tmp_path / "other"), "--to", "decoder"]) == 0
    assert contents(tmp_path / "decoder") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decoder", "out", "--to", "decoder"), "in decoder format already"),
        (("decoder", "decoder", "--to", "encoder", "--overwrite"), "is the checkpoint itself"),
        (("absent", "out", "--to", "encoder"), "no model found"),
        (("decoder", "out", "--to", "encoder", "--max-positions", "9"), "leave --max-positions out"),
        (("decoder", "out", "--to", "encoder", "--quiet", "--json"), "contradict"),
        (("decoder", "out"), "Missing option '--to'"),
        (("decoder", "out", "--to", "torch"), "'torch' is not one of"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["convert", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mbd: error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()
