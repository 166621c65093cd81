"""Checkpoints: opened as they should be, and refused with a helpful message when damaged or misfit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import (
    BUNDLED_MODEL,
    QUANTIZATION_KEY,
    Checkpoint,
    cache_folder,
    find_checkpoint,
    write_safetensors,
)
from modernbert_decoder.errors import CheckpointError, ConfigurationError, ModelNotFoundError
from modernbert_decoder.quantization import QuantizationScheme

Tensors = dict[str, NDArray[Any]]
SCREEN_CHARACTERS = 24 * 80
EMBEDDING = "model.embeddings.tok_embeddings.weight"
CONFIG: Mapping[str, Any] = {
    "architectures": ["ModernBertDecoderForCausalLM"],
    "model_type": "modernbert-decoder",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    **{f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
}


def random_tensors(config: Mapping[str, Any] = CONFIG) -> Tensors:
    generator = np.random.default_rng(0)
    shapes = DecoderArchitecture.from_config(config).tensor_shapes()
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_config(folder: Path, config: Mapping[str, Any] = CONFIG, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def tensors() -> Tensors:
    return random_tensors()


@pytest.fixture
def folder(tmp_path: Path, tensors: Tensors) -> Path:
    """A sound float32 checkpoint in a single file."""
    folder = tmp_path / "model"
    write_config(folder)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def write_header(path: Path, header: Any, data: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


# --- sound checkpoints ------------------------------------------------------------------------------------


def test_the_bundled_model_opens_and_equals_the_safetensors_library() -> None:
    checkpoint = Checkpoint.open(find_checkpoint(BUNDLED_MODEL))
    reference = safetensors.numpy.load_file(checkpoint.folder / "model.safetensors")
    assert set(checkpoint.names()) == reference.keys()
    assert checkpoint.scheme is None
    assert checkpoint.generation_config["eos_token_id"] == checkpoint.architecture.eos_token_id
    for name, expected in reference.items():
        assert checkpoint.stored_dtype(name) == "F16"
        np.testing.assert_array_equal(checkpoint.raw(name), expected)
        np.testing.assert_array_equal(checkpoint.tensor(name), expected.astype(np.float32))


def test_float32_tensors_are_read_only_views_of_the_mapped_file(folder: Path, tensors: Tensors) -> None:
    checkpoint = Checkpoint.open(folder)
    for name, expected in tensors.items():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == np.float32
        assert not tensor.flags.owndata
        assert not tensor.flags.writeable
        assert np.shares_memory(tensor, checkpoint.raw(name))
        np.testing.assert_array_equal(tensor, expected)


def test_misaligned_float32_tensors_are_copied_into_aligned_ones(tmp_path: Path, tensors: Tensors) -> None:
    write_config(tmp_path)
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    encoded = json.dumps(header).encode()
    encoded += b" " * ((3 - len(encoded)) % 4)
    write_header(tmp_path / "model.safetensors", encoded, data)
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.raw(EMBEDDING).flags.aligned
    for name, expected in tensors.items():
        assert checkpoint.tensor(name).flags.aligned
        np.testing.assert_array_equal(checkpoint.tensor(name), expected)


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path, tensors: Tensors) -> None:
    write_config(tmp_path)
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        bits = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(bits)],
        }
        data += bits
    write_header(tmp_path / "model.safetensors", header, data)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.raw(EMBEDDING).dtype == np.uint16
    for name, array in tensors.items():
        expected = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
        np.testing.assert_array_equal(checkpoint.tensor(name), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_converted(tmp_path: Path, tensors: Tensors, dtype: Any) -> None:
    write_config(tmp_path)
    stored = {name: array.astype(dtype) for name, array in tensors.items()}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, array in stored.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), array.astype(np.float32))


def test_torch_bfloat16_files_of_transformers_load(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertDecoderConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})
    model = transformers.ModernBertDecoderForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.stored_dtype(EMBEDDING) == "BF16"
    state = model.state_dict()
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.tensor(name), state[name].float().numpy())


def test_sharded_checkpoints_of_transformers_load(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertDecoderConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})
    model = transformers.ModernBertDecoderForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = Checkpoint.open(tmp_path)
    state = model.state_dict()
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.tensor(name), state[name].numpy())


def test_names_saved_from_the_bare_model_get_their_prefix(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["ModernBertDecoderModel"]}
    tensors = random_tensors(config)
    write_config(tmp_path, config)
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    safetensors.numpy.save_file(bare, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.names()) == tensors.keys()
    np.testing.assert_array_equal(checkpoint.tensor(EMBEDDING), tensors[EMBEDDING])


@pytest.mark.parametrize(
    "config_change", [{"tie_word_embeddings": False}, {"norm_bias": True, "mlp_bias": True}]
)
def test_untied_and_biased_checkpoints_load(tmp_path: Path, config_change: dict[str, Any]) -> None:
    config = {**CONFIG, **config_change}
    tensors = random_tensors(config)
    write_config(tmp_path, config)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert set(Checkpoint.open(tmp_path).names()) == tensors.keys()


def test_a_redundant_copy_of_the_tied_matrix_is_dropped_only_if_equal(folder: Path, tensors: Tensors) -> None:
    tensors["decoder.weight"] = tensors[EMBEDDING].copy()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert "decoder.weight" not in Checkpoint.open(folder).names()
    tensors["decoder.weight"][3, 3] += 1
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.weight differs .*tie_word_embeddings"):
        Checkpoint.open(folder)


def test_packed_checkpoints_are_checked_against_their_scheme(tmp_path: Path) -> None:
    scheme = QuantizationScheme.named("int8")
    shapes = scheme.packed_shapes(DecoderArchitecture.from_config(CONFIG))
    packed: Tensors = {
        name: np.zeros(shape, np.uint8 if name.endswith(".data") else np.float32)
        for name, shape in shapes.items()
    }
    write_config(tmp_path, **{QUANTIZATION_KEY: scheme.to_dict()})
    write_safetensors(tmp_path / "model.safetensors", packed)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.scheme == scheme
    assert set(checkpoint.names()) == shapes.keys()
    data_name = next(name for name in shapes if name.endswith(".data"))
    assert checkpoint.raw(data_name).dtype == np.uint8
    with pytest.raises(CheckpointError, match="stored as U8, not as floating point"):
        checkpoint.tensor(data_name)
    packed[data_name] = packed[data_name].astype(np.float32)
    del packed[data_name.replace(".data", ".scales")]
    write_safetensors(tmp_path / "model.safetensors", packed)
    with pytest.raises(
        CheckpointError, match=r"(?s)1 missing: .*scales.*1 of a type .*\.data: F32 instead of U8"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("dtype", "stored"), [(np.float16, "F16"), (np.float64, "F64"), (np.uint16, "BF16")])
def test_norms_of_packed_checkpoints_are_float32_as_the_engine_reads_them(
    tmp_path: Path, dtype: Any, stored: str
) -> None:
    scheme = QuantizationScheme.named("int8")
    shapes = scheme.packed_shapes(DecoderArchitecture.from_config(CONFIG))
    packed: Tensors = {
        name: np.zeros(shape, np.uint8 if name.endswith(".data") else np.float32)
        for name, shape in shapes.items()
    }
    name = "model.final_norm.weight"
    packed[name] = packed[name].astype(dtype)
    write_config(tmp_path, **{QUANTIZATION_KEY: scheme.to_dict()})
    write_safetensors(tmp_path / "model.safetensors", packed, bfloat16=[name] if stored == "BF16" else [])
    with pytest.raises(CheckpointError, match=f"{name}: {stored} instead of F32"):
        Checkpoint.open(tmp_path)


def test_a_damaged_description_of_packed_weights_is_refused(folder: Path) -> None:
    write_config(folder, **{QUANTIZATION_KEY: "int8"})
    with pytest.raises(ConfigurationError, match="is 'int8' instead of a JSON object"):
        Checkpoint.open(folder)
    write_config(folder, **{QUANTIZATION_KEY: {"version": 99}})
    with pytest.raises(ConfigurationError, match=rf"{folder / 'config.json'}: .* format version 99"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["a folder", "a dangling link"])
def test_weights_that_are_no_file_are_called_so(folder: Path, name: str, kind: str) -> None:
    (folder / "model.safetensors").unlink()
    if kind == "a folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=rf"{folder / name} is not a file, or a link to one"):
        Checkpoint.open(folder)


# --- generation_config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"eos_token_id": 9}, (2, 9)),
        ({"eos_token_id": [9, 2, 9]}, (2, 9)),
        ({"eos_token_id": []}, (2,)),
        ({"eos_token_id": None}, (2,)),
        ({"top_k": 7}, (2,)),
        (None, (2,)),
    ],
)
def test_a_text_ends_at_the_ids_of_both_files(
    folder: Path, stated: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    if stated is not None:
        (folder / "generation_config.json").write_text(json.dumps(stated))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.eos_token_ids == expected
    assert checkpoint.generation_config == (stated or {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON .* can also be used without this file"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "must hold one JSON object. The model can also be used without"),
        (b'{"eos_token_id": "2"}', "eos_token_id is '2', but must be an integer. Correct or remove the key"),
        (b'{"eos_token_id": [2, null]}', "eos_token_id is None, but must be an integer"),
        (b'{"eos_token_id": 64}', "eos_token_id is 64, outside the vocabulary of 64. Correct or remove"),
        (b'{"eos_token_id": -1}', "eos_token_id is -1, outside the vocabulary"),
    ],
)
def test_a_damaged_generation_config_is_named_and_refused(folder: Path, content: bytes, message: str) -> None:
    path = folder / "generation_config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"{path}.* {message}"):
        Checkpoint.open(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigurationError, match=rf"{path} cannot be read .* without this file"):
        Checkpoint.open(folder)


# --- misfits ----------------------------------------------------------------------------------------------


def test_all_misfit_tensors_are_reported_in_one_error(folder: Path, tensors: Tensors) -> None:
    del tensors["model.final_norm.weight"], tensors["decoder.bias"]
    tensors["model.layers.9.mlp.Wo.weight"] = np.zeros((2, 2), np.float32)
    tensors["lm_head.dense.weight"] = np.zeros((32, 31), np.float32)
    tensors["lm_head.norm.weight"] = np.zeros(32, np.int64)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "3 layers, hidden size 32, vocabulary 64, head causal_lm" in message
    assert re.search(r"2 missing: .*decoder\.bias \(64,\)", message)
    assert "model.final_norm.weight (32,)" in message
    assert "1 unexpected: model.layers.9.mlp.Wo.weight (2, 2)" in message
    assert "1 misshapen: lm_head.dense.weight: expected (32, 32), found (32, 31)" in message
    assert "1 of a type that cannot be used: lm_head.norm.weight: I64" in message


def test_a_long_list_of_misfits_is_cut_at_twelve(folder: Path) -> None:
    write_config(folder, num_hidden_layers=23)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    num_missing = 20 * 8  # q, k, v, Wo, attn_norm, mlp_norm, Wi, Wo
    assert f"{num_missing} missing: " in message
    assert f"... and {num_missing - 12} more" in message
    assert len(message) < 2000


@pytest.mark.parametrize("bad_value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_tensor_that_is_not_finite_is_named(
    folder: Path, tensors: Tensors, bad_value: float, dtype: Any
) -> None:
    tensors["model.layers.1.mlp.Wi.weight"][5, 7] = bad_value
    stored = {name: array.astype(dtype) for name, array in tensors.items()}
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.Wi\.weight holds 1 values of 3,072"):
        checkpoint.tensor("model.layers.1.mlp.Wi.weight")


def test_huge_finite_values_are_not_mistaken_for_infinity(folder: Path, tensors: Tensors) -> None:
    tensors[EMBEDDING][:] = np.finfo(np.float32).max
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert np.isfinite(Checkpoint.open(folder).tensor(EMBEDDING)).all()


def test_float64_values_beyond_float32_are_refused_without_a_warning(folder: Path, tensors: Tensors) -> None:
    stored = {name: array.astype(np.float64) for name, array in tensors.items()}
    stored[EMBEDDING][0, 0] = 1e300
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        Checkpoint.open(folder).tensor(EMBEDDING)


# --- missing and refused files ----------------------------------------------------------------------------


def test_what_is_not_a_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    write_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\(it holds adapter_model\.safetensors\)"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"(?s)Pickle files are refused .*save_pretrained"):
        Checkpoint.open(tmp_path)


def shard(folder: Path, tensors: Tensors) -> dict[str, str]:
    """Replace the single file by two shards; returns the index's weight map."""
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        file_name = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file(part, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_shards_equal_the_single_file(folder: Path, tensors: Tensors) -> None:
    shard(folder, tensors)
    checkpoint = Checkpoint.open(folder)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected)


def test_missing_shards_are_listed(folder: Path, tensors: Tensors) -> None:
    weight_map = shard(folder, tensors)
    missing = weight_map[EMBEDDING]
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the 2 weights files .*: {missing}"):
        Checkpoint.open(folder)


def test_an_index_of_another_checkpoint_is_refused(folder: Path, tensors: Tensors) -> None:
    weight_map = shard(folder, tensors)
    write_index(folder, weight_map | {"absent.weight": weight_map[EMBEDDING]})
    with pytest.raises(CheckpointError, match=r"names 1 tensors that are not where it says: absent\.weight"):
        Checkpoint.open(folder)
    for bad in ({EMBEDDING: "../model.safetensors"}, {EMBEDDING: str(folder / "x.safetensors")}):
        write_index(folder, bad)
        with pytest.raises(CheckpointError, match="names files outside its folder"):
            Checkpoint.open(folder)
    for malformed in (None, [], {EMBEDDING: 3}):
        write_index(folder, malformed)
        with pytest.raises(CheckpointError, match="no proper weight_map"):
            Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path, tensors: Tensors) -> None:
    weight_map = shard(folder, tensors)
    both = {name: array for name, array in tensors.items() if weight_map[name] == weight_map[EMBEDDING]}
    other = next(file_name for file_name in weight_map.values() if file_name != weight_map[EMBEDDING])
    both |= {name: array for name, array in tensors.items() if weight_map[name] == other}
    safetensors.numpy.save_file(both, folder / other)
    with pytest.raises(CheckpointError, match="is in both model-0000"):
        Checkpoint.open(folder)


# --- damaged files ----------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 7, 8, 100, header_end - 1, header_end, header_end + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors is damaged: .*Download or copy it again"
        ):
            Checkpoint.open(folder)


def test_bytes_behind_the_last_tensor_are_refused(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="4 bytes follow the last tensor"):
        Checkpoint.open(folder)


# More digits than Python reads.
ENDLESS_NUMBER = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %b]}}' % (b"1" * 5000)


def entry(begin: Any, end: Any, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff\xfe{}", "its header is not valid JSON"),
        (b'{"a": ', "its header is not valid JSON"),
        (b"[" * 100_000, "its header is not valid JSON"),
        (b"[]", "its header is not a JSON object"),
        (b'{"a": {"dtype": "F32"}, "a": {}}', "its header names 'a' twice"),
        ({"a": 3}, "entry of tensor a is malformed: 3"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "entry of tensor a is malformed"),
        ({"a": entry(0, 16, shape=[-4])}, "entry of tensor a is malformed"),
        ({"a": entry(0, 16, shape=[4.0])}, "entry of tensor a is malformed"),
        ({"a": entry(0, 16, dtype=7)}, "entry of tensor a is malformed"),
        ({"a": entry("0", 16)}, "entry of tensor a is malformed"),
        ({"a": entry(-16, 0)}, "entry of tensor a is malformed"),
        ({"a": entry(0, 12)}, r"shape \(4,\) and dtype F32 needs 16 bytes, but its offsets 0 to 12 give 12"),
        ({"a": entry(16, 0)}, "its offsets 16 to 0 give -16"),
        ({"a": entry(0, int("1" * 4000))}, "entry of tensor a is malformed"),
        (ENDLESS_NUMBER, "its header is not valid JSON"),
        ({"a": entry(0, 2**63, shape=[2**61])}, "entry of tensor a is malformed"),
        ({"a": entry(0, 16, shape=[int("1" * 4000)] * 2)}, "entry of tensor a is malformed"),
        ({"a": entry(0, 16, shape=[2**62] * 20)}, "entry of tensor a is malformed"),
        ({"a": entry(0, 4, shape=[1] * 1000)}, "entry of tensor a is malformed"),
        ({"a" * 5000: entry(0, "16")}, "entry of tensor a{200} is malformed"),
        ({"a": entry(0, 16), "b": entry(8, 24)}, "tensor b at byte .* overlaps a"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "tensor b at byte .* overlaps a"),
        ({"a": entry(0, 16), "b": entry(20, 36)}, "tensor b at byte .* leaves a gap behind a"),
        ({"a": entry(4, 20)}, "tensor a at byte .* leaves a gap behind the header"),
        ({"a": entry(0, 2**62, shape=[2**60])}, "it is cut off"),
    ],
)
def test_a_corrupt_header_is_refused(folder: Path, header: Any, message: str) -> None:
    write_header(folder / "model.safetensors", header, bytes(36))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is damaged: .*{message}") as caught:
        Checkpoint.open(folder)
    assert len(str(caught.value)) < SCREEN_CHARACTERS


@pytest.mark.parametrize("dtype", ["F8_E4M3", "Q4_0", "f32"])
def test_an_unknown_dtype_is_refused(folder: Path, dtype: str) -> None:
    write_header(folder / "model.safetensors", {"a": entry(0, 4, dtype=dtype)}, bytes(4))
    with pytest.raises(CheckpointError, match=f"tensor a has dtype '{dtype}', which is not supported"):
        Checkpoint.open(folder)


def test_other_files_under_the_weights_name_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.*git lfs pull"):
        Checkpoint.open(folder)
    path.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(CheckpointError, match="cut off or not a safetensors file"):
        Checkpoint.open(folder)


# --- identity and places ----------------------------------------------------------------------------------


def test_the_fingerprint_follows_every_file_and_the_place(
    folder: Path, tmp_path: Path, tensors: Tensors
) -> None:
    first = Checkpoint.open(folder).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert Checkpoint.open(folder / ".." / "model").fingerprint() == first
    assert Checkpoint.open(Path(shutil.copytree(folder, tmp_path / "copy"))).fingerprint() != first
    write_config(folder, norm_eps=1e-6)
    second = Checkpoint.open(folder).fingerprint()
    assert second != first
    shard(folder, tensors)
    assert Checkpoint.open(folder).fingerprint() not in {first, second}


def test_the_fingerprint_is_of_the_files_that_were_opened(folder: Path, tensors: Tensors) -> None:
    checkpoint = Checkpoint.open(folder)
    first = checkpoint.fingerprint()
    write_safetensors(folder / "model.safetensors", tensors, {"changed": "yes"})
    assert checkpoint.fingerprint() == first != Checkpoint.open(folder).fingerprint()
    np.testing.assert_array_equal(checkpoint.tensor(EMBEDDING), tensors[EMBEDDING])


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MBD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "modernbert-decoder"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "modernbert-decoder"
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
