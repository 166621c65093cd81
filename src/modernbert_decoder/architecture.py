"""What a `config.json` of model type "modernbert-decoder" means: the one place that decides.

`DecoderArchitecture` is read from every spelling in the wild and holds resolved facts: layer kinds, window,
RoPE per layer kind, sizes, biases, head. Masks, cache sizes, graph attributes and tests are derived from it.
The details are next door: `spellings.py`, `config_keys.py`, `rotary.py`, `costs.py`. Must not know about
weights or devices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from modernbert_decoder import costs, spellings
from modernbert_decoder.config_keys import ConfigReader, load_config
from modernbert_decoder.costs import RELEASED_CONTEXT, RELEASED_SIZES, ReleasedSize
from modernbert_decoder.errors import ConfigurationError
from modernbert_decoder.rotary import RotaryParameters
from modernbert_decoder.spellings import ACTIVATIONS, Activation, Head, LayerKind

__all__ = [
    "ACTIVATIONS",
    "MODEL_TYPE",
    "RELEASED_SIZES",
    "Activation",
    "DecoderArchitecture",
    "Head",
    "LayerKind",
    "ReleasedSize",
    "RotaryParameters",
    "released_architecture",
]

MODEL_TYPE: Final = "modernbert-decoder"


# How from_config reads the fields whose key has the same name.
_INTEGERS: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_DROPOUTS: Final = ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
_NUMBERS: Final = (*_DROPOUTS, "norm_eps", "initializer_range")
_BOOLEANS: Final = (
    "norm_bias",
    "attention_bias",
    "mlp_bias",
    "decoder_bias",
    "classifier_bias",
    "tie_word_embeddings",
    "use_cache",
)
_TOKEN_IDS: Final = ("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id")


@dataclass(frozen=True, kw_only=True)
class DecoderArchitecture:
    """A ModernBERT decoder, resolved. Fields are named as the documented configuration names them.

    `window` counts visible keys, self included (64 in all released models). `rotary` always has both layer
    kinds. Mappings are copied and must not be changed. Use `dataclasses.replace` for variants; every
    construction validates.

    Raises:
        ConfigurationError: sizes, ids or names that make no model; the message names the key and what to do.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    classifier_activation: str = "gelu"
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False  # also the bias of the dense layer of either head
    tie_word_embeddings: bool = True
    layer_kinds: tuple[LayerKind, ...]
    window: int = spellings.DEFAULT_WINDOW
    rotary: Mapping[LayerKind, RotaryParameters] = field(hash=False)
    pad_token_id: int | None = 50283
    bos_token_id: int | None = 50281
    eos_token_ids: tuple[int, ...] = (50282,)
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282
    head: Head = Head.CAUSAL_LM
    id2label: Mapping[int, str] = field(hash=False, default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str | None = None
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_cutoff_factor: float | None = 2.0  # None means 3
    use_cache: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rotary", dict(self.rotary))
        object.__setattr__(self, "id2label", dict(self.id2label))
        self._validate_sizes()
        self._validate_layers()
        self._validate_names()
        self._validate_token_ids()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "config.json") -> DecoderArchitecture:
        """Reads a parsed `config.json` in any spelling of transformers 4, transformers 5 or Hub checkpoints.

        Keys in no list are reported in one `UserWarning`; keys that would change the numbers are errors.

        Args:
            config: the JSON object.
            source: what to call the file in messages.

        Raises:
            ConfigurationError: the file contradicts itself or asks for something that is not implemented.
        """
        try:
            architecture, ignored = cls._read(ConfigReader(config))
        except ConfigurationError as error:
            raise ConfigurationError(f"{source}: {error}") from None
        if ignored:
            warnings.warn(
                f"{source}: these keys are not known and are ignored: {', '.join(ignored)}. If one of them "
                "changes the model, its outputs will differ from the original's.",
                UserWarning,
                stacklevel=2,
            )
        return architecture

    @classmethod
    def from_file(cls, path: Path) -> DecoderArchitecture:
        """Reads a `config.json`.

        Raises:
            ModelNotFoundError: there is no such file.
            ConfigurationError: not a JSON object, or one that cannot be honoured.
        """
        return cls.from_config(load_config(path), source=str(path))

    @classmethod
    def from_folder(cls, folder: Path) -> DecoderArchitecture:
        """Reads `config.json` in a model folder; errors as in `from_file`."""
        return cls.from_file(folder / "config.json")

    @classmethod
    def _read(cls, reader: ConfigReader) -> tuple[DecoderArchitecture, list[str]]:
        """The architecture, and the keys to warn about."""
        _require_model_type(reader)
        reader.refuse_what_changes_numbers()
        defaults: dict[str, Any] = {f.name: f.default for f in fields(cls)}
        values: dict[str, Any] = {name: reader.integer(name, defaults[name]) for name in _INTEGERS}
        values |= {name: reader.number(name, defaults[name]) for name in _NUMBERS}
        values |= {name: reader.boolean(name, defaults[name]) for name in _BOOLEANS}
        values |= {
            name: reader.text(name, defaults[name]) for name in ("hidden_activation", "classifier_activation")
        }
        values |= {name: reader.integer_or_null(name, defaults[name]) for name in _TOKEN_IDS}
        values["eos_token_ids"] = spellings.read_eos_token_ids(reader, default=50282)
        values["initializer_cutoff_factor"] = reader.number_or_null("initializer_cutoff_factor", 2.0)
        values["problem_type"] = reader.value("problem_type")
        kinds = spellings.read_layer_kinds(reader, values["num_hidden_layers"])
        has_sliding_layers = LayerKind.SLIDING in kinds
        rotary, unused_keys = spellings.read_rotary(
            reader,
            max_position_embeddings=values["max_position_embeddings"],
            has_sliding_layers=has_sliding_layers,
        )
        architecture = cls(
            **values,
            layer_kinds=kinds,
            window=spellings.read_window(reader, has_sliding_layers=has_sliding_layers),
            rotary=rotary,
            head=spellings.read_head(reader),
            id2label=spellings.read_labels(reader),
        )
        architecture._require_agreement(reader)
        return architecture, [*reader.unknown_keys(), *unused_keys]

    def to_config(self, *, warn: bool = True) -> dict[str, Any]:
        """A `config.json` that transformers 4.57, transformers 5.24 and `from_config` read as this same
        model.

        Args:
            warn: issue a `UserWarning` with `reader_limitations()` if there are any.
        """
        if warn and (limitations := self.reader_limitations()):
            warnings.warn(" ".join(limitations), UserWarning, stacklevel=2)
        config: dict[str, Any] = {
            "model_type": MODEL_TYPE,
            "architectures": [spellings.CLASS_NAMES[self.head]],
        }
        for name in (*_INTEGERS, *_NUMBERS, *_BOOLEANS, *_TOKEN_IDS):
            config[name] = getattr(self, name)
        config |= {
            "hidden_activation": self.hidden_activation,
            "classifier_activation": self.classifier_activation,
            "initializer_cutoff_factor": self.initializer_cutoff_factor,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) > 1 else self.eos_token_id,
            "id2label": {str(i): label for i, label in self.id2label.items()},
            "label2id": {label: i for i, label in self.id2label.items()},
            "layer_types": [kind.value for kind in self.layer_kinds],
            "local_attention": 2 * self.window,
            "sliding_window": self.window,
        }
        if self.problem_type is not None:
            config["problem_type"] = self.problem_type
        if (every := spellings.full_every(self.layer_kinds)) is not None:
            config["global_attn_every_n_layers"] = every
        return config | spellings.rotary_to_config(self.rotary)

    def reader_limitations(self) -> tuple[str, ...]:
        """What some version of transformers cannot read back from `to_config()`; usually nothing."""
        limitations = list(spellings.rotary_limitations(self.rotary, self.layer_kinds))
        nulls = [name for name in (*_TOKEN_IDS, "initializer_cutoff_factor") if getattr(self, name) is None]
        if nulls:
            limitations.append(f"transformers 5 refuses a configuration in which {', '.join(nulls)} is null.")
        return tuple(limitations)

    @property
    def head_dim(self) -> int:
        """Width of one attention head; 64 in all released models."""
        return self.hidden_size // self.num_attention_heads

    @property
    def eos_token_id(self) -> int | None:
        """The first of `eos_token_ids`, None without any."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier."""
        return len(self.id2label)

    @property
    def num_full_layers(self) -> int:
        """Layers that see all earlier positions."""
        return self.layer_kinds.count(LayerKind.FULL)

    @property
    def num_sliding_layers(self) -> int:
        """Layers that see `window` positions."""
        return self.layer_kinds.count(LayerKind.SLIDING)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensor name -> shape for this head; `decoder.weight` only when untied.

        >>> released_architecture("17m").tensor_shapes()["model.layers.0.mlp.Wi.weight"]  # both halves
        (768, 256)
        """
        return costs.tensor_shapes(self)

    def num_parameters(self) -> int:
        """Values in all tensors, a tied vocabulary matrix counted once.

        >>> released_architecture("17m").num_parameters()
        16913600
        """
        return costs.num_parameters(self)

    def flops_per_token(self, context_length: int, *, with_head: bool = True) -> int:
        """Floating-point operations for the last of `context_length` tokens, 2 per multiply-add.

        At 17m, a layer has 4 * 256**2 + 3 * 256 * 384 = 557,056 weights; at position 1 each of the 7 layers
        adds 2 * 256 products for its single visible key. The head multiplies 256 * 256 + 50,368 * 256
        weights.

        >>> a = released_architecture("17m")
        >>> a.flops_per_token(1, with_head=False) == 2 * 7 * (557_056 + 2 * 256)
        True
        >>> a.flops_per_token(1) - a.flops_per_token(1, with_head=False) == 2 * 256 * (256 + 50_368)
        True
        >>> a.flops_per_token(1001) - a.flops_per_token(1000) == 2 * 3 * 2 * 256  # one key in 3 layers
        True
        """
        return costs.flops_per_token(self, context_length, with_head=with_head)

    def kv_cache_bytes(self, length: int, *, bytes_per_value: int = 4) -> int:
        """Bytes of keys and values of one sequence; sliding layers hold at most the window.

        >>> a = released_architecture("17m")  # 3 full layers, 4 sliding ones
        >>> a.kv_cache_bytes(1000) == (3 * 1000 + 4 * 64) * 2 * 256 * 4
        True
        >>> a.kv_cache_bytes(10) == a.naive_kv_cache_bytes(10)
        True
        """
        return costs.kv_cache_bytes(self, length, bytes_per_value=bytes_per_value)

    def naive_kv_cache_bytes(self, length: int, *, bytes_per_value: int = 4) -> int:
        """Bytes of keys and values of one sequence if every layer kept every position.

        >>> released_architecture("17m").naive_kv_cache_bytes(1000) == 7 * 1000 * 2 * 256 * 4
        True
        """
        return costs.naive_kv_cache_bytes(self, length, bytes_per_value=bytes_per_value)

    def decode_bytes(
        self, *, body_bytes_per_weight: float, vocabulary_bytes_per_weight: float, context_length: int
    ) -> int:
        """Bytes read to decode one token: weights once, vectors as float32, visible keys and values, one
        embedding row.

        In float32 at 17m that is every parameter once, one more embedding row, and the cache:

        >>> a = released_architecture("17m")
        >>> step = a.decode_bytes(body_bytes_per_weight=4, vocabulary_bytes_per_weight=4, context_length=100)
        >>> step == 4 * (a.num_parameters() + 256) + a.kv_cache_bytes(100)
        True
        """
        return costs.decode_bytes(
            self,
            body_bytes_per_weight=body_bytes_per_weight,
            vocabulary_bytes_per_weight=vocabulary_bytes_per_weight,
            context_length=context_length,
        )

    def _validate_sizes(self) -> None:
        for name in (*_INTEGERS, "window"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        for name in _DROPOUTS:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, but must lie between 0 and 1.")
        for name in ("norm_eps", "initializer_range", "initializer_cutoff_factor"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name} is {value}, but must be positive.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}). Change one of them."
            )

    def _validate_layers(self) -> None:
        assert len(self.layer_kinds) == self.num_hidden_layers, (self.layer_kinds, self.num_hidden_layers)
        assert set(self.rotary) == set(LayerKind), self.rotary
        for kind in set(self.layer_kinds):
            self.rotary[kind].validate_head_dim(self.head_dim)

    def _validate_names(self) -> None:
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}, which is not implemented. Supported: "
                    f"{', '.join(ACTIVATIONS)}."
                )
        if self.problem_type not in (None, *spellings.PROBLEM_TYPES):
            raise ConfigurationError(
                f"problem_type is {self.problem_type!r}, but must be null or one of "
                f"{', '.join(spellings.PROBLEM_TYPES)}."
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ConfigurationError(
                "problem_type is 'single_label_classification', but there is only one label. Name two "
                "labels, or use 'regression'."
            )

    def _validate_token_ids(self) -> None:
        ids = [(name, getattr(self, name)) for name in _TOKEN_IDS]
        for name, token_id in [*ids, *(("eos_token_id", token_id) for token_id in self.eos_token_ids)]:
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ConfigurationError(
                    f"{name} is {token_id}, outside the vocabulary of {self.vocab_size} entries (ids 0 to "
                    f"{self.vocab_size - 1}). State the right id, or null if there is none. (An id that the "
                    "file leaves out takes the documented default, made for 50368 entries.)"
                )

    def _require_agreement(self, reader: ConfigReader) -> None:
        """Other models' names for what this one states elsewhere: they may only repeat it."""
        repeated = {
            "num_key_value_heads": self.num_attention_heads,  # there is no grouped-query attention
            "head_dim": self.head_dim,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": self.hidden_activation,
        }
        for name, expected in repeated.items():
            value = reader.value(name)
            if value is not None and value != expected:
                raise ConfigurationError(
                    f"{name} is {value!r}, but this model uses {expected!r} there and never reads {name}. "
                    "Remove the key or correct it."
                )


def released_architecture(size: str, *, head: Head = Head.CAUSAL_LM) -> DecoderArchitecture:
    """The architecture of a released Ettin decoder: "17m", "32m", "68m", "150m", "400m" or "1b".

    >>> a = released_architecture("32m")
    >>> (a.num_full_layers, a.num_sliding_layers, a.head_dim, a.window)
    (4, 6, 64, 64)

    Raises:
        ConfigurationError: there is no such size.
    """
    if size not in RELEASED_SIZES:
        raise ConfigurationError(f"There is no released size {size!r}. Sizes: {', '.join(RELEASED_SIZES)}.")
    shape = RELEASED_SIZES[size]
    return DecoderArchitecture(
        **shape._asdict(),
        max_position_embeddings=RELEASED_CONTEXT,
        layer_kinds=spellings.layer_kinds_every(shape.num_hidden_layers, spellings.DEFAULT_FULL_EVERY),
        rotary={kind: RotaryParameters(theta=spellings.DEFAULT_THETA) for kind in LayerKind},
        head=head,
    )


def _require_model_type(reader: ConfigReader) -> None:
    model_type = reader.value("model_type")
    if model_type != MODEL_TYPE:
        raise ConfigurationError(
            f"model_type is {model_type!r}, but only {MODEL_TYPE!r} is read here. Choose a ModernBERT "
            "decoder, for example jhu-clsp/ettin-decoder-17m."
        )
