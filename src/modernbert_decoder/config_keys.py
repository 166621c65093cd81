"""The keys of a `config.json`: typed reading, and what each key that we do not use may say.

Responsible for type errors in the file and for telling harmless keys from keys that would change the numbers.
Must not know what the values mean for the network; `spellings.py` and `architecture.py` do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.errors import ConfigurationError, ModelNotFoundError

QUANTIZATION_KEY: Final = "modernbert_decoder_quantization"
"""Our own key in folders of packed weights; its content belongs to `quantization.py`."""

BOOKKEEPING_KEYS: Final = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "is_decoder",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "prefix",
        "return_dict",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        QUANTIZATION_KEY,
    }
)
"""Written by transformers' `save_pretrained` (or by us) and without effect on this model at any value."""

GENERATION_KEYS: Final = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
"""Sampling settings of old files; they belong in `generation_config.json` and never touch the logits."""

INERT_KEYS: Final = frozenset(
    {
        "classifier_pooling",
        "deterministic_flash_attn",
        "reference_compile",
        "repad_logits_with_grad",
        "sparse_pred_ignore_index",
        "sparse_prediction",
    }
)
"""Keys of the ModernBERT *encoder* that no decoder class reads: without effect at any value.

They are the exception to the rule that a key passes at its harmless values only (`INERT_VALUES`): no value of
theirs asks a decoder for other numbers, so to refuse one would only refuse good files. Decoders inherit them
from the file of the encoder they were trained like, at whatever value that had, and a conversion carries them
along. Even in the encoder, `reference_compile`, `deterministic_flash_attn` and `repad_logits_with_grad` only
choose how the same numbers are computed, and `sparse_prediction` and `sparse_pred_ignore_index` choose for
which positions a training step computes them.

`classifier_pooling` deserves a word: released decoders inherited "cls" or "mean" from the encoder's file, but
the decoder's classification head pools the last token that is not padding, whatever the key says. A causal
model could not do otherwise with "cls" (the first token sees nothing else).
"""

INERT_VALUES: Final[Mapping[str, tuple[object, ...]]] = {
    "add_cross_attention": (False, None),
    "causal_mask": (True, None),
    "compression_config": (None,),
    "cross_attention_hidden_size": (None,),
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "original_max_position_embeddings": (None,),  # read only inside rope_parameters
    "partial_rotary_factor": (1.0, None),
    "per_layer_config": (None, {}),
    # "absolute" is the default that transformers 4's base class wrote into every file, "sans_pos" the one of
    # the original trainer; none of these adds a position embedding to a ModernBERT.
    "position_embedding_type": ("absolute", "sans_pos", "rope", "rotary", None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
    "tie_last_hidden_states": (True, None),
}
"""Keys that are harmless only at these values; any other value asks for numbers that we would not compute."""


class ConfigReader:
    """Reads typed values out of a parsed `config.json` and remembers which keys were asked for.

    Every method raises `ConfigurationError` that names the key, the value seen and what is expected.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._keys_read: set[str] = set()

    def value(self, key: str) -> Any:
        """The value as parsed; None when the key is absent or null."""
        self._keys_read.add(key)
        return self._config.get(key)

    def states(self, key: str) -> bool:
        """Whether the file has this key with a value other than null."""
        return self.value(key) is not None

    def integer(self, key: str, default: int) -> int:
        """An integer; `default` when the key is absent. Null is refused."""
        self._keys_read.add(key)
        return as_integer(self._config.get(key, default), key)

    def optional_integer(self, key: str) -> int | None:
        """An integer, or None when the key is absent or null."""
        value = self.value(key)
        return None if value is None else as_integer(value, key)

    def number(self, key: str, default: float) -> float:
        """A finite number; `default` when the key is absent. Null is refused."""
        self._keys_read.add(key)
        return as_number(self._config.get(key, default), key)

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None when the key is absent or null."""
        value = self.value(key)
        return None if value is None else as_number(value, key)

    def integer_or_null(self, key: str, default: int) -> int | None:
        """An integer, None when it is null; `default` when the key is absent."""
        return self.optional_integer(key) if key in self._config else self.integer(key, default)

    def number_or_null(self, key: str, default: float) -> float | None:
        """A finite number, None when it is null; `default` when the key is absent."""
        return self.optional_number(key) if key in self._config else self.number(key, default)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; `default` when the key is absent. Null is refused."""
        self._keys_read.add(key)
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise ConfigurationError(f"{key} is {value!r}, but must be true or false.")
        return value

    def text(self, key: str, default: str) -> str:
        """A string; `default` when the key is absent. Null is refused."""
        self._keys_read.add(key)
        value = self._config.get(key, default)
        if not isinstance(value, str):
            raise ConfigurationError(f"{key} is {value!r}, but must be a string.")
        return value

    def has(self, key: str) -> bool:
        """Whether the file has this key, null included."""
        return key in self._config

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object; empty when the key is absent or null."""
        return as_mapping(self.value(key), key)

    def refuse_what_changes_numbers(self) -> None:
        """Raises for the first key in `INERT_VALUES` whose value is not one of the harmless ones."""
        for key, harmless in INERT_VALUES.items():
            if key not in self._config or self._config[key] in harmless:
                continue
            value = self._config[key]
            if key == "quantization_config":
                raise ConfigurationError(_quantization_message(value))
            raise ConfigurationError(
                f"{key} is {value!r}, which would change the numbers of the model and is not implemented. "
                f"Supported: {', '.join(repr(v) for v in harmless)}, or no such key."
            )

    def unknown_keys(self) -> list[str]:
        """Keys that were neither read nor stand in any list of this module, sorted."""
        listed = BOOKKEEPING_KEYS | GENERATION_KEYS | INERT_KEYS | INERT_VALUES.keys() | self._keys_read
        return sorted(str(key) for key in self._config if key not in listed)


def load_config(path: Path) -> Mapping[str, Any]:
    """Parses a `config.json`.

    Raises:
        ModelNotFoundError: there is no such file.
        ConfigurationError: it cannot be read, is not valid JSON, or not a JSON object.
    """
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(
            f"There is no {path.name} at {path}. A model folder holds config.json, model.safetensors and "
            "tokenizer.json; check the path, or download the missing file."
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror or error}). It must be a file that you may read: check "
            "its permissions, or download it again."
        ) from None
    except (ValueError, RecursionError) as error:  # includes undecodable bytes
        raise ConfigurationError(f"{path} is not valid JSON ({error}). Download or write it again.") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} holds {type(config).__name__!r}, but must hold one JSON object.")
    return config


def as_integer(value: object, name: str) -> int:
    """`value` if it is an integer (true and 3.0 are not); otherwise `ConfigurationError` naming `name`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{name} is {value!r}, but must be an integer.")
    return value


def as_number(value: object, name: str) -> float:
    """`value` as a float if it is a finite number (JSON true is not); otherwise `ConfigurationError`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{name} is {value!r}, but must be a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigurationError(f"{name} is {value!r}, but must be a finite number.")
    return number


def as_mapping(value: object, name: str) -> Mapping[str, Any]:
    """`value` if it is a JSON object, empty for None; otherwise `ConfigurationError`."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{name} is {value!r}, but must be a JSON object.")
    return value


def _quantization_message(value: object) -> str:
    method = value.get("quant_method", "an unnamed method") if isinstance(value, Mapping) else repr(value)
    return (
        f"quantization_config says that the weights were quantized with {method}, a format that is not read "
        "here. Use the original float checkpoint; `mbd quantize` packs it to int8 or int4."
    )
