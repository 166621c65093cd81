"""`ModernBertDecoderConfig`: the documented configuration class, resolved by `DecoderArchitecture`.

Responsible for Hugging Face's conventions around a configuration (attributes, defaults, saving, overriding
on load). What the values mean, and which of them contradict each other, is decided by the floor.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Final

from transformers import PretrainedConfig

from modernbert_decoder.architecture import MODEL_TYPE, DecoderArchitecture, Head, LayerKind
from modernbert_decoder.spellings import CLASS_NAMES

_THETA_KEYS: Final = {LayerKind.FULL: "global_rope_theta", LayerKind.SLIDING: "local_rope_theta"}

# Keys that state the model, as `DecoderArchitecture.from_config` reads them from an instance.
_MODEL_KEYS: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_activation",
    "max_position_embeddings",
    "initializer_range",
    "initializer_cutoff_factor",
    "norm_eps",
    "norm_bias",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "cls_token_id",
    "sep_token_id",
    "attention_bias",
    "attention_dropout",
    "embedding_dropout",
    "mlp_bias",
    "mlp_dropout",
    "decoder_bias",
    "classifier_dropout",
    "classifier_bias",
    "classifier_activation",
    "use_cache",
    "tie_word_embeddings",
    "local_attention",
    "sliding_window",
    "layer_types",
    "rope_parameters",
    "problem_type",
    *_THETA_KEYS.values(),
)
# Of no interest to the floor: who loads the weights how, and what a subclass may call itself.
_LIBRARY_KEYS: Final = ("architectures", "auto_map", "quantization_config", "transformers_weights")
# When the first is overridden on load, the others in the file no longer apply.
_SUPERSEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "local_attention": ("sliding_window",),
    "sliding_window": ("local_attention",),
    "num_hidden_layers": ("layer_types",),
    "global_attn_every_n_layers": ("layer_types",),
    "rope_parameters": ("rope_scaling", *_THETA_KEYS.values()),
    "rope_scaling": ("rope_parameters",),
}


class ModernBertDecoderConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a ModernBERT decoder, with the parameters documented for transformers 4.56.2.

    Every spelling found in checkpoints is read (`sliding_window` for `local_attention // 2`,
    `rope_parameters` for the two bases), and all of them are attributes and are written, so that
    transformers 4, transformers 5 and the engine read the same model. Parameters whose default is None here
    are those with several spellings; unstated, they become the documented default: `local_attention` 128 (a
    window of 64 visible keys), `global_attn_every_n_layers` 3, `global_rope_theta` and `local_rope_theta`
    160000.0.

    Raises:
        ConfigurationError: a `ValueError`: values that make no model, or that contradict each other.

    >>> config = ModernBertDecoderConfig(num_hidden_layers=4, local_attention=32)
    >>> config.sliding_window, config.layer_types[1], config.local_rope_theta
    (16, 'sliding_attention', 160000.0)
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (Hugging Face's form)

    def __init__(
        self,
        vocab_size: int = 50368,
        hidden_size: int = 768,
        intermediate_size: int = 1152,
        num_hidden_layers: int = 22,
        num_attention_heads: int = 12,
        hidden_activation: str = "gelu",
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        initializer_cutoff_factor: float | None = 2.0,
        norm_eps: float = 1e-5,
        norm_bias: bool = False,
        pad_token_id: int | None = 50283,
        eos_token_id: int | list[int] | None = 50282,
        bos_token_id: int | None = 50281,
        cls_token_id: int | None = 50281,
        sep_token_id: int | None = 50282,
        global_rope_theta: float | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        mlp_bias: bool = False,
        mlp_dropout: float = 0.0,
        decoder_bias: bool = True,
        classifier_dropout: float = 0.0,
        classifier_bias: bool = False,
        classifier_activation: str = "gelu",
        use_cache: bool = True,
        local_attention: int | None = None,
        global_attn_every_n_layers: int | None = None,
        local_rope_theta: float | None = None,
        layer_types: list[str] | None = None,
        tie_word_embeddings: bool = True,
        sliding_window: int | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = dict(locals())
        stated = {key: arguments[key] for key in _MODEL_KEYS if key in arguments}
        stated |= {
            "global_attn_every_n_layers": global_attn_every_n_layers,
            "rope_scaling": rope_scaling,
        }
        # None means "not stated" for the parameters with several spellings, and null for the others.
        optional = {"local_attention", "sliding_window", "layer_types", "rope_parameters", "rope_scaling"}
        optional |= {"global_attn_every_n_layers", *_THETA_KEYS.values()}
        stated = {key: value for key, value in stated.items() if value is not None or key not in optional}
        rest = {key: value for key, value in kwargs.items() if key not in _LIBRARY_KEYS}
        architecture = DecoderArchitecture.from_config(
            {**rest, **stated, "model_type": kwargs.get("model_type", MODEL_TYPE)}, source=type(self).__name__
        )
        resolved = architecture.to_config(warn=False)
        for key in _MODEL_KEYS:
            if key not in ("rope_parameters", "problem_type"):
                setattr(self, key, resolved[key])
        self.global_attn_every_n_layers = resolved.get("global_attn_every_n_layers")
        ids = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "tie_word_embeddings")
        # The base class of transformers 4 sets these itself, to its own defaults when they are left out; the
        # model type is a class attribute.
        for key in ("model_type", "rope_theta"):
            kwargs.pop(key, None)
        super().__init__(**{key: resolved[key] for key in ids}, **kwargs)
        # After the base class, which in transformers 5 would complete them by rules of its own.
        self.rope_parameters = resolved["rope_parameters"]

    def to_architecture(self, head: Head = Head.CAUSAL_LM) -> DecoderArchitecture:
        """The facts that this configuration states now, for a model with the given head.

        Raises:
            ConfigurationError: attributes were changed to values that contradict each other.
        """
        stated: dict[str, Any] = {key: getattr(self, key) for key in _MODEL_KEYS}
        stated |= {"model_type": MODEL_TYPE, "architectures": [CLASS_NAMES[head]], "id2label": self.id2label}
        return DecoderArchitecture.from_config(stated, source=type(self).__name__)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from a parsed `config.json`; keyword arguments override its keys.

        An override replaces the other spellings of the same property in the file: `local_attention=32` loads
        with a window of 16 although the file also says `sliding_window`.
        """
        stated = dict(config_dict)
        own = {*_MODEL_KEYS, "global_attn_every_n_layers", "rope_scaling"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in own}
        if "rope_scaling" in overrides and isinstance(stated.get("rope_parameters"), Mapping):
            _keep_bases(stated)
        for key in overrides:
            for other in _SUPERSEDED.get(key, ()):
                if other not in overrides:
                    stated.pop(other, None)
        for kind, key in _THETA_KEYS.items():
            parameters = stated.get("rope_parameters")
            if key in overrides and isinstance(parameters, Mapping) and kind.value in parameters:
                of_kind = {**parameters[kind.value], "rope_theta": overrides[key]}
                stated["rope_parameters"] = {**parameters, kind.value: of_kind}
        num_labels, labels = kwargs.get("num_labels"), stated.get("id2label")
        if num_labels is not None and labels is not None and len(labels) != num_labels:
            for key in {"id2label", "label2id"} - kwargs.keys():
                stated.pop(key, None)
        return super().from_dict({**stated, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All attributes, and the scaling of RoPE also in the spelling of transformers 4, if it has one."""
        config: dict[str, Any] = super().to_dict()
        scalings = [
            {key: value for key, value in parameters.items() if key != "rope_theta"}
            for parameters in config["rope_parameters"].values()
        ]
        config.pop("rope_scaling", None)
        if scalings[0]["rope_type"] != "default" and all(scaling == scalings[0] for scaling in scalings):
            config["rope_scaling"] = scalings[0]
        return config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `config.json`; warn when some version of transformers cannot read this model back from it.

        Raises:
            ConfigurationError: attributes contradict each other; nothing is written.
        """
        if limitations := self.to_architecture().reader_limitations():
            warnings.warn(" ".join(limitations), UserWarning, stacklevel=2)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModernBertDecoderConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _keep_bases(stated: dict[str, Any]) -> None:
    """State the bases of `rope_parameters`, where transformers 5 keeps them, under their own keys too."""
    for kind, key in _THETA_KEYS.items():
        of_kind = stated["rope_parameters"].get(kind.value, stated["rope_parameters"])
        if isinstance(of_kind, Mapping) and "rope_theta" in of_kind:
            stated.setdefault(key, of_kind["rope_theta"])


__all__ = ["ModernBertDecoderConfig"]
