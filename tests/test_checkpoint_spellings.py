"""The same weights in every spelling of configuration, names, dtypes and files: bit-equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    Float32,
    Tensors,
    open_runtime,
    random_ids,
    random_tensors,
    relative_error,
    tiny_architecture,
    whole_logits,
    write_checkpoint,
)
from modernbert_decoder.checkpoint import write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ARCHITECTURE = tiny_architecture(num_hidden_layers=4, max_position_embeddings=512)
IDS = random_ids(ARCHITECTURE, 200)
# float32 against transformers, as in test_parity.py.
LOGIT_TOLERANCE = 1e-4

_SIZES = {
    "architectures": ["ModernBertDecoderForCausalLM"],
    "model_type": "modernbert-decoder",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    **{
        "pad_token_id": 258,
        "bos_token_id": 256,
        "cls_token_id": 256,
        "sep_token_id": 257,
        "eos_token_id": 257,
    },
}
_BASES = {"global_rope_theta": 160000.0, "local_rope_theta": 160000.0}
_KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_BASE = {"rope_theta": 160000.0, "rope_type": "default"}
_ENCODER_ERA = {
    "causal_mask": True,
    "classifier_pooling": "mean",
    "deterministic_flash_attn": False,
    "gradient_checkpointing": False,
    "layer_norm_eps": 1e-05,
    "position_embedding_type": "sans_pos",
    "reference_compile": None,
    "repad_logits_with_grad": False,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "torch_dtype": "float32",
    "transformers_version": "4.48.0.dev0",
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "transformers 4.57": {
        **_SIZES,
        **_BASES,
        "local_attention": 128,
        "sliding_window": 64,
        "global_attn_every_n_layers": 3,
        "layer_types": _KINDS,
        "rope_scaling": None,
        "transformers_version": "4.57.6",
    },
    "transformers 5": {
        **_SIZES,
        "layer_types": _KINDS,
        "sliding_window": 64,
        "rope_parameters": {"full_attention": _BASE, "sliding_attention": _BASE},
        "dtype": "float32",
        "transformers_version": "5.24.0",
    },
    "window only": {**_SIZES, **_BASES, "sliding_window": 64},
    "local_attention only": {**_SIZES, **_BASES, "local_attention": 128, "global_attn_every_n_layers": 3},
    "Hub, encoder era": {**_SIZES, **_BASES, "local_attention": 128, **_ENCODER_ERA},
}


def logits_of(folder: Path) -> Float32:
    return whole_logits(open_runtime(folder, num_slots=1, context_length=256), IDS)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(ARCHITECTURE)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tensors: Tensors) -> Float32:
    """The logits of the folder as this package writes it."""
    return logits_of(write_checkpoint(tmp_path_factory.mktemp("own"), ARCHITECTURE, tensors=tensors))


@pytest.mark.parametrize("spelling", list(CONFIGURATIONS))
def test_every_spelling_of_the_configuration_gives_the_same_logits(
    tmp_path: Path, tensors: Tensors, expected: Float32, spelling: str
) -> None:
    config = CONFIGURATIONS[spelling]
    folder = write_checkpoint(tmp_path / "model", ARCHITECTURE, tensors=tensors, config=config)
    np.testing.assert_array_equal(logits_of(folder), expected)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory, tensors: Tensors) -> Any:
    """The checkpoint as transformers holds it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("own"), ARCHITECTURE, tensors=tensors)
    return transformers.ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["one file", "shards"])
def test_a_folder_saved_by_transformers_gives_the_same_logits(
    tmp_path: Path, upstream: Any, expected: Float32, shard_size: str
) -> None:
    upstream.save_pretrained(tmp_path, max_shard_size=shard_size)
    num_shards = len(list(tmp_path.glob("*.safetensors")))
    assert num_shards > 2 if shard_size == "50KB" else num_shards == 1
    np.testing.assert_array_equal(logits_of(tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_weights_are_computed_with_in_float32(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype
) -> None:
    folder = write_checkpoint(tmp_path / "original", ARCHITECTURE, tensors=tensors)
    model = transformers.ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "half")
    widened = {
        name: torch.from_numpy(array).to(dtype).to(torch.float32).numpy() for name, array in tensors.items()
    }
    exact = write_checkpoint(tmp_path / "widened", ARCHITECTURE, tensors=widened)
    np.testing.assert_array_equal(logits_of(tmp_path / "half"), logits_of(exact))


def without_prefix(name: str) -> str:
    return name.removeprefix("model.")


def with_tied_copy(tensors: Tensors) -> Tensors:
    return {**tensors, "decoder.weight": tensors["model.embeddings.tok_embeddings.weight"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {without_prefix(name): array for name, array in tensors.items()},
        with_tied_copy,
        lambda tensors: dict(reversed(tensors.items())),
    ],
    ids=["names of the bare model", "a redundant tied copy", "another order"],
)
def test_names_and_order_of_tensors_do_not_change_the_logits(
    tmp_path: Path, tensors: Tensors, expected: Float32, change: Callable[[Tensors], Tensors]
) -> None:
    folder = write_checkpoint(tmp_path / "model", ARCHITECTURE, tensors=change(tensors))
    np.testing.assert_array_equal(logits_of(folder), expected)


def test_shards_of_our_own_writing_equal_the_single_file(
    tmp_path: Path, tensors: Tensors, expected: Float32
) -> None:
    folder = write_checkpoint(tmp_path / "model", ARCHITECTURE, tensors=tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(tensors):
        shard = f"model-{number % 3 + 1:05}-of-00003.safetensors"
        weight_map[name] = shard
    for shard in set(weight_map.values()):
        write_safetensors(folder / shard, {n: t for n, t in tensors.items() if weight_map[n] == shard})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(logits_of(folder), expected)


def test_the_common_logits_are_those_of_transformers(upstream: Any, expected: Float32) -> None:
    with torch.no_grad():
        reference = upstream.eval()(torch.tensor([IDS])).logits[0].numpy()
    assert relative_error(expected, reference) < LOGIT_TOLERANCE
