"""Which format a checkpoint is in, and its `config.json` in terms of the decoder and back.

Responsible for what the configurations of a ModernBERT encoder and decoder have in common and where they
differ (classes, defaults, direction). The keys themselves are read by `DecoderArchitecture`. Must not know
about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from modernbert_decoder.architecture import MODEL_TYPE, DecoderArchitecture, Head, LayerKind
from modernbert_decoder.config_keys import INERT_KEYS, as_mapping
from modernbert_decoder.errors import ConfigurationError
from modernbert_decoder.spellings import CLASS_NAMES, full_every

ENCODER_MODEL_TYPE: Final = "modernbert"
FLEXBERT_MODEL_TYPE: Final = "flex_bert"

ENCODER_CLASS_NAMES: Final[Mapping[Head, str]] = {
    Head.CAUSAL_LM: "ModernBertForMaskedLM",  # its head is the decoder's, under another name
    Head.NONE: "ModernBertModel",
}
# transformers' defaults for the encoder; the documented ones of the decoder are 160000 for both kinds.
ENCODER_THETAS: Final[Mapping[LayerKind, float]] = {LayerKind.FULL: 160000.0, LayerKind.SLIDING: 10000.0}

_THETA_KEYS: Final = {LayerKind.FULL: "global_rope_theta", LayerKind.SLIDING: "local_rope_theta"}
# Which way attention looks follows from the class in the new format, whatever the file of the old one says.
_DIRECTION_KEYS: Final = frozenset({"causal_mask", "is_causal", "is_decoder"})
# Keys that mean nothing to a decoder but go along, so that converting back restores them.
_CARRIED_KEYS: Final = INERT_KEYS | {"dtype", "torch_dtype"}
_DECODER_ONLY_KEYS: Final = ("use_cache", "sliding_window")


class CheckpointKind(StrEnum):
    """The formats that are told apart, by `config.json` alone."""

    DECODER = "decoder"  # ModernBertDecoder*, q, k and v apart
    ENCODER = "encoder"  # ModernBert*, fused Wqkv
    FLEXBERT = "flexbert"  # the trainer's own names and keys


def kind_of(config: Mapping[str, Any], *, source: str) -> CheckpointKind:
    """The format that a parsed `config.json` describes.

    FlexBERT's class inherits `model_type` "bert" (and a training recipe has none), so it is recognised by its
    own key `attention_layer`.

    Raises:
        ConfigurationError: another model.
    """
    model_type = config.get("model_type")
    if model_type == MODEL_TYPE:
        return CheckpointKind.DECODER
    if model_type == ENCODER_MODEL_TYPE:
        return CheckpointKind.ENCODER
    if model_type == FLEXBERT_MODEL_TYPE or (model_type in (None, "bert") and "attention_layer" in config):
        return CheckpointKind.FLEXBERT
    raise ConfigurationError(
        f"{source}: model_type is {model_type!r}, which cannot be converted. These can: {MODEL_TYPE!r}, "
        f"{ENCODER_MODEL_TYPE!r}, and FlexBERT configurations (model_type {FLEXBERT_MODEL_TYPE!r}, or 'bert' "
        "with the key attention_layer)."
    )


def refuse_classifiers(config: Mapping[str, Any], *, source: str) -> None:
    """Raises `ConfigurationError` if `architectures` names a model with a classifier on top."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name.endswith(("Classification", "QuestionAnswering", "MultipleChoice")):
            raise ConfigurationError(
                f"{source}: architectures is {names!r}. A classifier is not converted: in an encoder it "
                "reads the first token or the mean, in a decoder the last token, so that its weights would "
                "mean nothing. Convert the language model it was fine-tuned from (ModernBertForMaskedLM or "
                "ModernBertDecoderForCausalLM), and fine-tune the result."
            )


def encoder_as_decoder_config(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The `config.json` of an encoder, rewritten for the decoder of the same sizes.

    Both read the remaining keys alike. A base that the file does not state is the *encoder's* default (a
    local base of null means the global one), and is written out, since the decoder's would be another.

    Raises:
        ConfigurationError: a class that has no counterpart.
    """
    converted = {key: value for key, value in config.items() if key not in _DIRECTION_KEYS}
    converted["model_type"] = MODEL_TYPE
    converted["architectures"] = [CLASS_NAMES[_encoder_head(config, source=source)]]
    nested = as_mapping(config.get("rope_parameters"), "rope_parameters")
    full = config.get(_THETA_KEYS[LayerKind.FULL])
    for kind, key in _THETA_KEYS.items():
        inner = as_mapping(nested.get(kind), f"rope_parameters.{kind}").get("rope_theta")
        if inner is None and config.get(key) is None:
            is_null = key in config and kind is LayerKind.SLIDING
            converted[key] = full if is_null and full is not None else ENCODER_THETAS[kind]
        if kind is LayerKind.FULL:
            full = inner if inner is not None else converted[key]
    return converted


def _encoder_head(config: Mapping[str, Any], *, source: str) -> Head:
    names = config.get("architectures")
    if names is None or names == []:
        return Head.CAUSAL_LM
    for head, class_name in ENCODER_CLASS_NAMES.items():
        if names == [class_name]:
            return head
    raise ConfigurationError(
        f"{source}: architectures is {names!r}, which has no decoder. Supported: "
        f"{', '.join(ENCODER_CLASS_NAMES.values())}."
    )


def carried_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What goes from one `config.json` into the other as it is."""
    return {key: config[key] for key in sorted(_CARRIED_KEYS & config.keys())}


def config_for(
    kind: CheckpointKind, architecture: DecoderArchitecture, carried: Mapping[str, Any]
) -> dict[str, Any]:
    """The `config.json` of a decoder or encoder; both RoPE bases are always stated."""
    config = architecture.to_config(warn=False)
    if kind is CheckpointKind.ENCODER:
        for key in _DECODER_ONLY_KEYS:
            del config[key]
        config["model_type"] = ENCODER_MODEL_TYPE
        config["architectures"] = [ENCODER_CLASS_NAMES[architecture.head]]
    return {**carried, **config}


def limitations(kind: CheckpointKind, architecture: DecoderArchitecture) -> tuple[str, ...]:
    """What some version of transformers will read differently from `config_for`; usually nothing."""
    if kind is CheckpointKind.DECODER:
        return architecture.reader_limitations()
    if full_every(architecture.layer_kinds) is None:
        return (
            "transformers 4 will choose the full layers of this encoder by global_attn_every_n_layers: it "
            "cannot express layer_types.",
        )
    return ()
