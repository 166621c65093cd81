"""Packed weights, written by `quantize_checkpoint` or into the cache: they load like any other folder."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    Tensors,
    open_runtime,
    random_ids,
    random_tensors,
    tiny_architecture,
    whole_logits,
    write_checkpoint,
)
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import BUNDLED_MODEL, Checkpoint, find_checkpoint
from modernbert_decoder.costs import EMBEDDING, VOCABULARY
from modernbert_decoder.engine import weights
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.engine.weights import (
    EMBEDDING_ROWS,
    load_weights,
    pack_tensors,
    quantize_checkpoint,
    resolve_scheme,
)
from modernbert_decoder.errors import CheckpointError, InputError
from modernbert_decoder.quantization import DTYPES, VOCABULARY_DTYPES, PackedMatrix, QuantizationScheme

ARCHITECTURES = {
    "tied": tiny_architecture(),
    "untied": tiny_architecture(tie_word_embeddings=False),
    "odd sizes": tiny_architecture(
        hidden_size=48, num_attention_heads=1, intermediate_size=37, norm_bias=True, mlp_bias=True
    ),
}
SCHEMES = {
    "int8": QuantizationScheme.named("int8"),
    "int4": QuantizationScheme.named("int4"),
    "int4, int4 vocabulary": QuantizationScheme.named("int4", "int4"),
    "int8, float32 vocabulary": QuantizationScheme.named("int8", "float32"),
}
# Scales included. A second copy of the vocabulary would add 0.23 on the bundled model.
MAX_BYTES_PER_INT8_WEIGHT = 1.1
FILES = ("model.safetensors", "config.json")
GREEDY = SamplingParams(temperature=0, max_tokens=30)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test; the folder of packed weights in it."""
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", ARCHITECTURES["tied"])


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all matrices that are rounded during the test."""
    names: list[str] = []
    quantize = weights.quantize

    def recorded(*arguments: Any, name: str, **more: Any) -> PackedMatrix:
        names.append(name)
        return quantize(*arguments, name=name, **more)

    monkeypatch.setattr(weights, "quantize", recorded)
    return names


def logits_of(folder: Path, scheme: str | QuantizationScheme, architecture: DecoderArchitecture) -> Any:
    runtime = open_runtime(folder, scheme=scheme, num_slots=1, context_length=128)
    return whole_logits(runtime, random_ids(architecture, 100))


# --- packed folders ---


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_packed_folder_gives_the_same_logits_as_quantizing_on_the_fly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    architecture = ARCHITECTURES[name]
    folder = write_checkpoint(tmp_path / "model", architecture)
    quantize_checkpoint(Checkpoint.open(folder), SCHEMES[scheme], tmp_path / "packed", threads=2)
    assert Checkpoint.open(tmp_path / "packed").scheme == SCHEMES[scheme]
    from_folder = logits_of(tmp_path / "packed", SCHEMES[scheme], architecture)
    from_cache = logits_of(folder, SCHEMES[scheme], architecture)
    monkeypatch.setattr(weights, "_cached", lambda *_, **__: None)
    in_memory = logits_of(folder, SCHEMES[scheme], architecture)
    np.testing.assert_array_equal(from_folder, in_memory)
    np.testing.assert_array_equal(from_cache, in_memory)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_packed_folder_loads_like_any_other(tmp_path: Path, dtype: str) -> None:
    """The bundled model, moved elsewhere, with its tokenizer and without a word about the format."""
    checkpoint = Checkpoint.open(find_checkpoint(BUNDLED_MODEL))
    quantize_checkpoint(checkpoint, QuantizationScheme.named(dtype), tmp_path / "packed", threads=2)
    moved = shutil.move(tmp_path / "packed", tmp_path / "moved")
    with LLM(moved) as packed, LLM(BUNDLED_MODEL, dtype=dtype) as original:
        assert packed.scheme == original.scheme
        assert (
            packed.generate("The old king", GREEDY)[0].outputs
            == original.generate("The old king", GREEDY)[0].outputs
        )
        assert packed.score("The old king") == original.score("The old king")


def test_a_packed_folder_is_as_small_as_its_bits(tmp_path: Path) -> None:
    """The tied matrix is on disk once, although two operators read it."""
    checkpoint = Checkpoint.open(find_checkpoint(BUNDLED_MODEL))
    scheme = QuantizationScheme.named("int8")
    quantize_checkpoint(checkpoint, scheme, tmp_path / "packed", threads=2)
    stored = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert stored < MAX_BYTES_PER_INT8_WEIGHT * checkpoint.architecture.num_parameters()


def test_the_tied_matrix_is_in_memory_once(folder: Path) -> None:
    loaded = load_weights(Checkpoint.open(folder), SCHEMES["int8"], threads=1)
    assert np.shares_memory(loaded[EMBEDDING_ROWS], loaded[f"{EMBEDDING}.data"])
    assert not any(name.startswith(VOCABULARY) for name in loaded)


def test_an_untied_embedding_is_loaded_as_rows_only(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", ARCHITECTURES["untied"])
    loaded = load_weights(Checkpoint.open(folder), SCHEMES["int8"], threads=1)
    assert f"{EMBEDDING}.data" not in loaded
    assert {EMBEDDING_ROWS, f"{VOCABULARY}.data"} <= loaded.keys()


def test_a_packed_folder_takes_the_tokenizer_and_generation_settings_along(
    tmp_path: Path, folder: Path
) -> None:
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    (folder / "pytorch_model.bin").write_bytes(b"not taken")
    quantize_checkpoint(Checkpoint.open(folder), SCHEMES["int8"], tmp_path / "packed", threads=1)
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert Checkpoint.open(tmp_path / "packed").generation_config == {"top_k": 7}
    assert Checkpoint.open(tmp_path / "packed").architecture == Checkpoint.open(folder).architecture


def test_every_matrix_is_reported_with_its_error(folder: Path) -> None:
    errors: dict[str, float] = {}

    def note(name: str, packed: PackedMatrix, original: Any) -> None:
        errors[name] = packed.relative_error(original)

    tensors = pack_tensors(Checkpoint.open(folder), SCHEMES["int4"], threads=1, on_matrix=note)
    assert {f"{name}.data" for name in errors} == {name for name in tensors if name.endswith(".data")}
    assert all(0 < error < 0.15 for error in errors.values())
    assert errors[EMBEDDING] < 0.01  # 8 bits by default


@pytest.mark.parametrize("scheme", ["int8", "float32"])
def test_what_cannot_be_packed_is_refused(tmp_path: Path, folder: Path, scheme: str) -> None:
    quantize_checkpoint(Checkpoint.open(folder), SCHEMES["int4"], tmp_path / "packed", threads=1)
    checkpoint = Checkpoint.open(tmp_path / "packed" if scheme == "int8" else folder)
    with pytest.raises(InputError, match=r"already holds int4|float32 is not a quantized format"):
        quantize_checkpoint(checkpoint, QuantizationScheme.named(scheme), tmp_path / "again", threads=1)
    assert not (tmp_path / "again").exists()


PACKED = [  # body and vocabulary of the folder, as `mbd quantize` names them
    *((body, vocabulary) for body in ("int8", "int4", "w8a8") for vocabulary in VOCABULARY_DTYPES),
    ("float32", "int8"),
    ("float32", "int4"),
]


@pytest.mark.parametrize(("body", "vocabulary"), PACKED)
def test_a_packed_folder_answers_to_what_it_holds_and_says_what_it_does_not(
    tmp_path: Path, folder: Path, body: str, vocabulary: str
) -> None:
    scheme = QuantizationScheme.named(body, vocabulary)
    quantize_checkpoint(Checkpoint.open(folder), scheme, tmp_path / "packed", threads=1)
    packed = Checkpoint.open(tmp_path / "packed")
    for dtype, vocabulary_dtype in itertools.product((None, *DTYPES), (None, *VOCABULARY_DTYPES)):
        wrong = [
            f"{name} {asked}"
            for name, asked, held in (
                ("dtype", dtype, body),
                ("vocabulary_dtype", vocabulary_dtype, vocabulary),
            )
            if asked not in (None, held)
        ]
        if wrong:
            words = rf"holds {scheme.name} weights and {' with '.join(wrong)} was asked for"
            with pytest.raises(InputError, match=words):
                resolve_scheme(packed, dtype, vocabulary_dtype)
        else:
            assert resolve_scheme(packed, dtype, vocabulary_dtype) == scheme


@pytest.mark.parametrize("asked", [{}, {"dtype": "int4"}, {"vocabulary_dtype": "int4"}])
def test_the_pure_4_bit_folder_runs_under_every_name_it_has(tmp_path: Path, asked: dict[str, str]) -> None:
    scheme = QuantizationScheme.named("int4", "int4")
    checkpoint = Checkpoint.open(find_checkpoint(BUNDLED_MODEL))
    quantize_checkpoint(checkpoint, scheme, tmp_path / "packed", threads=2)
    with LLM(tmp_path / "packed", **asked) as llm:
        assert llm.scheme == scheme
        assert llm.generate("The old king", GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize("asked", [{"dtype": "int3"}, {"vocabulary_dtype": "q4"}, {"dtype": 8}])
def test_an_unknown_name_is_called_unknown_whatever_the_folder_holds(
    tmp_path: Path, folder: Path, asked: dict[str, Any]
) -> None:
    quantize_checkpoint(Checkpoint.open(folder), SCHEMES["int8"], tmp_path / "packed", threads=1)
    for place in (folder, tmp_path / "packed"):
        with pytest.raises(InputError, match="choose one of float32, int8, int4"):
            LLM(place, **asked)


def test_an_original_folder_is_run_in_int8_unless_asked_otherwise(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert resolve_scheme(checkpoint, None, None) == SCHEMES["int8"]
    assert resolve_scheme(checkpoint, "float32", None).is_float32
    assert resolve_scheme(checkpoint, "int4", "int4") == SCHEMES["int4, int4 vocabulary"]


# --- the cache ---


def test_a_second_start_quantizes_nothing(folder: Path, cache: Path, quantized: list[str]) -> None:
    first = load_weights(Checkpoint.open(folder), SCHEMES["int8"], threads=1)
    assert len(quantized) == len(set(quantized)) > 10
    quantized.clear()
    second = load_weights(Checkpoint.open(folder), SCHEMES["int8"], threads=1)
    assert quantized == []
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    assert len(list(cache.iterdir())) == 1


def test_schemes_and_changed_checkpoints_have_entries_of_their_own(
    folder: Path, cache: Path, quantized: list[str]
) -> None:
    load_weights(Checkpoint.open(folder), SCHEMES["int8"], threads=1)
    load_weights(Checkpoint.open(folder), SCHEMES["int4"], threads=1)
    assert len(list(cache.iterdir())) == 2
    quantized.clear()
    write_checkpoint(folder, ARCHITECTURES["tied"], seed=1)
    changed = logits_of(folder, "int8", ARCHITECTURES["tied"])
    assert quantized
    write_checkpoint(folder.parent / "other", ARCHITECTURES["tied"], seed=1)
    np.testing.assert_array_equal(changed, logits_of(folder.parent / "other", "int8", ARCHITECTURES["tied"]))


def _cut_off(entry: Path) -> None:
    weights_file = entry / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])


def _lose(name: str) -> Any:
    return lambda entry: (entry / name).unlink()


def _scramble(name: str) -> Any:
    return lambda entry: (entry / name).write_bytes(b"\x00garbage")


@pytest.mark.parametrize(
    "damage",
    [_cut_off, *(action(name) for action in (_lose, _scramble) for name in FILES)],
    ids=["cut off", "no weights", "no config", "other weights", "other config"],
)
def test_a_damaged_entry_is_written_anew(
    folder: Path, cache: Path, quantized: list[str], damage: Any
) -> None:
    before = logits_of(folder, "int8", ARCHITECTURES["tied"])
    (entry,) = cache.iterdir()
    damage(entry)
    quantized.clear()
    np.testing.assert_array_equal(logits_of(folder, "int8", ARCHITECTURES["tied"]), before)
    assert quantized
    quantized.clear()
    logits_of(folder, "int8", ARCHITECTURES["tied"])
    assert quantized == []


def test_a_cache_that_cannot_be_written_costs_a_warning_and_nothing_else(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits_of(folder, "int8", ARCHITECTURES["tied"])
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("MBD_CACHE", str(blocker / "cache"))
    with pytest.warns(UserWarning, match=r"every start quantizes again.*MBD_CACHE"):
        np.testing.assert_array_equal(logits_of(folder, "int8", ARCHITECTURES["tied"]), expected)


def test_float32_weights_are_mapped_and_not_cached(folder: Path, cache: Path) -> None:
    loaded = load_weights(Checkpoint.open(folder), QuantizationScheme.named("float32"), threads=1)
    assert not cache.exists()
    assert not loaded[EMBEDDING].flags.writeable  # a view of the file
    assert not loaded[EMBEDDING].flags.owndata


def test_starting_warns_of_nothing(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in ("float32", "int8", "int8", "int4"):
            with LLM(folder, dtype=dtype, threads=1, max_context=64) as llm:
                llm.generate("a", GREEDY)


def test_rotary_tables_that_do_not_fit_into_memory_are_refused() -> None:
    with pytest.raises(InputError, match=r"1,000,000,000,000,000 positions do not fit .* lower max_context"):
        weights.rotary_tables(ARCHITECTURES["tied"], 10**15)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_configuration_in_any_encoding_of_json_can_be_packed(
    tmp_path: Path, folder: Path, encoding: str
) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text(), encoding=encoding)
    quantize_checkpoint(Checkpoint.open(folder), SCHEMES["int8"], tmp_path / "packed", threads=1)
    assert Checkpoint.open(tmp_path / "packed").architecture == ARCHITECTURES["tied"]


# --- damaged checkpoints ---


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", [EMBEDDING, "model.layers.1.attn.k_proj.weight", "model.final_norm.weight", "decoder.bias"]
)
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, cache: Path, dtype: str, bad: float, name: str
) -> None:
    tensors: Tensors = random_tensors(ARCHITECTURES["tied"])
    tensors[name].flat[7] = bad
    folder = write_checkpoint(tmp_path / "model", ARCHITECTURES["tied"], tensors=tensors)
    with pytest.raises(CheckpointError, match=rf"{name} holds .*NaN or infinite"):
        LLM(folder, dtype=dtype, threads=1)
    assert not cache.exists() or not list(cache.iterdir()), "half an entry was left in the cache"


def test_a_nan_leaves_no_packed_folder_behind(tmp_path: Path) -> None:
    tensors = random_tensors(ARCHITECTURES["tied"])
    tensors["decoder.bias"][0] = np.nan
    folder = write_checkpoint(tmp_path / "model", ARCHITECTURES["tied"], tensors=tensors)
    with pytest.raises(CheckpointError, match=r"decoder\.bias"):
        quantize_checkpoint(Checkpoint.open(folder), SCHEMES["int8"], tmp_path / "packed", threads=1)
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "cache"}


def test_the_description_of_the_format_is_in_the_configuration(tmp_path: Path, folder: Path) -> None:
    quantize_checkpoint(Checkpoint.open(folder), SCHEMES["int4"], tmp_path / "packed", threads=1)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config.pop("modernbert_decoder_quantization") == SCHEMES["int4"].to_dict()
    assert config == json.loads((folder / "config.json").read_text())
