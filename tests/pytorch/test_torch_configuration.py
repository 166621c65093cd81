"""The configuration class: documented defaults, every spelling, validation, round trips, every reader."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers.models.modernbert_decoder.configuration_modernbert_decoder import (
    ModernBertDecoderConfig as UpstreamConfig,
)

from modernbert_decoder.architecture import RELEASED_SIZES, DecoderArchitecture, Head, LayerKind
from modernbert_decoder.pytorch import ModernBertDecoderConfig

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "initializer_cutoff_factor": 2.0,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "pad_token_id": 50283,
    "eos_token_id": 50282,
    "bos_token_id": 50281,
    "cls_token_id": 50281,
    "sep_token_id": 50282,
    "global_rope_theta": 160000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "decoder_bias": True,
    "classifier_dropout": 0.0,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "use_cache": True,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "local_rope_theta": 160000.0,
    "tie_word_embeddings": True,
    "sliding_window": 64,
    "num_labels": 2,
}


def read_by_floor(folder: Path) -> DecoderArchitecture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in particular about unknown keys
        return DecoderArchitecture.from_folder(folder)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_documented_ones(name: str) -> None:
    assert getattr(ModernBertDecoderConfig(), name) == DEFAULTS[name]


def test_the_default_layer_types_begin_with_a_full_layer_and_have_one_in_three() -> None:
    kinds = ModernBertDecoderConfig().layer_types
    assert kinds == ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(22)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_attention": 0}, "at least 2"),
        ({"local_attention": 1}, "at least 2"),
        ({"num_attention_heads": 7}, "multiple of num_attention_heads"),
        ({"layer_types": ["chunked_attention"] * 22}, "Known: full_attention, sliding_attention"),
        ({"layer_types": ["full_attention"]}, "Make them agree"),
        ({"local_attention": 128, "sliding_window": 32}, "remove the other"),
        ({"global_attn_every_n_layers": 0}, "at least 1"),
        ({"hidden_activation": "mish"}, "Supported: gelu"),
        ({"vocab_size": 100}, "outside the vocabulary"),
        ({"is_causal": False}, "not implemented"),
    ],
)
def test_values_that_make_no_model_are_refused_with_the_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModernBertDecoderConfig(**changes)


@pytest.mark.parametrize(
    "spelling",
    [
        {"local_attention": 16},
        {"sliding_window": 8},
        {"local_attention": 16, "sliding_window": 8},
    ],
)
def test_every_spelling_of_the_window_survives_a_round_trip(tmp_path: Path, spelling: dict[str, int]) -> None:
    ModernBertDecoderConfig(**spelling).save_pretrained(tmp_path)
    loaded = ModernBertDecoderConfig.from_pretrained(tmp_path)
    assert (loaded.local_attention, loaded.sliding_window) == (16, 8)
    assert read_by_floor(tmp_path).window == 8


@pytest.mark.parametrize(
    "spelling",
    [
        {"global_rope_theta": 80000.0, "local_rope_theta": 10000.0},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 80000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ],
)
def test_both_bases_survive_a_round_trip_and_saving_warns(tmp_path: Path, spelling: dict[str, Any]) -> None:
    config = ModernBertDecoderConfig(**spelling)
    with pytest.warns(UserWarning, match="transformers 4 will use the RoPE base"):
        config.save_pretrained(tmp_path)
    loaded = ModernBertDecoderConfig.from_pretrained(tmp_path)
    assert loaded == config
    rotary = read_by_floor(tmp_path).rotary
    assert (rotary[LayerKind.FULL].theta, rotary[LayerKind.SLIDING].theta) == (80000.0, 10000.0)
    theirs = UpstreamConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("size", RELEASED_SIZES)
def test_upstream_and_the_floor_read_the_same_model(tmp_path: Path, size: str) -> None:
    config = ModernBertDecoderConfig(**RELEASED_SIZES[size]._asdict(), local_attention=96, num_labels=5)
    config.save_pretrained(tmp_path)
    theirs, floor = UpstreamConfig.from_pretrained(tmp_path), read_by_floor(tmp_path)
    assert theirs.sliding_window == floor.window == 48
    assert theirs.layer_types == [kind.value for kind in floor.layer_kinds]
    assert theirs.num_labels == floor.num_labels == 5
    assert floor == config.to_architecture()


def test_what_is_written_holds_every_key_that_the_floor_writes() -> None:
    config = ModernBertDecoderConfig(
        rope_scaling={"rope_type": "linear", "factor": 2.0}, problem_type="regression"
    )
    written, floor = config.to_dict(), config.to_architecture().to_config()
    del floor["architectures"]  # the model class states it when it saves
    floor["id2label"] = {int(i): label for i, label in floor["id2label"].items()}
    assert {key: written[key] for key in floor} == floor
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("override", "attribute", "expected"),
    [
        ({"local_attention": 32}, "sliding_window", 16),
        ({"sliding_window": 16}, "local_attention", 32),
        ({"num_hidden_layers": 2}, "layer_types", ["full_attention", "sliding_attention"]),
        ({"num_labels": 7}, "num_labels", 7),
        ({"global_attn_every_n_layers": 2, "num_hidden_layers": 3}, "global_attn_every_n_layers", 2),
    ],
)
def test_an_override_on_load_replaces_every_spelling_in_the_file(
    tmp_path: Path, override: dict[str, Any], attribute: str, expected: object
) -> None:
    ModernBertDecoderConfig(num_labels=3).save_pretrained(tmp_path)
    loaded = ModernBertDecoderConfig.from_pretrained(tmp_path, **override)
    assert getattr(loaded, attribute) == expected


def test_overriding_one_base_on_load_keeps_the_other(tmp_path: Path) -> None:
    ModernBertDecoderConfig().save_pretrained(tmp_path)
    loaded = ModernBertDecoderConfig.from_pretrained(tmp_path, local_rope_theta=500.0)
    assert (loaded.global_rope_theta, loaded.local_rope_theta) == (160000.0, 500.0)
    assert loaded.to_architecture().rotary[LayerKind.SLIDING].theta == 500.0


def test_attributes_changed_into_a_contradiction_are_refused_when_used(tmp_path: Path) -> None:
    config = ModernBertDecoderConfig()
    config.local_attention = 16
    with pytest.raises(ValueError, match="sliding_window is 64, but local_attention is 16"):
        config.to_architecture()
    with pytest.raises(ValueError, match="sliding_window"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_configurations_that_differ_in_one_value_are_not_equal() -> None:
    assert ModernBertDecoderConfig() == ModernBertDecoderConfig()
    assert ModernBertDecoderConfig() != ModernBertDecoderConfig(norm_eps=1e-6)


def test_keys_of_encoders_are_read_without_effect_and_unknown_ones_warn(tmp_path: Path) -> None:
    ModernBertDecoderConfig(classifier_pooling="mean", deterministic_flash_attn=False)
    with pytest.warns(UserWarning, match="not known and are ignored: rotary_flavour"):
        ModernBertDecoderConfig(rotary_flavour="sweet")


def test_the_architecture_states_the_head_it_is_asked_for() -> None:
    config = ModernBertDecoderConfig(num_labels=4)
    assert "classifier.weight" in config.to_architecture(Head.SEQUENCE_CLASSIFICATION).tensor_shapes()
    assert "lm_head.norm.weight" not in config.to_architecture(Head.NONE).tensor_shapes()


def test_a_configuration_is_printable_and_plain_json() -> None:
    config = ModernBertDecoderConfig()
    assert json.loads(config.to_json_string())["local_attention"] == 128
    assert "sliding_window" in repr(config)
