"""Conversion moves every bit, and the configuration beside it means the same model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CLS, PAD, SEP, Tensors, random_tensors, tiny_architecture, write_checkpoint
from encoder_checkpoints import (
    config_of,
    contents,
    encoder_config,
    encoder_tensors,
    flexbert_config,
    flexbert_tensors,
    write,
    write_encoder,
)
from modernbert_decoder.architecture import DecoderArchitecture, Head, LayerKind, RotaryParameters
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.conversion.convert import Conversion, convert_checkpoint
from modernbert_decoder.conversion.kinds import CheckpointKind
from modernbert_decoder.errors import CheckpointError, ConfigurationError, InputError
from modernbert_decoder.safetensors_files import write_safetensors
from modernbert_decoder.tokenizer import Tokenizer

DECODER, ENCODER = CheckpointKind.DECODER, CheckpointKind.ENCODER
FULL, SLIDING = LayerKind.FULL, LayerKind.SLIDING
DOCUMENTATION = Path(__file__).resolve().parent.parent / "docs" / "conversion.md"
DTYPES = ("F32", "F16", "BF16")
TWO_BASES = {FULL: RotaryParameters(theta=160000.0), SLIDING: RotaryParameters(theta=10000.0)}
_BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")

ARCHITECTURES: dict[str, DecoderArchitecture] = {
    "tied": tiny_architecture(),
    "untied": tiny_architecture(tie_word_embeddings=False),
    "no decoder bias": tiny_architecture(decoder_bias=False),
    "untied, no decoder bias": tiny_architecture(tie_word_embeddings=False, decoder_bias=False),
    "all biases": tiny_architecture(**dict.fromkeys(_BIASES, True)),
    **{f"{name} alone": tiny_architecture(**{name: True}) for name in _BIASES},
    "no head": tiny_architecture(head=Head.NONE),
    "every second layer full": tiny_architecture(full_every=2, num_hidden_layers=5),
    "another window": tiny_architecture(window=9),
    "one layer": tiny_architecture(num_hidden_layers=1),
    "scaled": tiny_architecture(rotary=dict.fromkeys(LayerKind, RotaryParameters("linear", factor=3.0))),
}


def decoder_of(source: Path, **options: Any) -> Path:
    """The decoder made from a checkpoint, in a folder beside it."""
    folder = source.with_name(f"{source.name}-decoder")
    convert_checkpoint(source, folder, to=DECODER, **options)
    return folder


@contextmanager
def two_bases_warned() -> Iterator[None]:
    with pytest.warns(UserWarning, match="transformers 4 will use the RoPE base 160000.0 in sliding layers"):
        yield


# round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoder_to_decoder_to_encoder_keeps_every_bit(name: str, dtype: str, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", ARCHITECTURES[name], dtype=dtype)
    decoder = decoder_of(encoder)
    convert_checkpoint(decoder, tmp_path / "back", to=ENCODER)
    assert contents(tmp_path / "back") == contents(encoder)
    assert {dtype for dtype, _, _ in contents(decoder).values()} == {dtype}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoder_to_encoder_to_decoder_keeps_every_bit_and_the_configuration(
    name: str, dtype: str, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    config = architecture.to_config(warn=False)
    decoder = write(tmp_path / "decoder", config, random_tensors(architecture), dtype=dtype)
    convert_checkpoint(decoder, tmp_path / "encoder", to=ENCODER)
    back = decoder_of(tmp_path / "encoder")
    assert contents(back) == contents(decoder)
    assert config_of(back) == config
    assert Checkpoint.open(back).architecture == architecture


def test_thirds_of_wqkv_are_query_key_and_value_in_this_order(tmp_path: Path) -> None:
    architecture = tiny_architecture(attention_bias=True)
    decoder = Checkpoint.open(decoder_of(write_encoder(tmp_path / "encoder", architecture)))
    for name, expected in random_tensors(architecture).items():
        np.testing.assert_array_equal(decoder.raw(name), expected)


def test_a_converted_file_does_not_depend_on_the_way_it_was_stored(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    tensors = encoder_tensors(tiny_architecture())
    sharded = write_encoder(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        write_safetensors(sharded / shard, {n: a for n, a in tensors.items() if weight_map[n] == shard})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with_copy = write(
        tmp_path / "copy",
        config_of(encoder),
        {"decoder.weight": tensors["model.embeddings.tok_embeddings.weight"], **tensors},
    )
    expected = (decoder_of(encoder) / "model.safetensors").read_bytes()
    assert (decoder_of(sharded) / "model.safetensors").read_bytes() == expected
    assert (decoder_of(with_copy) / "model.safetensors").read_bytes() == expected


def test_names_of_a_bare_model_stay_bare(tmp_path: Path) -> None:
    architecture = tiny_architecture(head=Head.NONE)
    tensors = {n.removeprefix("model."): a for n, a in encoder_tensors(architecture).items()}
    encoder = write(tmp_path / "encoder", encoder_config(architecture), tensors)
    decoder = decoder_of(encoder)
    assert "layers.0.attn.q_proj.weight" in contents(decoder)
    convert_checkpoint(decoder, tmp_path / "back", to=ENCODER)
    assert contents(tmp_path / "back") == contents(encoder)


def test_tensors_of_mixed_types_keep_their_own(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    tensors = encoder_tensors(tiny_architecture())
    mixed: Tensors = {
        name: array.astype(np.float16 if array.ndim == 2 else np.float32) for name, array in tensors.items()
    }
    write_safetensors(encoder / "model.safetensors", mixed)
    convert_checkpoint(decoder_of(encoder), tmp_path / "back", to=ENCODER)
    assert contents(tmp_path / "back") == contents(encoder)


def test_the_report_counts_what_was_moved(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", tiny_architecture(attention_bias=True))
    conversion: Conversion = convert_checkpoint(encoder, tmp_path / "decoder", to=DECODER)
    assert (conversion.source_kind, conversion.target_kind) == (ENCODER, DECODER)
    assert conversion.num_split == 8  # four weights and four biases
    assert conversion.num_written - conversion.num_read == 2 * 8
    assert conversion.num_renamed == 2  # head.dense.weight, head.norm.weight
    assert (conversion.num_joined, conversion.num_dropped) == (0, 0)
    back = convert_checkpoint(tmp_path / "decoder", tmp_path / "back", to=ENCODER)
    assert (back.num_split, back.num_joined, back.num_renamed) == (0, 8, 2)
    assert back.weight_bytes == conversion.weight_bytes


# what the configuration means


def test_the_window_is_half_of_local_attention_on_either_side(tmp_path: Path) -> None:
    config = config_of(decoder_of(write_encoder(tmp_path / "encoder", local_attention=18)))
    assert (config["local_attention"], config["sliding_window"]) == (18, 9)
    convert_checkpoint(tmp_path / "encoder-decoder", tmp_path / "back", to=ENCODER)
    assert config_of(tmp_path / "back")["local_attention"] == 18
    assert "sliding_window" not in config_of(tmp_path / "back")


@pytest.mark.parametrize(
    ("stated", "bases"),
    [
        ({"global_rope_theta": ..., "local_rope_theta": ...}, (160000.0, 10000.0)),
        ({"global_rope_theta": 160000.0, "local_rope_theta": ...}, (160000.0, 10000.0)),
        ({"global_rope_theta": 160000.0, "local_rope_theta": 500.0}, (160000.0, 500.0)),
        (
            {
                "global_rope_theta": ...,
                "local_rope_theta": ...,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                },
            },
            (160000.0, 500.0),
        ),
        (
            {
                "global_rope_theta": ...,
                "local_rope_theta": ...,
                "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 160000.0}},
            },
            (160000.0, 10000.0),
        ),
    ],
    ids=["none stated", "one stated", "4.57 spelling", "5.x spelling", "5.x, one stated"],
)
def test_a_decoder_states_both_bases_of_its_encoder_in_both_spellings(
    stated: dict[str, Any], bases: tuple[float, float], tmp_path: Path
) -> None:
    encoder = write_encoder(tmp_path / "encoder", **stated)
    with two_bases_warned():
        config = config_of(decoder_of(encoder))
    assert (config["global_rope_theta"], config["local_rope_theta"]) == bases
    nested = config["rope_parameters"]
    assert (nested["full_attention"]["rope_theta"], nested["sliding_attention"]["rope_theta"]) == bases
    convert_checkpoint(tmp_path / "encoder-decoder", tmp_path / "back", to=ENCODER)  # encoders: no warning
    back = config_of(tmp_path / "back")
    assert (back["global_rope_theta"], back["local_rope_theta"], back["rope_parameters"]) == (*bases, nested)


def test_a_local_base_of_null_is_the_encoders_global_base(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", global_rope_theta=777.0, local_rope_theta=None)
    config = config_of(decoder_of(encoder))
    assert (config["global_rope_theta"], config["local_rope_theta"]) == (777.0, 777.0)


def test_layer_types_are_carried_and_their_absence_means_the_same(tmp_path: Path) -> None:
    irregular = tiny_architecture(layer_kinds=(SLIDING, FULL, FULL, SLIDING))
    encoder = write_encoder(
        tmp_path / "encoder",
        irregular,
        layer_types=[kind.value for kind in irregular.layer_kinds],
        global_attn_every_n_layers=...,
    )
    decoder = decoder_of(encoder)
    assert Checkpoint.open(decoder).architecture.layer_kinds == irregular.layer_kinds
    with pytest.warns(UserWarning, match="cannot express layer_types"):
        convert_checkpoint(decoder, tmp_path / "back", to=ENCODER)
    regular = decoder_of(write_encoder(tmp_path / "regular", global_attn_every_n_layers=2))
    assert config_of(regular)["layer_types"] == ["full_attention", "sliding_attention"] * 2


def test_the_encoders_own_keys_survive_the_way_there_and_back(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", causal_mask=False, is_causal=False)
    convert_checkpoint(decoder_of(encoder), tmp_path / "back", to=ENCODER)
    config, back = config_of(encoder), config_of(tmp_path / "back")
    dropped = {
        "causal_mask", "is_causal", "position_embedding_type", "layer_norm_eps", "transformers_version",
    }  # fmt: skip
    assert {key: back[key] for key in config if key not in dropped} == {
        key: value for key, value in config.items() if key not in dropped
    }
    assert not dropped & back.keys()


def test_special_ids_context_and_epsilon_are_carried(tmp_path: Path) -> None:
    architecture = tiny_architecture(norm_eps=1e-6, max_position_embeddings=777, eos_token_ids=(SEP, 5))
    opened = Checkpoint.open(decoder_of(write_encoder(tmp_path / "encoder", architecture)))
    assert opened.architecture == architecture


def test_tokenizer_files_are_copied_and_a_prompt_never_ends_in_sep(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    decoder = decoder_of(encoder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (decoder / name).read_bytes() == (encoder / name).read_bytes()
    tokenizer = Tokenizer.from_folder(decoder, Checkpoint.open(decoder).architecture)
    assert tokenizer.encode("a") == [CLS, ord("a")]
    assert tokenizer.encode_template("a") == [CLS, ord("a"), SEP]


# the trainer's checkpoints


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("to", [DECODER, ENCODER])
def test_a_trainers_checkpoint_gives_the_same_file_as_the_encoder(
    prefix: str, to: CheckpointKind, tmp_path: Path
) -> None:
    architecture = tiny_architecture(classifier_bias=True)
    tensors = encoder_tensors(architecture)
    named = flexbert_tensors(tensors, prefix=prefix)
    trainer = write(tmp_path / "trainer", flexbert_config(architecture), named)
    conversion = convert_checkpoint(trainer, tmp_path / "converted", to=to)
    assert conversion.num_dropped == 1
    encoder = write_encoder(tmp_path / "encoder", architecture)
    expected = decoder_of(encoder) if to is DECODER else encoder
    assert contents(tmp_path / "converted") == contents(expected)
    if to is DECODER:
        assert Checkpoint.open(tmp_path / "converted").architecture == architecture


@pytest.mark.parametrize(
    ("stated", "bases"),
    [
        ({"rotary_emb_base": 160000.0, "local_attn_rotary_emb_base": ...}, (160000.0, 160000.0)),
        ({"rotary_emb_base": 160000.0, "local_attn_rotary_emb_base": -1}, (160000.0, 160000.0)),
        ({"rotary_emb_base": 160000.0, "local_attn_rotary_emb_base": 160000.0}, (160000.0, 160000.0)),
        ({"rotary_emb_base": ..., "local_attn_rotary_emb_base": ...}, (10000.0, 10000.0)),
    ],
    ids=["no local base", "local base -1", "both", "none"],
)
def test_a_local_base_of_minus_one_is_the_trainers_global_base(
    stated: dict[str, Any], bases: tuple[float, float], tmp_path: Path
) -> None:
    architecture = tiny_architecture()
    tensors = flexbert_tensors(encoder_tensors(architecture))
    trainer = write(tmp_path / "trainer", flexbert_config(architecture, **stated), tensors)
    config = config_of(decoder_of(trainer))
    assert (config["global_rope_theta"], config["local_rope_theta"]) == bases


def test_a_trainers_own_base_for_sliding_layers_is_kept(tmp_path: Path) -> None:
    architecture = tiny_architecture(rotary=TWO_BASES)
    tensors = flexbert_tensors(encoder_tensors(architecture))
    trainer = write(tmp_path / "trainer", flexbert_config(architecture), tensors)
    with two_bases_warned():
        decoder = decoder_of(trainer)
    assert Checkpoint.open(decoder).architecture == architecture


@pytest.mark.parametrize(
    ("stated", "kinds", "window"),
    [
        ({"sliding_window": 18}, (FULL, SLIDING, SLIDING, FULL), 9),
        ({"sliding_window": 18, "global_attn_every_n_layers": -1}, (SLIDING,) * 4, 9),
        ({"sliding_window": -1, "global_attn_every_n_layers": -1}, (FULL,) * 4, 64),
    ],
)
def test_the_trainers_sliding_window_is_the_width_over_both_sides(
    stated: dict[str, Any], kinds: tuple[LayerKind, ...], window: int, tmp_path: Path
) -> None:
    architecture = tiny_architecture()
    tensors = flexbert_tensors(encoder_tensors(architecture))
    trainer = write(tmp_path / "trainer", flexbert_config(architecture, **stated), tensors)
    opened = Checkpoint.open(decoder_of(trainer)).architecture
    assert (opened.layer_kinds, opened.window) == (kinds, window)


def test_the_trainers_file_does_not_decide_ids_and_context(tmp_path: Path) -> None:
    architecture = tiny_architecture()
    tensors = flexbert_tensors(encoder_tensors(architecture))
    config = flexbert_config(architecture, max_seq_len=...)
    trainer = write(tmp_path / "trainer", config, tensors)
    with pytest.warns(UserWarning, match="probably BERT's own value"):
        convert_checkpoint(trainer, tmp_path / "short", to=DECODER)
    opened = Checkpoint.open(decoder_of(trainer, max_positions=999)).architecture
    assert opened.max_position_embeddings == 999
    assert (opened.pad_token_id, opened.cls_token_id, opened.eos_token_ids) == (PAD, CLS, (SEP,))
    del config["max_position_embeddings"]
    (trainer / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="--max-positions"):
        convert_checkpoint(trainer, tmp_path / "none", to=DECODER)


def test_a_flexbert_that_is_no_modernbert_is_refused_with_every_reason(tmp_path: Path) -> None:
    architecture = tiny_architecture()
    changes = {
        "normalization": ...,
        "mlp_layer": "mlp",
        "attn_out_bias": True,
        "skip_first_prenorm": False,
        "rotary_emb_dim": 16,
    }
    tensors = flexbert_tensors(encoder_tensors(architecture))
    trainer = write(tmp_path / "trainer", flexbert_config(architecture, **changes), tensors)
    with pytest.raises(ConfigurationError, match="not a ModernBERT") as caught:
        convert_checkpoint(trainer, tmp_path / "out", to=DECODER)
    for reason in (
        "normalization is 'rmsnorm', not 'layernorm'",
        "mlp_layer is 'mlp'",
        "attn_qkv_bias and attn_out_bias differ",
        "skip_first_prenorm is False, not True",
        "rotary_emb_dim is 16, not null or the head width (32)",
    ):
        assert reason in str(caught.value)


def test_unknown_keys_of_the_trainer_are_named(tmp_path: Path) -> None:
    architecture = tiny_architecture()
    tensors = flexbert_tensors(encoder_tensors(architecture))
    trainer = write(tmp_path / "trainer", flexbert_config(architecture, novelty=1), tensors)
    with pytest.warns(UserWarning, match="not known and are ignored: novelty"):
        decoder_of(trainer)


def test_pickles_are_refused_with_a_way_out_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    architecture = tiny_architecture()
    tensors = flexbert_tensors(encoder_tensors(architecture))
    trainer = write(tmp_path / "trainer", flexbert_config(architecture), tensors)
    expected = contents(decoder_of(trainer))
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save({"state": {"model": state, "run_name": "x"}}, trainer / "latest-rank0.pt")
    (trainer / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Loading a pickle can run any code") as caught:
        convert_checkpoint(trainer, tmp_path / "out", to=DECODER)
    lines = str(caught.value).splitlines()
    exec("\n".join(line[2:] for line in lines if line.startswith("  ")), {})
    convert_checkpoint(trainer, tmp_path / "out", to=DECODER)
    assert contents(tmp_path / "out") == expected
    (trainer / "model.safetensors").unlink()
    documented = re.search(r"```python\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL)
    assert documented is not None
    monkeypatch.chdir(trainer)
    exec(documented[1], {})
    convert_checkpoint(trainer, tmp_path / "out", to=DECODER, overwrite=True)
    assert contents(tmp_path / "out") == expected


# refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', which cannot be converted"),
        ({"model_type": "bert"}, "with the key attention_layer"),
        ({"architectures": ["ModernBertForSequenceClassification"]}, "A classifier is not converted"),
        ({"architectures": ["ModernBertForQuestionAnswering"]}, "A classifier is not converted"),
        ({"architectures": ["SomethingElse"]}, "which has no decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with gptq"),
        ({"sliding_window": 3}, "sliding_window is 3, but local_attention is 128"),
        ({"local_attention": 1}, "a window of 0"),
    ],
)
def test_an_encoder_without_counterpart_is_refused_with_the_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    encoder = write_encoder(tmp_path / "encoder", **changes)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        decoder_of(encoder)
    assert not (tmp_path / "encoder-decoder").exists()


def test_a_decoders_classifier_is_refused_too(tmp_path: Path) -> None:
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION)
    decoder = write_checkpoint(tmp_path / "decoder", architecture)
    with pytest.raises(ConfigurationError, match="A classifier is not converted"):
        convert_checkpoint(decoder, tmp_path / "out", to=ENCODER)


def test_every_tensor_that_does_not_fit_is_listed_in_one_error(tmp_path: Path) -> None:
    tensors = encoder_tensors(tiny_architecture())
    for i in (0, 1, 3):
        tensors[f"model.layers.{i}.attn.Wqkv.weight"] = np.zeros((190, 64), np.float32)
    del tensors["head.norm.weight"]
    tensors["lm_head.dense.weight"] = tensors["head.dense.weight"]
    tensors["classifier.weight"] = np.zeros((2, 64), np.float32)
    tensors["model.final_norm.weight"] = np.zeros(64, np.int64)
    encoder = write_encoder(tmp_path / "encoder")
    write_safetensors(encoder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        decoder_of(encoder)
    for part in (
        "1 missing: head.norm.weight (64,)",
        "2 unexpected: ",
        "lm_head.dense.weight (64, 64)",
        "classifier.weight (2, 64)",
        "3 misshapen: model.layers.{0-1,3}.attn.Wqkv.weight: expected (192, 64) (a third each for q, k and v)"
        ", found (190, 64)",
        "1 not floating point: model.final_norm.weight: I64",
    ):
        assert part in str(caught.value)


def test_parts_of_different_types_cannot_be_joined(tmp_path: Path) -> None:
    architecture = tiny_architecture()
    decoder = write_checkpoint(tmp_path / "decoder", architecture)
    tensors = random_tensors(architecture)
    tensors["model.layers.2.attn.k_proj.weight"] = tensors["model.layers.2.attn.k_proj.weight"].astype(
        np.float16
    )
    write_safetensors(decoder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn\.Wqkv\.weight: F32, F16, F32"):
        convert_checkpoint(decoder, tmp_path / "out", to=ENCODER)


def test_a_copy_that_differs_from_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    tensors = encoder_tensors(tiny_architecture())
    tensors["decoder.weight"] = tensors["model.embeddings.tok_embeddings.weight"] + 1
    encoder = write(tmp_path / "encoder", encoder_config(tiny_architecture()), tensors)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        decoder_of(encoder)


def test_what_needs_no_conversion_or_would_destroy_its_source_is_refused(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    with pytest.raises(InputError, match="in encoder format already"):
        convert_checkpoint(encoder, tmp_path / "out", to=ENCODER)
    with pytest.raises(InputError, match="is the checkpoint itself"):
        convert_checkpoint(encoder, encoder, to=DECODER, overwrite=True)
    with pytest.raises(InputError, match="leave --max-positions out"):
        convert_checkpoint(encoder, tmp_path / "out", to=DECODER, max_positions=5)
    decoder = decoder_of(encoder)
    within = write_encoder(decoder / "encoder")
    with pytest.raises(InputError, match=r"the folders in it \(encoder\) would be lost"):
        convert_checkpoint(within, decoder, to=DECODER, overwrite=True)
    assert (within / "model.safetensors").is_file()
    shutil.rmtree(within)
    with pytest.raises(InputError, match="exists and is not empty"):
        decoder_of(encoder)
    decoder_of(encoder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "encoder-decoder"]
    assert Checkpoint.open(decoder)
