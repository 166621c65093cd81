"""The different ways in which a `config.json` states the same property of a decoder.

Responsible for resolving layer kinds, window, RoPE, head, labels and token ids from the keys of transformers
4, transformers 5 and Hub checkpoints, and for refusing files whose spellings disagree. Must not know the
network.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from modernbert_decoder.config_keys import ConfigReader, as_integer, as_mapping, as_number
from modernbert_decoder.errors import ConfigurationError
from modernbert_decoder.rotary import RotaryParameters

DEFAULT_WINDOW: Final = 64
DEFAULT_THETA: Final = 160000.0  # documented for both layer kinds; see read_rotary
DEFAULT_FULL_EVERY: Final = 3


class LayerKind(StrEnum):
    """What the attention of a layer sees, under the names that `layer_types` uses."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


class Head(StrEnum):
    """What stands on top of the layers; NONE is the bare `ModernBertDecoderModel`."""

    CAUSAL_LM = "causal_lm"
    SEQUENCE_CLASSIFICATION = "sequence_classification"
    NONE = "none"


class Activation(StrEnum):
    """The activation functions that every part of this package implements."""

    GELU = "gelu"  # exact, with erf
    GELU_TANH = "gelu_tanh"  # the tanh approximation
    RELU = "relu"
    SILU = "silu"


ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}
"""Names that `hidden_activation` and `classifier_activation` may have, and the function each one means."""


CLASS_NAMES: Final[Mapping[Head, str]] = {
    Head.CAUSAL_LM: "ModernBertDecoderForCausalLM",
    Head.SEQUENCE_CLASSIFICATION: "ModernBertDecoderForSequenceClassification",
    Head.NONE: "ModernBertDecoderModel",
}
PROBLEM_TYPES: Final = ("regression", "single_label_classification", "multi_label_classification")

_THETA_KEYS: Final[Mapping[LayerKind, str]] = {
    LayerKind.FULL: "global_rope_theta",
    LayerKind.SLIDING: "local_rope_theta",
}


def layer_kinds_every(num_layers: int, full_every: int) -> tuple[LayerKind, ...]:
    """Layer i sees everything iff i is a multiple of `full_every`.

    >>> [kind.name for kind in layer_kinds_every(4, 3)]
    ['FULL', 'SLIDING', 'SLIDING', 'FULL']
    """
    return tuple(LayerKind.SLIDING if i % full_every else LayerKind.FULL for i in range(num_layers))


def full_every(kinds: Sequence[LayerKind]) -> int | None:
    """The period that `layer_kinds_every` needs to produce `kinds`, or None for an irregular sequence.

    Where several periods fit, as in a one-layer model, the documented default of 3 is preferred.
    """
    candidates = (DEFAULT_FULL_EVERY, *range(1, len(kinds) + 1))
    return next((n for n in candidates if layer_kinds_every(len(kinds), n) == tuple(kinds)), None)


def read_layer_kinds(reader: ConfigReader, num_layers: int) -> tuple[LayerKind, ...]:
    """`layer_types` if stated, as every version of transformers does; else from the period."""
    every = reader.integer("global_attn_every_n_layers", DEFAULT_FULL_EVERY)
    if every < 1:
        raise ConfigurationError(f"global_attn_every_n_layers is {every}, but must be at least 1.")
    names = reader.value("layer_types")
    if names is None:
        return layer_kinds_every(num_layers, every)
    if not isinstance(names, list | tuple):
        raise ConfigurationError(f"layer_types is {names!r}, but must be a list with one name per layer.")
    known = [kind.value for kind in LayerKind]
    if unknown := sorted({str(name) for name in names if name not in known}):
        raise ConfigurationError(
            f"layer_types names {', '.join(unknown)}, which this model does not have. Known: "
            f"{', '.join(known)}."
        )
    if len(names) != num_layers:
        raise ConfigurationError(
            f"layer_types has {len(names)} entries, but num_hidden_layers is {num_layers}. Make them agree."
        )
    return tuple(LayerKind(name) for name in names)


def read_window(reader: ConfigReader, *, has_sliding_layers: bool) -> int:
    """Visible keys of a sliding layer, self included: `sliding_window`, or half of `local_attention`.

    transformers 4.57 obeys the second and 5.24 the first, so files in which they disagree are refused. A
    window of 0 is refused because no key, not even the token itself, would be visible and the softmax would
    run over nothing. Without sliding layers nothing depends on the window and any integers are accepted.
    """
    stated: dict[str, int] = {}
    for key in ("sliding_window", "local_attention"):
        value = reader.optional_integer(key)
        if value is not None:
            stated[key] = value if key == "sliding_window" else value // 2
    if not has_sliding_layers:
        return next((window for window in stated.values() if window >= 1), DEFAULT_WINDOW)
    if not stated:
        if reader.has("local_attention") or reader.has("sliding_window"):
            raise ConfigurationError(
                "local_attention and sliding_window are null, but some layers are sliding. State "
                "sliding_window."
            )
        return DEFAULT_WINDOW
    if len(set(stated.values())) > 1:
        window, half = stated["sliding_window"], stated["local_attention"]
        raise ConfigurationError(
            f"sliding_window is {window}, but local_attention is {reader.value('local_attention')}, which "
            f"means a window of {half}: versions of transformers obey one or the other. Keep the one the "
            "model was trained with (local_attention is twice the window) and remove the other."
        )
    key, window = next(iter(stated.items()))
    if window < 1:
        raise ConfigurationError(
            f"{key} is {reader.value(key)}, a window of {window}: sliding layers would see no key at all, "
            "not even their own token. The window must be at least 1 (local_attention at least 2)."
        )
    return window


def read_rotary(
    reader: ConfigReader, *, max_position_embeddings: int, has_sliding_layers: bool
) -> tuple[dict[LayerKind, RotaryParameters], tuple[str, ...]]:
    """RoPE of both layer kinds from `rope_parameters`, `rope_scaling` and the `*_rope_theta` keys.

    Rules, chosen so that no file silently means different numbers to different readers:

    - A base may be stated by `rope_parameters.<kind>.rope_theta` (transformers 5) and by `global_rope_theta`
      / `local_rope_theta` (transformers 4); stated twice, they must agree. Stated nowhere it is 160000 for
      both kinds, the documented default. transformers 5.24 would take 10000 for sliding layers and 4.x the
      global base; when a file states only a global base other than 160000, three readers differ, so a warning
      asks for the missing key.
    - `rope_theta` at top level or inside `rope_scaling` is ignored by some version: it may only repeat the
      base.
    - `rope_scaling` applies to both kinds (all versions); next to `rope_parameters` that name a type it must
      agree.

    Returns:
        The parameters of both kinds (also of one that no layer uses), and keys without effect, to warn about.
    """
    nested = _nested_parameters(reader)
    scaling = _legacy_scaling(reader)
    rotary: dict[LayerKind, RotaryParameters] = {}
    unused: list[str] = []
    for kind in LayerKind:
        where = f"rope_parameters.{kind}"
        theta = _read_theta(reader, kind, nested[kind], where)
        _require_repeated(scaling.get("rope_theta"), "rope_scaling.rope_theta", theta, kind)
        sources = {"rope_scaling": scaling, where: nested[kind]}
        stated = {name: source for name, source in sources.items() if _says_more_than_theta(source)}
        read = {}
        for name, source in (stated or {where: nested[kind]}).items():
            read[name], without_effect = RotaryParameters.from_mapping(
                source, theta=theta, max_position_embeddings=max_position_embeddings, where=name
            )
            unused.extend(without_effect)
        if len(set(read.values())) > 1:
            raise ConfigurationError(
                f"rope_scaling is {dict(scaling)!r}, but {where} is {dict(nested[kind])!r}. Remove "
                "rope_scaling if rope_parameters is right."
            )
        rotary[kind] = next(iter(read.values()))
    _require_repeated(reader.value("rope_theta"), "rope_theta", rotary[LayerKind.FULL].theta, LayerKind.FULL)
    if has_sliding_layers and not _states_theta(reader, nested, LayerKind.SLIDING):
        _warn_about_missing_local_base(rotary[LayerKind.FULL].theta)
    return rotary, tuple(dict.fromkeys(unused))


def _nested_parameters(reader: ConfigReader) -> dict[LayerKind, Mapping[str, Any]]:
    parameters = reader.mapping("rope_parameters")
    if extra := sorted(str(key) for key in parameters if key not in list(LayerKind)):
        raise ConfigurationError(
            f"rope_parameters has the keys {', '.join(extra)}, but holds one object per layer kind here: "
            '{"full_attention": {...}, "sliding_attention": {...}}.'
        )
    return {kind: as_mapping(parameters.get(kind), f"rope_parameters.{kind}") for kind in LayerKind}


def _legacy_scaling(reader: ConfigReader) -> Mapping[str, Any]:
    scaling = reader.mapping("rope_scaling")
    if nested := [kind for kind in LayerKind if kind in scaling]:
        raise ConfigurationError(
            f"rope_scaling holds {', '.join(nested)}, but it applies to all layers. Use rope_parameters for "
            "one object per layer kind."
        )
    if scaling.get("rope_type") is None and scaling.get("type") not in (None, "default"):
        raise ConfigurationError(
            f"rope_scaling names its type {scaling['type']!r} by the old key `type`, which transformers 4 "
            "obeys and transformers 5 ignores for this model. Rename the key to `rope_type`."
        )
    if scaling and not _names_a_type(scaling):
        raise ConfigurationError(
            f"rope_scaling is {dict(scaling)!r}, without rope_type. State it, or remove the key."
        )
    return scaling


def _names_a_type(parameters: Mapping[str, Any]) -> bool:
    return parameters.get("rope_type") is not None or parameters.get("type") is not None


def _says_more_than_theta(parameters: Mapping[str, Any]) -> bool:
    return any(value is not None for key, value in parameters.items() if key != "rope_theta")


def _states_theta(
    reader: ConfigReader, nested: Mapping[LayerKind, Mapping[str, Any]], kind: LayerKind
) -> bool:
    return reader.states(_THETA_KEYS[kind]) or nested[kind].get("rope_theta") is not None


def _read_theta(reader: ConfigReader, kind: LayerKind, nested: Mapping[str, Any], where: str) -> float:
    key = _THETA_KEYS[kind]
    flat = reader.optional_number(key)
    inner = nested.get("rope_theta")
    if inner is None:
        return DEFAULT_THETA if flat is None else flat
    theta = as_number(inner, f"{where}.rope_theta")
    if flat is not None and flat != theta:
        raise ConfigurationError(
            f"{key} is {flat}, but {where}.rope_theta is {theta}: transformers 4 obeys the first, "
            "transformers 5 the second. Keep the base the model was trained with in both."
        )
    return theta


def _require_repeated(value: object, name: str, theta: float, kind: LayerKind) -> None:
    """A base under a key that some version ignores may only repeat the proper key (or the default)."""
    if value is not None and as_number(value, name) != theta:
        raise ConfigurationError(
            f"{name} is {value}, but the RoPE base of {kind} layers is {theta}, and not every version of "
            f"transformers reads {name} for this model. State {_THETA_KEYS[kind]} and "
            f"rope_parameters.{kind}.rope_theta instead."
        )


def _warn_about_missing_local_base(global_theta: float) -> None:
    if global_theta == DEFAULT_THETA:
        return
    warnings.warn(
        f"The RoPE base of full layers is {global_theta}, that of sliding layers is not stated: the "
        f"documented default of {DEFAULT_THETA} is used (transformers 4 would use {global_theta}, "
        "transformers 5 10000.0). Write local_rope_theta into config.json.",
        UserWarning,
        stacklevel=5,
    )


def read_head(reader: ConfigReader) -> Head:
    """The head named by `architectures`; a causal language model when the key is absent."""
    names = reader.value("architectures")
    if names is None or names == []:
        return Head.CAUSAL_LM
    for head, class_name in CLASS_NAMES.items():
        if names == [class_name]:
            return head
    raise ConfigurationError(
        f"architectures is {names!r}, which is not read here. Supported: one of "
        f"{', '.join(CLASS_NAMES.values())}."
    )


def read_labels(reader: ConfigReader) -> dict[int, str]:
    """`id2label`; without it `num_labels` (default 2) names LABEL_0, LABEL_1, ... as transformers does."""
    num_labels = reader.optional_integer("num_labels")
    id2label = _parse_id2label(reader.value("id2label"))
    if id2label is None:
        count = 2 if num_labels is None else num_labels
        id2label = {i: f"LABEL_{i}" for i in range(count)}
    if num_labels is not None and num_labels != len(id2label):
        raise ConfigurationError(
            f"num_labels is {num_labels}, but id2label names {len(id2label)} labels. Make them agree."
        )
    if not id2label or sorted(id2label) != list(range(len(id2label))):
        raise ConfigurationError(
            f"The labels have the ids {sorted(id2label)}, but must be numbered from 0 without gaps, at "
            "least one."
        )
    label2id = reader.mapping("label2id")
    for label, index in label2id.items():
        if id2label.get(as_integer(index, f"label2id.{label}")) != label:
            raise ConfigurationError(
                f"label2id says {label!r} is {index}, which id2label ({id2label}) does not confirm. Correct "
                "or remove label2id; only id2label is used."
            )
    return {i: id2label[i] for i in range(len(id2label))}


def _parse_id2label(value: object) -> dict[int, str] | None:
    if value is None:
        return None
    labels: dict[int, str] = {}
    for key, label in as_mapping(value, "id2label").items():
        try:
            index = int(key)
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"id2label has the key {key!r}, but its keys must be label ids."
            ) from None
        if not isinstance(label, str):
            raise ConfigurationError(f"id2label names label {index} {label!r}, but a name must be a string.")
        labels[index] = label
    return labels


def read_eos_token_ids(reader: ConfigReader, default: int | None) -> tuple[int, ...]:
    """`eos_token_id` as a tuple: the file may state one id, several, or null; `default` without the key."""
    if not reader.has("eos_token_id"):
        return () if default is None else (default,)
    value = reader.value("eos_token_id")
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(as_integer(v, "eos_token_id") for v in values)


def rotary_to_config(rotary: Mapping[LayerKind, RotaryParameters]) -> dict[str, Any]:
    """RoPE keys for every reader: `rope_parameters` for transformers 5, the others for transformers 4."""
    config: dict[str, Any] = {key: rotary[kind].theta for kind, key in _THETA_KEYS.items()}
    config["rope_parameters"] = {
        kind.value: {**rotary[kind].to_mapping(), "rope_theta": rotary[kind].theta} for kind in LayerKind
    }
    scaling = rotary[LayerKind.FULL].to_mapping()
    if scaling["rope_type"] != "default" and scaling == rotary[LayerKind.SLIDING].to_mapping():
        config["rope_scaling"] = scaling
    return config


def rotary_limitations(
    rotary: Mapping[LayerKind, RotaryParameters], kinds: Sequence[LayerKind]
) -> tuple[str, ...]:
    """What transformers 4 cannot express: it takes the global base and one scaling for every layer."""
    full, sliding = rotary[LayerKind.FULL], rotary[LayerKind.SLIDING]
    limitations = []
    if LayerKind.SLIDING in kinds and full.theta != sliding.theta:
        limitations.append(
            f"transformers 4 will use the RoPE base {full.theta} in sliding layers too, not "
            f"{sliding.theta}: it cannot express two bases."
        )
    if full.to_mapping() != sliding.to_mapping() and any(
        rotary[kind].rope_type != "default" for kind in kinds
    ):
        limitations.append("transformers 4 will not scale RoPE: it cannot express a scaling per layer kind.")
    return tuple(limitations)
