"""Every spelling of config.json: what it resolves to, what is refused, and round trips through upstream."""

from __future__ import annotations

import errno
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modernbert_decoder.architecture import (
    ACTIVATIONS,
    DecoderArchitecture,
    Head,
    LayerKind,
    RotaryParameters,
    released_architecture,
)
from modernbert_decoder.config_keys import GENERATION_KEYS
from modernbert_decoder.errors import ConfigurationError, ModelNotFoundError

MODEL = {"model_type": "modernbert-decoder"}
FULL, SLIDING = LayerKind.FULL, LayerKind.SLIDING
TOKEN_IDS = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}


def read(**config: Any) -> DecoderArchitecture:
    """Reads a configuration, failing on any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DecoderArchitecture.from_config({**MODEL, **config})


def thetas(architecture: DecoderArchitecture) -> tuple[float, float]:
    return architecture.rotary[FULL].theta, architecture.rotary[SLIDING].theta


def nested(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# --- what spellings mean ---


def test_an_empty_configuration_has_the_documented_defaults() -> None:
    a = read()
    assert (a.vocab_size, a.hidden_size, a.intermediate_size) == (50368, 768, 1152)
    assert (a.num_hidden_layers, a.num_attention_heads, a.max_position_embeddings) == (22, 12, 8192)
    assert (a.hidden_activation, a.classifier_activation, a.norm_eps) == ("gelu", "gelu", 1e-5)
    assert (a.initializer_range, a.initializer_cutoff_factor, a.use_cache) == (0.02, 2.0, True)
    assert (a.norm_bias, a.attention_bias, a.mlp_bias, a.decoder_bias, a.classifier_bias) == (
        *(False, False, False),
        True,
        False,
    )
    assert (a.pad_token_id, a.eos_token_id, a.bos_token_id, a.cls_token_id, a.sep_token_id) == (
        *(50283, 50282),
        *(50281, 50281, 50282),
    )
    assert (a.window, thetas(a), a.tie_word_embeddings, a.head) == (64, (160000.0,) * 2, True, Head.CAUSAL_LM)
    assert a.layer_kinds == tuple(SLIDING if i % 3 else FULL for i in range(22))
    assert (a.num_labels, a.id2label, a.problem_type) == (2, {0: "LABEL_0", 1: "LABEL_1"}, None)


def test_released_checkpoints_read_as_the_released_architecture_in_every_spelling() -> None:
    shape = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_hidden_layers": 7,
        "max_position_embeddings": 7999,
    }
    kinds = ["full_attention", *["sliding_attention"] * 2] * 2 + ["full_attention"]
    base = {"rope_type": "default", "rope_theta": 160000.0}
    flat = {"global_rope_theta": 160000.0, "local_rope_theta": 160000.0}
    encoder_era = {
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
    spellings: list[dict[str, Any]] = [
        {**flat, "local_attention": 128, "global_attn_every_n_layers": 3},
        {**flat, "sliding_window": 64, "layer_types": kinds, "reference_compile": False},
        {
            **flat,
            "local_attention": 128,
            "sliding_window": 64,
            "global_attn_every_n_layers": 3,
            **encoder_era,
        },
        {**nested(base, base), "local_attention": 128, "sliding_window": 64, "layer_types": kinds},
        {**nested(base, base), **flat, "layer_types": kinds},
        {"tie_word_embeddings": True, "architectures": ["ModernBertDecoderForCausalLM"]},
    ]
    for spelling in spellings:
        assert read(**shape, **spelling) == released_architecture("17m")


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({}, 64),
        ({"local_attention": 128}, 64),
        ({"local_attention": 16}, 8),
        ({"local_attention": 17}, 8),
        ({"sliding_window": 8}, 8),
        ({"sliding_window": 65, "local_attention": 130}, 65),
        ({"sliding_window": 65, "local_attention": None}, 65),
        ({"sliding_window": 1}, 1),
        ({"global_attn_every_n_layers": 1, "sliding_window": 5, "local_attention": 128}, 5),
        ({"global_attn_every_n_layers": 1, "sliding_window": -1, "local_attention": 0}, 64),
        ({"global_attn_every_n_layers": 1, "sliding_window": None, "local_attention": 12}, 6),
    ],
)
def test_the_window_is_sliding_window_or_half_of_local_attention(config: dict[str, Any], window: int) -> None:
    assert read(**config).window == window


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"global_attn_every_n_layers": 1}, "FFFF"),
        ({"global_attn_every_n_layers": 2}, "FSFS"),
        ({"global_attn_every_n_layers": 9}, "FSSS"),
        ({"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, "SSSF"),
        # 4.57 writes its default period beside any layer_types, and obeys the latter
        ({"layer_types": ["full_attention"] * 4, "global_attn_every_n_layers": 3}, "FFFF"),
        ({"layer_types": None, "global_attn_every_n_layers": 2}, "FSFS"),
    ],
)
def test_layer_kinds_come_from_layer_types_or_the_period(config: dict[str, Any], pattern: str) -> None:
    kinds = read(num_hidden_layers=4, **config).layer_kinds
    assert "".join(kind.name[0] for kind in kinds) == pattern


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"global_rope_theta": 5e4, "local_rope_theta": 1e4}, (5e4, 1e4)),
        ({"local_rope_theta": 1e4}, (160000.0, 1e4)),
        (nested({"rope_theta": 5e4}, {"rope_type": "default", "rope_theta": 1e4}), (5e4, 1e4)),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, (160000.0, 1e4)),
        ({"rope_parameters": {"full_attention": None}, "local_rope_theta": 7e3}, (160000.0, 7e3)),
        (
            {**nested({"rope_type": "default"}, {}), "global_rope_theta": 9e3, "local_rope_theta": 8e3},
            (9e3, 8e3),
        ),
        ({"global_rope_theta": 5e4, "local_rope_theta": 1e4, "rope_theta": 5e4}, (5e4, 1e4)),
        ({"global_rope_theta": 160000, "rope_scaling": {}, "rope_parameters": {}}, (160000.0, 160000.0)),
    ],
)
def test_rope_bases_are_read_from_every_key(config: dict[str, Any], expected: tuple[float, float]) -> None:
    assert thetas(read(**config)) == expected


def test_a_missing_local_base_warns_when_readers_would_differ() -> None:
    with pytest.warns(UserWarning, match="Write local_rope_theta into config.json"):
        a = DecoderArchitecture.from_config({**MODEL, "global_rope_theta": 1e4})
    assert thetas(a) == (1e4, 160000.0)
    assert thetas(read(global_rope_theta=1e4, global_attn_every_n_layers=1)) == (1e4, 160000.0)  # irrelevant


def test_rope_scaling_applies_to_both_kinds() -> None:
    a = read(rope_scaling={"rope_type": "linear", "factor": 2}, global_rope_theta=5e4, local_rope_theta=1e4)
    assert a.rotary == {
        FULL: RotaryParameters("linear", 5e4, factor=2.0),
        SLIDING: RotaryParameters("linear", 1e4, factor=2.0),
    }


def test_rope_parameters_may_scale_one_kind_only() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 160000.0}
    a = read(**nested(yarn, {"rope_theta": 1e4}), max_position_embeddings=4096)
    assert a.rotary[FULL] == RotaryParameters(
        "yarn", 160000.0, factor=4.0, original_max_position_embeddings=4096
    )
    assert a.rotary[SLIDING] == RotaryParameters(theta=1e4)


def test_rope_scaling_beside_equal_rope_parameters_is_accepted() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    assert read(rope_scaling=linear, **nested(linear, linear)).rotary[SLIDING].factor == 2.0
    only_bases = nested({"rope_theta": 5e4}, {"rope_theta": 5e4})
    assert read(rope_scaling={**linear, "rope_theta": 5e4}, **only_bases).rotary[SLIDING].factor == 2.0


@pytest.mark.parametrize(
    ("architectures", "head"),
    [
        (None, Head.CAUSAL_LM),
        ([], Head.CAUSAL_LM),
        (["ModernBertDecoderForCausalLM"], Head.CAUSAL_LM),
        (["ModernBertDecoderForSequenceClassification"], Head.SEQUENCE_CLASSIFICATION),
        (["ModernBertDecoderModel"], Head.NONE),
    ],
)
def test_the_head_comes_from_architectures(architectures: list[str] | None, head: Head) -> None:
    assert read(architectures=architectures).head is head


def test_labels_are_read_from_id2label_or_num_labels() -> None:
    named = {"id2label": {"1": "bad", "0": "good"}, "label2id": {"good": 0, "bad": 1}}
    assert list(read(**named, num_labels=2).id2label.items()) == [(0, "good"), (1, "bad")]
    assert read(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert read(num_labels=1, problem_type="regression").num_labels == 1


def test_eos_may_be_one_id_several_or_none() -> None:
    assert read(eos_token_id=[5, 7]).eos_token_ids == (5, 7)
    assert read(eos_token_id=[5, 7]).eos_token_id == 5
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read(eos_token_id=None).eos_token_id is None
    assert read(pad_token_id=None).pad_token_id is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_listed_activation_exists_upstream(name: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    torch = pytest.importorskip("torch")
    x = torch.linspace(-3, 3, 31)
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
    }
    torch.testing.assert_close(activations.ACT2FN[name](x), functions[ACTIVATIONS[name]](x))
    assert read(hidden_activation=name, classifier_activation=name).hidden_activation == name


# --- keys that are not ours ---


def test_bookkeeping_of_both_transformers_versions_does_not_warn() -> None:
    # What 4.57.6 writes with save_pretrained(use_diff=False) around the model's own keys.
    read(
        **TOKEN_IDS,
        **dict.fromkeys(GENERATION_KEYS),
        _name_or_path="x",
        add_cross_attention=False,
        chunk_size_feed_forward=0,
        cross_attention_hidden_size=None,
        decoder_start_token_id=None,
        dtype="float32",
        finetuning_task=None,
        is_decoder=False,
        is_encoder_decoder=False,
        modernbert_decoder_quantization={"body_bits": 8},
        output_attentions=False,
        output_hidden_states=False,
        prefix=None,
        pruned_heads={},
        reference_compile=False,
        return_dict=True,
        task_specific_params=None,
        tf_legacy_loss=False,
        tie_encoder_decoder=False,
        tokenizer_class=None,
        torch_dtype=None,
        torchscript=False,
        transformers_version="4.57.6",
        use_bfloat16=False,
    )


def test_everything_that_installed_transformers_writes_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertDecoderConfig(local_rope_theta=160000.0)
    assert read(**config.to_dict()) == read()


def test_unknown_keys_are_listed_in_one_warning() -> None:
    rope = nested({"rope_type": "default", "factor": 2.0}, {})
    with pytest.warns(
        UserWarning, match=r"x\.json: .*: auto_map, zebra, rope_parameters\.full_attention\.factor"
    ) as w:
        DecoderArchitecture.from_config({**MODEL, **rope, "zebra": 1, "auto_map": {}}, source="x.json")
    assert len(w) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_cross_attention", True),
        ("causal_mask", False),
        ("compression_config", {"a": 1}),
        ("head_dim", 32),
        ("hidden_act", "relu"),
        ("is_causal", False),
        ("is_encoder_decoder", True),
        ("layer_norm_eps", 1e-12),
        ("num_key_value_heads", 4),
        ("original_max_position_embeddings", 1024),
        ("partial_rotary_factor", 0.5),
        ("per_layer_config", {"0": {"num_attention_heads": 6}}),
        ("position_embedding_type", "relative_key"),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("tie_encoder_decoder", True),
        ("tie_last_hidden_states", False),
    ],
)
def test_foreign_keys_that_would_change_the_numbers_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=key):
        read(**{key: value})


def test_foreign_keys_that_repeat_our_values_are_accepted() -> None:
    keys = {"head_dim": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_key_value_heads": 12}
    assert read(**keys, partial_rotary_factor=1.0, per_layer_config={}) == read()


def test_quantized_checkpoints_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"bitsandbytes.*mbd quantize"):
        read(quantization_config={"quant_method": "bitsandbytes"})


# --- what is refused ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "modernbert"}, "model_type is 'modernbert'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size .100. is not a multiple"),
        ({"hidden_size": 9, "num_attention_heads": 3}, "head width .* is 3, but"),
        ({"hidden_size": 0}, "hidden_size is 0, but must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many', but must be an integer"),
        ({"vocab_size": 100.0}, "vocab_size is 100.0, but must be an integer"),
        ({"vocab_size": True}, "vocab_size is True, but must be an integer"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"norm_eps": "tiny"}, "norm_eps is 'tiny', but must be a number"),
        ({"norm_eps": 0}, "norm_eps is 0.0, but must be positive"),
        ({"norm_eps": float("inf")}, "norm_eps is inf, but must be a finite number"),
        ({"initializer_range": 10**400}, "must be a finite number"),
        ({"mlp_dropout": 1.5}, "mlp_dropout is 1.5"),
        ({"norm_bias": 1}, "norm_bias is 1, but must be true or false"),
        (
            {"hidden_activation": "mish"},
            "hidden_activation is 'mish', which is not implemented. Supported: gelu",
        ),
        ({"classifier_activation": None}, "classifier_activation is None, but must be a string"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, but num_hidden_layers is 22"),
        ({"layer_types": ["mamba"] * 22}, "layer_types names mamba"),
        ({"layer_types": "full_attention"}, "must be a list"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0"),
        (
            {"local_attention": 128, "sliding_window": 128},
            "sliding_window is 128, but local_attention is 128",
        ),
        ({"local_attention": 0}, "local_attention is 0, a window of 0: .* no key at all"),
        ({"local_attention": 1}, "local_attention is 1, a window of 0"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"local_attention": None}, "are null"),
        ({"sliding_window": 6.5}, "sliding_window is 6.5, but must be an integer"),
        ({"architectures": ["ModernBertForMaskedLM"]}, "Supported: one of ModernBertDecoderForCausalLM"),
        ({"architectures": "ModernBertDecoderModel"}, "architectures is 'ModernBertDecoderModel'"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, "num_labels is 3, but id2label names 1"),
        ({"num_labels": 0}, "at least one"),
        ({"id2label": {"1": "a", "2": "b"}}, "numbered from 0"),
        ({"id2label": {"x": "a"}}, "key 'x'"),
        ({"id2label": {"0": 1}}, "a name must be a string"),
        ({"id2label": ["a"]}, "id2label is .'a'., but must be a JSON object"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1}}, "does not confirm"),
        ({"label2id": {"good": 0, "bad": 1}}, "does not confirm"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "only one label"),
        ({"vocab_size": 100}, "pad_token_id is 50283, outside the vocabulary of 100 .*default"),
        ({"eos_token_id": [5, 60000]}, "eos_token_id is 60000"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"cls_token_id": "[CLS]"}, r"cls_token_id is '\[CLS\]'"),
    ],
)
def test_what_makes_no_model_is_refused_with_key_and_value(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**nested({"rope_theta": 1e4}, {}), "global_rope_theta": 2e4}, "global_rope_theta is 20000.0, but"),
        ({**nested({}, {"rope_theta": 1e4}), "local_rope_theta": 2e4}, "local_rope_theta is 20000.0, but"),
        (
            {"rope_theta": 1e4},
            "rope_theta is 10000.0, but the RoPE base of full_attention layers is 160000.0",
        ),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}}, "rope_scaling.rope_theta is 10000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "Rename the key to `rope_type`"),
        ({"rope_scaling": {"factor": 2.0}}, "without rope_type"),
        ({"rope_scaling": {"full_attention": {"rope_type": "linear"}}}, "Use rope_parameters"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', but must be a JSON object"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "one object per layer kind"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention is 3"),
        (
            nested({"rope_type": "longrope"}, {}),
            "rope_parameters.full_attention asks for rope_type 'longrope'",
        ),
        ({"rope_scaling": {"rope_type": "su"}}, "rope_scaling asks for rope_type 'su'"),
        ({"global_rope_theta": "big"}, "global_rope_theta is 'big'"),
        ({"local_rope_theta": 0}, "The RoPE base is 0"),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                **nested({"rope_type": "default"}, {"rope_type": "default"}),
            },
            "Remove rope_scaling",
        ),
    ],
)
def test_rope_spellings_that_disagree_or_are_unknown_are_refused(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(**config)


def test_errors_name_the_file() -> None:
    with pytest.raises(ConfigurationError, match=r"^some/config\.json: hidden_size is 0"):
        DecoderArchitecture.from_config({**MODEL, "hidden_size": 0}, source="some/config.json")


# --- files ---


def test_a_folder_is_read_through_its_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "local_attention": 16}))
    assert DecoderArchitecture.from_folder(tmp_path) == read(local_attention=16)


def test_a_missing_file_says_where_it_was_sought(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no config"):
        DecoderArchitecture.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"[" * 100_000, b"nonsense"])
def test_invalid_json_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"config\.json is not valid JSON"):
        DecoderArchitecture.from_folder(tmp_path)


def test_a_configuration_that_cannot_be_read_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.mkdir()
    with pytest.raises(ConfigurationError, match=r"config\.json cannot be read .*check its permissions"):
        DecoderArchitecture.from_folder(tmp_path)

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root, who may run this, is never refused
    with pytest.raises(ConfigurationError, match=r"cannot be read \(Permission denied\)"):
        DecoderArchitecture.from_folder(tmp_path)


def test_json_that_is_no_object_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigurationError, match="must hold one JSON object"):
        DecoderArchitecture.from_folder(tmp_path)


def test_the_bundled_kind_of_checkpoint_reads_without_a_warning(shared: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a = DecoderArchitecture.from_folder(shared / "models" / "storyteller")
    assert (a.vocab_size, a.window, a.head, a.num_full_layers) == (4096, 64, Head.CAUSAL_LM, 3)


# --- round trips ---

bases = st.floats(2.0, 1e7)
scalings = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries(
        {"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": st.floats(1.0, 64.0)}
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": st.floats(1.0, 64.0)},
        optional={
            "original_max_position_embeddings": st.integers(16, 8192),
            "attention_factor": st.floats(0.1, 4.0),
            "beta_fast": st.floats(16.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "mscale": st.floats(0.1, 2.0),
            "mscale_all_dim": st.floats(0.1, 2.0),
        },
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1.0, 64.0),
            "low_freq_factor": st.floats(0.5, 1.5),
            "high_freq_factor": st.floats(2.0, 8.0),
        }
    ),
)


scaling_pairs = st.one_of(scalings.map(lambda scaling: (scaling, scaling)), st.tuples(scalings, scalings))


@st.composite
def architectures(draw: st.DrawFn, *, with_nulls: bool) -> DecoderArchitecture:
    """Random architectures; without nulls they are of the kind that transformers 5 accepts."""
    vocab_size = draw(st.integers(8, 60_000))
    token_ids = st.integers(0, vocab_size - 1)
    optional_ids = st.none() | token_ids if with_nulls else token_ids
    kinds = draw(st.lists(st.sampled_from(list(LayerKind)), min_size=1, max_size=9))
    context = draw(st.integers(1, 20_000))
    labels = draw(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5, unique=True))
    dropouts = st.floats(0.0, 1.0)
    return DecoderArchitecture(
        vocab_size=vocab_size,
        hidden_size=4 * draw(st.integers(1, 8)) * (heads := draw(st.integers(1, 4))),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 99)),
        num_hidden_layers=len(kinds),
        hidden_activation=draw(st.sampled_from(list(ACTIVATIONS))),
        classifier_activation=draw(st.sampled_from(list(ACTIVATIONS))),
        max_position_embeddings=context,
        norm_eps=draw(st.floats(1e-12, 1e-3)),
        **{
            name: draw(st.booleans())
            for name in (
                *("norm_bias", "attention_bias", "mlp_bias", "decoder_bias"),
                *("classifier_bias", "tie_word_embeddings", "use_cache"),
            )
        },
        layer_kinds=tuple(kinds),
        window=draw(st.integers(1, 200)),
        rotary={
            kind: RotaryParameters.from_mapping(
                scaling, theta=draw(bases), max_position_embeddings=context, where="test"
            )[0]
            for kind, scaling in zip(LayerKind, draw(scaling_pairs), strict=True)
        },
        **{
            name: draw(optional_ids)
            for name in ("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id")
        },
        eos_token_ids=tuple(draw(st.lists(token_ids, max_size=3))),
        head=draw(st.sampled_from(list(Head))),
        id2label=dict(enumerate(labels)),
        problem_type=draw(st.sampled_from([None, "regression", "multi_label_classification"])),
        attention_dropout=draw(dropouts),
        embedding_dropout=draw(dropouts),
        mlp_dropout=draw(dropouts),
        classifier_dropout=draw(dropouts),
        initializer_range=draw(st.floats(1e-4, 1.0)),
        initializer_cutoff_factor=draw(st.none() | st.floats(1, 4) if with_nulls else st.floats(1, 4)),
    )


def reread(config: dict[str, Any], original: DecoderArchitecture) -> None:
    """`config`, through JSON and without a warning, means `original`; a window that no layer has aside."""
    assert read(**json.loads(json.dumps(config))) == original


@given(architectures(with_nulls=True))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_to_config_reads_back_as_the_same_architecture(a: DecoderArchitecture) -> None:
    reread(a.to_config(warn=False), a)


@given(a=architectures(with_nulls=False))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_to_config_survives_transformers(
    a: DecoderArchitecture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    upstream = transformers.ModernBertDecoderConfig.from_dict(json.loads(json.dumps(a.to_config(warn=False))))
    assert upstream.sliding_window == a.window
    assert upstream.layer_types == [kind.value for kind in a.layer_kinds]
    for kind in LayerKind:
        expected = {**a.rotary[kind].to_mapping(), "rope_theta": a.rotary[kind].theta}
        assert upstream.rope_parameters[kind] == expected
    folder = tmp_path_factory.mktemp("saved")
    upstream.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DecoderArchitecture.from_folder(folder) == a


def test_to_config_writes_the_keys_of_every_version() -> None:
    config = released_architecture("17m").to_config()
    assert (config["local_attention"], config["sliding_window"]) == (128, 64)
    assert (config["global_rope_theta"], config["local_rope_theta"]) == (160000.0, 160000.0)
    assert config["global_attn_every_n_layers"] == 3
    assert config["layer_types"][:2] == ["full_attention", "sliding_attention"]
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 160000.0}
    assert "rope_scaling" not in config
    linear = read(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert linear.to_config()["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("pattern", "every"),
    [("FSSFSSF", 3), ("FFFF", 1), ("FSFS", 2), ("FSSSS", 5), ("F", 3), ("SF", None), ("FFS", None)],
)
def test_the_period_is_written_only_when_it_tells_the_truth(pattern: str, every: int | None) -> None:
    kinds = [FULL if letter == "F" else SLIDING for letter in pattern]
    a = read(num_hidden_layers=len(kinds), layer_types=[kind.value for kind in kinds])
    assert a.to_config().get("global_attn_every_n_layers") == every


def test_what_transformers_4_cannot_express_warns() -> None:
    two_bases = read(global_rope_theta=160000.0, local_rope_theta=1e4)
    with pytest.warns(UserWarning, match="cannot express two bases"):
        two_bases.to_config()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert two_bases.to_config(warn=False)["local_rope_theta"] == 1e4
        read(
            global_rope_theta=2e4, global_attn_every_n_layers=1
        ).to_config()  # no sliding layer to get it wrong
    one_scaled = read(**nested({"rope_type": "linear", "factor": 2.0}, {}))
    assert "will not scale RoPE" in one_scaled.reader_limitations()[0]
    assert "pad_token_id is null" in read(pad_token_id=None).reader_limitations()[0]
    assert released_architecture("1b").reader_limitations() == ()


def test_architectures_are_values() -> None:
    a, b = released_architecture("17m"), released_architecture("17m")
    assert a == b
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a
