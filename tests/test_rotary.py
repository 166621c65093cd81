"""Rotary tables against upstream's rotary embedding, for every supported scaling and both layer kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modernbert_decoder.errors import ConfigurationError
from modernbert_decoder.rotary import ROPE_TYPES, RotaryParameters
from modernbert_decoder.spellings import LayerKind

NUM_POSITIONS = 8192
TABLE_TOLERANCE = 1e-6  # a few float32 roundings of values up to 1.4
MAX_FREQUENCIES_OFF = 2  # of 32: float32 `pow` is not correctly rounded in every PyTorch build

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn, its length left out": {"rope_type": "yarn", "factor": 8.0},
    "yarn, every parameter": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


def test_every_supported_type_is_compared_with_upstream() -> None:
    assert {scaling["rope_type"] for scaling in SCALINGS.values()} == set(ROPE_TYPES)


@pytest.mark.parametrize("kind", LayerKind)
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_tables_equal_upstream(name: str, kind: LayerKind, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.modernbert_decoder import modeling_modernbert_decoder as upstream

    thetas = {LayerKind.FULL: 160000.0, LayerKind.SLIDING: 10000.0}
    config = upstream.ModernBertDecoderConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=3,
        max_position_embeddings=NUM_POSITIONS,
        rope_parameters={k.value: {**SCALINGS[name], "rope_theta": thetas[k]} for k in LayerKind},
    )
    embedding = upstream.ModernBertDecoderRotaryEmbedding(config)
    with torch.no_grad():
        cos, sin = embedding(torch.zeros(1), torch.arange(NUM_POSITIONS)[None], kind.value)
    frequencies = getattr(embedding, f"{kind}_inv_freq").numpy()

    ours, unused = RotaryParameters.from_mapping(
        SCALINGS[name], theta=thetas[kind], max_position_embeddings=NUM_POSITIONS, where="rope_parameters"
    )
    assert unused == ()
    ours_frequencies = ours.inverse_frequencies(head_dim)
    np.testing.assert_array_max_ulp(ours_frequencies, frequencies, maxulp=2)
    is_equal = ours_frequencies == frequencies
    assert (~is_equal).sum() <= MAX_FREQUENCIES_OFF
    for table, reference in zip(ours.tables(NUM_POSITIONS, head_dim), (cos, sin), strict=True):
        half = reference[0, :, : head_dim // 2].numpy()
        assert table.dtype == np.float32
        assert table.shape == half.shape
        np.testing.assert_allclose(table[:, is_equal], half[:, is_equal], rtol=0, atol=TABLE_TOLERANCE)
        # One unit in the last place of a frequency is at most this much angle at the last position.
        np.testing.assert_allclose(
            table, half, rtol=0, atol=NUM_POSITIONS * float(frequencies.max()) * 2.4e-7
        )


def test_dynamic_scaling_changes_nothing_within_the_context() -> None:
    plain = RotaryParameters(theta=160000.0)
    dynamic = RotaryParameters("dynamic", 160000.0, factor=3.7)
    for a, b in zip(plain.tables(300, 64), dynamic.tables(300, 64), strict=True):
        np.testing.assert_array_equal(a, b)


def test_linear_scaling_stretches_positions() -> None:
    plain = RotaryParameters(theta=10000.0).tables(200, 32)
    linear = RotaryParameters("linear", 10000.0, factor=2.0).tables(400, 32)
    for a, b in zip(plain, linear, strict=True):
        np.testing.assert_array_equal(a, b[::2])


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_to_mapping_reads_back_as_the_same_parameters(scaling: dict[str, Any]) -> None:
    first, _ = RotaryParameters.from_mapping(scaling, theta=5e4, max_position_embeddings=512, where="x")
    again, unused = RotaryParameters.from_mapping(
        first.to_mapping(), theta=5e4, max_position_embeddings=99, where="x"
    )
    assert again == first
    assert unused == ()


def test_the_old_key_type_is_read() -> None:
    parameters, _ = RotaryParameters.from_mapping(
        {"type": "linear", "factor": 2}, theta=1e4, max_position_embeddings=8, where="x"
    )
    assert parameters == RotaryParameters("linear", 1e4, factor=2.0)


def test_parameters_that_a_type_does_not_use_are_reported() -> None:
    _, unused = RotaryParameters.from_mapping(
        {"rope_type": "default", "factor": 2.0, "mscale": None},
        theta=1e4,
        max_position_embeddings=8,
        where="here",
    )
    assert unused == ("here.factor",)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "'longrope', which is not impl",
        ),
        ({"rope_type": "proportional"}, "Supported: default, linear"),
        ({"rope_type": 3}, "rope_type 3"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "Remove `type`"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "yarn", "factor": None}, "needs factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_type": "linear", "factor": "2"}, "here.factor is '2', but must be a number"),
        ({"rope_type": "linear", "factor": True}, "must be a number"),
        ({"rope_type": "linear", "factor": float("nan")}, "must be a finite number"),
        ({"rope_type": "linear", "factor": 0.0}, "factor is 0.0, but must be positive"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate is False"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "must be positive"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8.5}, "must be an integer"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "must exceed low_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RotaryParameters.from_mapping(mapping, theta=1e4, max_position_embeddings=64, where="here")


def test_direct_construction_is_validated() -> None:
    with pytest.raises(ConfigurationError, match="RoPE base is 1"):
        RotaryParameters(theta=1.0)
    with pytest.raises(ConfigurationError, match="does not use factor"):
        RotaryParameters("default", factor=2.0)
    with pytest.raises(ConfigurationError, match="needs original_max_position_embeddings"):
        RotaryParameters("yarn", factor=2.0)
    with pytest.raises(ConfigurationError, match="an even one"):
        RotaryParameters().tables(4, 7)
    with pytest.raises(ConfigurationError, match="head width of 2"):
        RotaryParameters("dynamic", factor=2.0).tables(4, 2)
