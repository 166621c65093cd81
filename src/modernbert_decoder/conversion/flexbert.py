"""The configuration of a FlexBERT (composer) checkpoint, in terms of the decoder's `config.json`.

Responsible for the trainer's keys and defaults, for refusing variants that are no ModernBERT, and for what
the trainer's file does not state (special ids, context). Must not know about tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.architecture import MODEL_TYPE, Head, LayerKind
from modernbert_decoder.config_keys import ConfigReader, as_mapping, load_config
from modernbert_decoder.errors import ConfigurationError
from modernbert_decoder.spellings import CLASS_NAMES

_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# key -> (the trainer's default, the values with which the network is a ModernBERT)
_REQUIRED: Final[Mapping[str, tuple[object, tuple[object, ...]]]] = {
    "attention_layer": ("base", ("rope", "unpadded_rope", "padded_rope")),
    "bert_layer": ("prenorm", ("prenorm", "unpadded_prenorm", "padded_prenorm")),
    "embedding_layer": ("absolute_pos", ("sans_pos", "unpadded_sans_pos", "padded_sans_pos")),
    "encoder_layer": ("base", ("base", "unpadded_base", "padded_base")),
    "mlp_layer": ("mlp", ("glu",)),
    "normalization": ("rmsnorm", ("layernorm",)),
    "embed_norm": (True, (True,)),
    "skip_first_prenorm": (False, (True,)),
    "final_norm": (False, (True,)),
    "head_pred_norm": (True, (True,)),
    "rotary_emb_interleaved": (False, (False,)),
    "rotary_emb_scale_base": (None, (None,)),
    "initial_attention_layer": (None, (None,)),
    "initial_bert_layer": (None, (None,)),
    "initial_mlp_layer": (None, (None,)),
}
# One key here where the trainer has two: (ours, the trainer's pair).
_PAIRED_BIASES: Final = (
    ("attention_bias", ("attn_qkv_bias", "attn_out_bias")),
    ("mlp_bias", ("mlp_in_bias", "mlp_out_bias")),
)
_DROPOUTS: Final = {
    "attention_dropout": "attention_probs_dropout_prob",
    "embedding_dropout": "embed_dropout_prob",
    "mlp_dropout": "mlp_dropout_prob",
}
# How training ran, other heads, and what the class inherits from BERT without using it.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "activation_function",
        "alibi_starting_size",
        "allow_embedding_resizing",
        "architectures",
        "attn_out_dropout_prob",
        "auto_map",
        "causal_mask",
        "classifier_dropout",
        "compile_model",
        "deterministic_fa2",
        "head_class_act",
        "head_class_bias",
        "head_class_dropout",
        "head_class_norm",
        "head_pred_dropout",
        "hidden_dropout_prob",
        "id2label",
        "init_method",
        "init_small_embedding",
        "initializer_range",
        "is_causal",
        "label2id",
        "layer_norm_eps",
        "loss_function",
        "loss_kwargs",
        "masked_prediction",
        "max_position_embeddings",
        "max_seq_len",
        "num_initial_layers",
        "num_labels",
        "pad_logits",
        "pad_token_id",
        "padding",
        "pooling_type",
        "position_embedding_type",
        "problem_type",
        "tokenizer_name",
        "type_vocab_size",
        "unpad_embeddings",
        "use_cache",
        "use_fa2",
        "use_sdpa_attn_mask",
    }
)
_TOKEN_NAMES: Final = {
    "bos_token_id": ("bos_token", "cls_token"),
    "eos_token_id": ("eos_token", "sep_token"),
    "cls_token_id": ("cls_token", "bos_token"),
    "sep_token_id": ("sep_token", "eos_token"),
    "pad_token_id": ("pad_token",),
}
_BERT_CONTEXT: Final = 512  # BERT's own max_position_embeddings, which every FlexBERT file inherits


def flexbert_as_decoder_config(
    config: Mapping[str, Any], *, folder: Path, num_embeddings: int | None, max_positions: int | None
) -> dict[str, Any]:
    """The trainer's configuration rewritten for the decoder of the same sizes.

    `sliding_window` is the width over both sides, as `local_attention` is; -1 means that every layer is full.
    `local_attn_rotary_emb_base` -1, or none, means `rotary_emb_base`. The trainer rounds the vocabulary up
    when it makes the embedding, so the embedding's rows decide, not `vocab_size`.

    Args:
        config: the parsed `config.json`.
        folder: where tokenizer files are looked for: they name the special ids, which the trainer's file
            does not.
        num_embeddings: rows of the embedding that is there.
        max_positions: the context, if it is known better than the file knows it.

    Raises:
        ConfigurationError: sizes missing, or a variant that ModernBERT cannot express.
    """
    where = str(folder / "config.json")
    reader = ConfigReader(config)
    if missing := [key for key in _SIZES if not reader.states(key)]:
        raise ConfigurationError(f"{where} lacks {', '.join(missing)}. Copy them from the training recipe.")
    _refuse_variants(reader, where)
    converted: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": [CLASS_NAMES[Head.CAUSAL_LM]]}
    converted |= {key: reader.integer(key, 0) for key in _SIZES}
    converted["vocab_size"] = max(converted["vocab_size"], num_embeddings or 0)
    converted |= {ours: reader.number(theirs, 0.0) for ours, theirs in _DROPOUTS.items()}
    norm = as_mapping(reader.value("norm_kwargs"), "norm_kwargs")
    converted |= {
        # of torch's LayerNorm, which gets these arguments
        "norm_eps": norm.get("eps", 1e-5),
        "norm_bias": norm.get("bias", True),
        "hidden_activation": reader.text("hidden_act", "gelu"),
        "classifier_activation": reader.text("head_pred_act", "silu"),
        "classifier_bias": reader.boolean("head_pred_bias", False),
        "decoder_bias": reader.boolean("decoder_bias", True),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", True),
        "initializer_range": reader.number("init_std", 0.02),
        "initializer_cutoff_factor": reader.number("init_cutoff_factor", 2.0),
        "max_position_embeddings": max_positions or _context(reader),
    }
    for ours, (first, _) in _PAIRED_BIASES:
        converted[ours] = reader.boolean(first, False)
    converted |= _attention(reader) | _special_ids(reader, folder)
    _warn_about_unknown_keys(reader, where)
    return converted


def _refuse_variants(reader: ConfigReader, where: str) -> None:
    """Raises one error with every key whose value makes another network than ModernBERT."""
    problems = []
    for key, (default, allowed) in _REQUIRED.items():
        value = reader.value(key) if reader.has(key) else default
        if value not in allowed:
            problems.append(f"{key} is {value!r}, not {' or '.join(repr(each) for each in allowed)}")
    for _, (first, second) in _PAIRED_BIASES:
        if reader.boolean(first, False) != reader.boolean(second, False):
            problems.append(f"{first} and {second} differ")
    head_dim = reader.integer("hidden_size", 0) // max(1, reader.integer("num_attention_heads", 0))
    for key in ("rotary_emb_dim", "local_attn_rotary_emb_dim"):
        if reader.optional_integer(key) not in (None, head_dim):
            problems.append(f"{key} is {reader.value(key)!r}, not null or the head width ({head_dim})")
    if problems:
        raise ConfigurationError(
            f"{where} describes a FlexBERT that is not a ModernBERT and has no counterpart in Hugging Face "
            f"format:\n  " + "\n  ".join(problems) + "\nA key that the file leaves out has the trainer's "
            "default. If the model was trained otherwise, correct the file from the training recipe"
        )


def _attention(reader: ConfigReader) -> dict[str, Any]:
    """Window, layer kinds and bases."""
    num_layers = reader.integer("num_hidden_layers", 0)
    width = reader.integer("sliding_window", -1)
    every = reader.integer("global_attn_every_n_layers", -1)
    full = reader.number("rotary_emb_base", 10000.0)
    local = reader.optional_number("local_attn_rotary_emb_base")
    stated: dict[str, Any] = {
        "global_rope_theta": full,
        "local_rope_theta": full if local is None or local == -1 else local,
    }
    if width == -1:
        return stated | {"global_attn_every_n_layers": 1}
    if every == -1:  # a window without a period: every layer has it
        stated["layer_types"] = [LayerKind.SLIDING.value] * num_layers
    else:
        stated["global_attn_every_n_layers"] = every
    return stated | {"local_attention": width}


def _context(reader: ConfigReader) -> int:
    """The trainer's model has no limit of its own; the recipe's sequence length, or what BERT's class says.

    Raises:
        ConfigurationError: nothing says it.
    """
    stated = reader.optional_integer("max_seq_len")
    if stated is not None:
        return stated
    inherited = reader.optional_integer("max_position_embeddings")
    if inherited is None:
        raise ConfigurationError(
            "the trainer's configuration does not say how long texts may be; state it "
            "(mbd convert --max-positions, for example 7999)"
        )
    if inherited == _BERT_CONTEXT:
        warnings.warn(
            f"max_position_embeddings is {_BERT_CONTEXT}, probably BERT's own value, which the trainer never "
            "changes; if the model was trained on longer texts, state their length (--max-positions)",
            UserWarning,
            stacklevel=4,
        )
    return inherited


def _special_ids(reader: ConfigReader, folder: Path) -> dict[str, int]:
    """The ids of the special tokens: the tokenizer files name them; what they leave open, the configuration
    may state (not padding, where it repeats BERT's).
    """
    stated = {key: reader.optional_integer(key) for key in _TOKEN_NAMES if key != "pad_token_id"}
    special_ids = {key: token_id for key, token_id in stated.items() if token_id is not None}
    if not (folder / "tokenizer.json").is_file():
        return special_ids
    ids = _vocabulary(load_config(folder / "tokenizer.json"))
    named: dict[str, Any] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file_name).is_file():
            named |= load_config(folder / file_name)
    for key, names in _TOKEN_NAMES.items():
        tokens = [named[name] for name in names if named.get(name) is not None]
        if tokens:
            special_ids[key] = _token_id(folder, tokens[0], ids)
    return special_ids


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, of a parsed `tokenizer.json`; ordinary tokens only where the file gives their ids."""
    vocabulary = as_mapping(tokenizer.get("model"), "model").get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, Mapping) else {}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}


def _token_id(folder: Path, token: Any, ids: Mapping[str, int]) -> int:
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str) or content not in ids:
        raise ConfigurationError(
            f"{folder}: tokenizer_config.json names the special token {content!r}, which tokenizer.json does "
            "not have. Copy both from one model."
        )
    return ids[content]


def _warn_about_unknown_keys(reader: ConfigReader, where: str) -> None:
    if unknown := [key for key in reader.unknown_keys() if key not in _WITHOUT_EFFECT]:
        warnings.warn(
            f"{where}: these keys are not known and are ignored: {', '.join(unknown)}. If one of them "
            "changes the model, the converted one will differ from it.",
            UserWarning,
            stacklevel=4,
        )
