"""What transformers saves as an encoder is, once converted, one model to transformers and to the engine."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import open_runtime, random_ids, relative_error, tiny_architecture, whole_logits
from encoder_checkpoints import config_of, contents, encoder_tensors, flexbert_config, flexbert_tensors, write
from modernbert_decoder.architecture import DecoderArchitecture, LayerKind, RotaryParameters
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.conversion.convert import convert_checkpoint
from modernbert_decoder.conversion.kinds import CheckpointKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DECODER, ENCODER = CheckpointKind.DECODER, CheckpointKind.ENCODER
# Two float32 implementations of four layers.
LOGIT_TOLERANCE = 1e-4
LENGTH = 150  # past two windows
_BASE = RotaryParameters(theta=10000.0)

ARCHITECTURES: dict[str, DecoderArchitecture] = {
    "one base": tiny_architecture(rotary=dict.fromkeys(LayerKind, _BASE)),
    "two bases": tiny_architecture(
        rotary={LayerKind.FULL: RotaryParameters(theta=160000.0), LayerKind.SLIDING: _BASE}
    ),
    "biases, a small window, untied": tiny_architecture(
        rotary=dict.fromkeys(LayerKind, _BASE),
        window=16,
        full_every=2,
        tie_word_embeddings=False,
        **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True),
    ),
}


def encoder_model(architecture: DecoderArchitecture) -> Any:
    """transformers' encoder with random weights, configured in its own way."""
    a = architecture
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "norm_bias",
        "mlp_bias",
        "attention_bias",
        "classifier_bias",
        "decoder_bias",
        "tie_word_embeddings",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "cls_token_id",
        "sep_token_id",
        "eos_token_id",
        "norm_eps",
    )
    config = transformers.ModernBertConfig(
        **{key: getattr(a, key) for key in same},
        local_attention=2 * a.window,
        layer_types=[kind.value for kind in a.layer_kinds],
        rope_parameters={
            kind.value: {"rope_type": "default", "rope_theta": a.rotary[kind].theta} for kind in LayerKind
        },
    )
    model = transformers.ModernBertForMaskedLM._from_config(config, attn_implementation="eager").eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in encoder_tensors(a).items()}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"decoder.weight"}  # tied
    return model


def logits_of(model: Any, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.no_grad():
        logits: np.ndarray[Any, np.dtype[np.float32]] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def loaded(class_name: str, folder: Path) -> Any:
    """A model as transformers reads it, with every weight found in the file."""
    model, info = getattr(transformers, class_name).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> DecoderArchitecture:
    return ARCHITECTURES[request.param]


@pytest.fixture
def encoder(architecture: DecoderArchitecture, tmp_path: Path) -> Path:
    encoder_model(architecture).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def decoder(architecture: DecoderArchitecture, encoder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "decoder"
    thetas = {rotary.theta for rotary in architecture.rotary.values()}
    if len(thetas) > 1:
        with pytest.warns(UserWarning, match="transformers 4 will use the RoPE base 160000"):
            convert_checkpoint(encoder, folder, to=DECODER)
    else:
        convert_checkpoint(encoder, folder, to=DECODER)
    return folder


def test_transformers_and_the_engine_compute_the_same_with_a_converted_encoder(
    architecture: DecoderArchitecture, decoder: Path
) -> None:
    assert Checkpoint.open(decoder).architecture == architecture
    ids = random_ids(architecture, LENGTH)
    reference = logits_of(loaded("ModernBertDecoderForCausalLM", decoder), ids)
    assert relative_error(whole_logits(open_runtime(decoder), ids), reference) < LOGIT_TOLERANCE


def test_a_single_token_gives_the_encoders_logits(
    architecture: DecoderArchitecture, encoder: Path, decoder: Path
) -> None:
    # One token sees only itself, whichever way attention looks: layers and head must be the same.
    ids = random_ids(architecture, 1)
    expected = logits_of(loaded("ModernBertForMaskedLM", encoder), ids)
    assert relative_error(whole_logits(open_runtime(decoder), ids), expected) < LOGIT_TOLERANCE
    got = logits_of(loaded("ModernBertDecoderForCausalLM", decoder), ids)
    assert relative_error(got, expected) < LOGIT_TOLERANCE


def test_an_encoder_converted_back_computes_the_same_bits(
    architecture: DecoderArchitecture, encoder: Path, decoder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(decoder, tmp_path / "back", to=ENCODER)
    assert contents(tmp_path / "back") == contents(encoder)
    ids = random_ids(architecture, LENGTH)
    expected = logits_of(loaded("ModernBertForMaskedLM", encoder), ids)
    np.testing.assert_array_equal(
        logits_of(loaded("ModernBertForMaskedLM", tmp_path / "back"), ids), expected
    )


def test_transformers_reads_window_kinds_and_bases_of_the_encoder_from_both_folders(
    encoder: Path, decoder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(decoder, tmp_path / "back", to=ENCODER)
    original = transformers.ModernBertConfig.from_pretrained(encoder)
    converted = transformers.ModernBertDecoderConfig.from_pretrained(decoder)
    back = transformers.ModernBertConfig.from_pretrained(tmp_path / "back")
    for config in (converted, back):
        assert config.rope_parameters == original.rope_parameters
        assert config.layer_types == original.layer_types
        assert config.sliding_window == original.sliding_window == original.local_attention // 2
        assert config.local_attention == original.local_attention
        assert config.classifier_pooling == original.classifier_pooling


def test_the_old_spelling_of_an_encoder_means_to_us_what_it_means_to_transformers(
    encoder: Path, tmp_path: Path
) -> None:
    config = config_of(encoder)
    for key in ("rope_parameters", "layer_types"):
        del config[key]
    config |= {"global_rope_theta": 500.0, "global_attn_every_n_layers": 2}  # no local base: 10000
    (encoder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"RoPE base 500\.0 in sliding layers too, not 10000"):
        convert_checkpoint(encoder, tmp_path / "decoder", to=DECODER)
    original = transformers.ModernBertConfig.from_pretrained(encoder)
    converted = transformers.ModernBertDecoderConfig.from_pretrained(tmp_path / "decoder")
    assert converted.rope_parameters == original.rope_parameters
    assert converted.layer_types == original.layer_types
    stated = config_of(tmp_path / "decoder")
    assert (stated["global_rope_theta"], stated["local_rope_theta"]) == (500.0, 10000.0)


def test_a_trainers_checkpoint_of_the_same_weights_gives_the_same_file(
    architecture: DecoderArchitecture, encoder: Path, decoder: Path, tmp_path: Path
) -> None:
    tensors = {
        name: np.frombuffer(data, np.float32).reshape(shape)
        for name, (_, shape, data) in contents(encoder).items()
    }
    every = 2 if architecture.window == 16 else 3
    config = flexbert_config(architecture, global_attn_every_n_layers=every)
    trainer = write(tmp_path / "trainer", config, flexbert_tensors(tensors))
    is_limited = bool(architecture.reader_limitations())
    with pytest.warns(UserWarning, match="RoPE base") if is_limited else nullcontext():
        convert_checkpoint(trainer, tmp_path / "converted", to=DECODER)
    name = "model.safetensors"
    assert (tmp_path / "converted" / name).read_bytes() == (decoder / name).read_bytes()
    assert Checkpoint.open(tmp_path / "converted").architecture == architecture


def test_bfloat16_and_a_bare_model_survive_transformers_on_both_sides(tmp_path: Path) -> None:
    model = encoder_model(ARCHITECTURES["one base"]).to(torch.bfloat16)
    model.model.save_pretrained(tmp_path / "encoder")
    convert_checkpoint(tmp_path / "encoder", tmp_path / "decoder", to=DECODER)
    decoder, info = transformers.ModernBertDecoderModel.from_pretrained(
        tmp_path / "decoder", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert decoder.dtype == torch.bfloat16
    wqkv = model.model.layers[1].attn.Wqkv.weight
    attention = decoder.layers[1].attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(torch.cat(parts), wqkv)
