"""Tensor names, shapes, parameter counts and byte counts, against upstream models and published sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modernbert_decoder.architecture import (
    RELEASED_SIZES,
    DecoderArchitecture,
    Head,
    LayerKind,
    released_architecture,
)
from modernbert_decoder.errors import ConfigurationError

TOKEN_IDS = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
TINY = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "local_rope_theta": 160000.0,
    **TOKEN_IDS,
}
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias")
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "untied": {"tie_word_embeddings": False},
    "untied, no decoder bias": {"tie_word_embeddings": False, "decoder_bias": False},
    "all biases": dict.fromkeys(BIASES, True),
    "no biases": dict.fromkeys(BIASES, False),
    "every layer full": {"global_attn_every_n_layers": 1},
    "every second layer full": {"global_attn_every_n_layers": 2},
    "period beyond the depth": {"global_attn_every_n_layers": 9},
    "five labels": {"id2label": {str(i): f"name {i}" for i in range(5)}},
    **{f"only {bias}": {**dict.fromkeys(BIASES, False), bias: True} for bias in BIASES},
}
CLASSES = {
    Head.CAUSAL_LM: "ModernBertDecoderForCausalLM",
    Head.SEQUENCE_CLASSIFICATION: "ModernBertDecoderForSequenceClassification",
    Head.NONE: "ModernBertDecoderModel",
}
PARAMETERS = {  # causal LM (tied), sequence classification with 2 labels, bare model
    "17m": (16_913_600, 16_863_744, 16_797_440),
    "32m": (32_081_344, 32_031_744, 31_883_136),
    "68m": (68_457_664, 68_408_320, 68_144_640),
    "150m": (149_655_232, 149_606_400, 149_014_272),
    "400m": (395_881_664, 395_833_344, 394_781_696),
    "1b": (1_031_314_112, 1_031_267_328, 1_028_050_688),
}


@pytest.mark.parametrize("head", Head)
@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_shapes_equal_those_of_the_upstream_model(name: str, head: Head) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {**TINY, **VARIANTS[name], "architectures": [CLASSES[head]], "model_type": "modernbert-decoder"}
    ours = DecoderArchitecture.from_config(config)
    assert ours.head is head
    upstream_class = getattr(transformers, CLASSES[head])
    with torch.device("meta"):
        model = upstream_class(transformers.ModernBertDecoderConfig(**{**TINY, **VARIANTS[name]}))
    prefix = "model." if head is Head.NONE else ""  # the bare model saves its tensors without the prefix
    expected = {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}
    if head is Head.CAUSAL_LM and ours.tie_word_embeddings:
        del expected["decoder.weight"]
    assert ours.tensor_shapes() == expected
    assert ours.num_parameters() == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


@pytest.mark.parametrize("size", RELEASED_SIZES)
def test_released_sizes_have_the_published_parameter_counts(size: str) -> None:
    heads = (Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION, Head.NONE)
    assert (
        tuple(released_architecture(size, head=head).num_parameters() for head in heads) == PARAMETERS[size]
    )


def test_released_sizes_have_heads_of_64_and_windows_of_64() -> None:
    layers = {"17m": (3, 4), "32m": (4, 6), "68m": (7, 12), "150m": (8, 14), "400m": (10, 18), "1b": (10, 18)}
    assert set(layers) == set(RELEASED_SIZES)
    for size in RELEASED_SIZES:
        a = released_architecture(size)
        assert (a.head_dim, a.window, a.max_position_embeddings) == (64, 64, 7999)
        assert (a.num_full_layers, a.num_sliding_layers) == layers[size]


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Sizes: 17m, 32m"):
        released_architecture("2b")


@pytest.mark.parametrize("size", RELEASED_SIZES)
def test_windowed_caches_hold_the_promised_share_of_the_naive_bytes(size: str) -> None:
    a = released_architecture(size)
    limit = {"17m": 0.45, "32m": 0.42}.get(size, 0.39)
    assert a.kv_cache_bytes(7999) / a.naive_kv_cache_bytes(7999) <= limit
    assert a.kv_cache_bytes(64) == a.naive_kv_cache_bytes(64)
    assert a.kv_cache_bytes(65) < a.naive_kv_cache_bytes(65)
    assert a.kv_cache_bytes(500, bytes_per_value=2) * 2 == a.kv_cache_bytes(500)


def test_most_of_17m_is_its_vocabulary() -> None:
    a = released_architecture("17m")
    assert 0.75 < a.vocab_size * a.hidden_size / a.num_parameters() < 0.77
    body = a.flops_per_token(1, with_head=False)
    assert 2.5 < (a.flops_per_token(1) - body) / body < 3.5


def test_flops_do_not_depend_on_tying_and_follow_the_head() -> None:
    a = released_architecture("17m")
    assert replace(a, tie_word_embeddings=False).flops_per_token(100) == a.flops_per_token(100)
    bare = replace(a, head=Head.NONE)
    assert bare.flops_per_token(100) == a.flops_per_token(100, with_head=False)
    classifier = replace(a, head=Head.SEQUENCE_CLASSIFICATION)
    assert classifier.flops_per_token(9) - bare.flops_per_token(9) == 2 * 256 * (256 + 2)


def test_flops_grow_with_visible_keys_only() -> None:
    a = replace(released_architecture("17m"), layer_kinds=(LayerKind.SLIDING,) * 7)
    assert a.flops_per_token(64) == a.flops_per_token(5000)
    assert a.flops_per_token(63) < a.flops_per_token(64)


def test_decode_bytes_count_each_kind_of_weight_at_its_own_width() -> None:
    a = released_architecture("17m")

    def read(body: float, vocabulary: float) -> int:
        return a.decode_bytes(
            body_bytes_per_weight=body, vocabulary_bytes_per_weight=vocabulary, context_length=64
        )

    vectors = sum(shape[0] for shape in a.tensor_shapes().values() if len(shape) == 1)
    rest = 4 * vectors + a.kv_cache_bytes(64)
    vocabulary = (a.vocab_size + 1) * a.hidden_size
    body = a.num_parameters() - vectors - a.vocab_size * a.hidden_size
    assert read(0, 0) == rest
    assert read(1, 0) == rest + body
    assert read(0, 1.125) == rest + vocabulary * 1.125
    untied = replace(a, tie_word_embeddings=False)
    assert untied.decode_bytes(
        body_bytes_per_weight=1, vocabulary_bytes_per_weight=1, context_length=64
    ) == read(1, 1)
    # One embedding row is all of the vocabulary that a classifier reads.
    bare = replace(a, head=Head.NONE)
    norms = 1 + 6 + 7 + 1  # embeddings, attn_norm from layer 1 on, mlp_norm, final_norm
    step = bare.decode_bytes(body_bytes_per_weight=0, vocabulary_bytes_per_weight=1, context_length=0)
    assert step == 256 + 4 * norms * 256


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        released_architecture("17m").kv_cache_bytes(-1)


def test_flops_of_17m_at_length_100_are_those_counted_by_hand() -> None:
    linear = 7 * (4 * 256 * 256 + 3 * 256 * 384)
    attention = 2 * 256 * (3 * 100 + 4 * 64)  # three full layers see everything, four their window
    head = 256 * 256 + 50_368 * 256
    assert released_architecture("17m").flops_per_token(100) == 2 * (linear + attention + head) == 34_287_616


@pytest.mark.parametrize("name", ["defaults", "untied", "every layer full"])
def test_flops_are_those_that_torch_counts_in_the_upstream_model(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    changes = {**TINY, **VARIANTS[name]}
    config = transformers.ModernBertDecoderConfig(**changes, attn_implementation="eager")
    model = transformers.ModernBertDecoderForCausalLM(config).eval()
    length = 11  # within the window, and plain attention multiplies every query with every key
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    counts = counter.get_flop_counts()
    # The angles of the rotation are a product upstream; ours come from a table.
    rotation = sum(sum(ops.values()) for place, ops in counts.items() if place.endswith("rotary_emb"))
    architecture = DecoderArchitecture.from_config(
        {**changes, "architectures": [CLASSES[Head.CAUSAL_LM]], "model_type": "modernbert-decoder"}
    )
    assert counter.get_total_flops() - rotation == length * architecture.flops_per_token(length)
