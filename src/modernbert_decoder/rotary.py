"""Rotary position embeddings: the parameters of one layer kind, and its table of cosines and sines.

Responsible for the frequency formulas of every `rope_type` we honour, in the float32 arithmetic of the
PyTorch reference. Must not know about layers, nor about the many ways a config.json spells these parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.config_keys import as_integer, as_number
from modernbert_decoder.errors import ConfigurationError

# rope_type -> (keys it needs, keys it may have), besides rope_type and rope_theta.
_KEYS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}

ROPE_TYPES: Final = tuple(_KEYS)
"""The values of `rope_type` that are honoured. "longrope" is not: its frequencies depend on the length of
each
call, so keys cached by a short call would be wrong in a longer one. "proportional" and "axial" belong to
other models.
"""

_TYPE_KEYS: Final = frozenset({"rope_type", "type", "rope_theta"})


@dataclass(frozen=True)
class RotaryParameters:
    """Everything that determines the rotary embedding of one layer kind.

    Fields that a `rope_type` does not use stay at their defaults, so that equal models compare equal.

    Raises:
        ConfigurationError: an unknown `rope_type`, or a value outside its range.
    """

    rope_type: str = "default"
    theta: float = 160000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # yarn, llama3
    attention_factor: float | None = None  # yarn; None: derived from factor, mscale, mscale_all_dim
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3

    def __post_init__(self) -> None:
        if self.rope_type not in _KEYS:
            raise ConfigurationError(
                f"rope_type is {self.rope_type!r}, which is not implemented. Supported: "
                f"{', '.join(ROPE_TYPES)}."
            )
        if not self.theta > 1.0:
            raise ConfigurationError(
                f"The RoPE base is {self.theta!r}, but must be above 1 (usually 160000.0)."
            )
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"The RoPE parameter {name} is {value!r}, but must be positive.")
        needed, optional = _KEYS[self.rope_type]
        if "original_max_position_embeddings" in optional:
            needed = (*needed, "original_max_position_embeddings")
        for field in fields(self):
            value, is_used = (
                getattr(self, field.name),
                field.name in (*needed, *optional, "rope_type", "theta"),
            )
            if field.name in needed and value is None:
                raise ConfigurationError(f"rope_type {self.rope_type!r} needs {field.name}.")
            if not is_used and value != field.default:
                raise ConfigurationError(
                    f"rope_type {self.rope_type!r} does not use {field.name} ({value!r})."
                )
        if self.original_max_position_embeddings is not None and self.original_max_position_embeddings < 1:
            raise ConfigurationError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}, but must be "
                "positive."
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ConfigurationError(f"high_freq_factor ({high}) must exceed low_freq_factor ({low}).")

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], *, theta: float, max_position_embeddings: int, where: str
    ) -> tuple[RotaryParameters, tuple[str, ...]]:
        """Reads one flat set of RoPE parameters; `theta` is resolved by the caller, who knows its other
        spellings.

        Returns:
            The parameters, and the keys that this `rope_type` does not use (prefixed by `where`), to warn
            about.

        Raises:
            ConfigurationError: unknown type, missing or invalid values, or a partial rotation.
        """
        rope_type = _rope_type(mapping, where)
        needed, optional = _KEYS[rope_type]
        if absent := [key for key in needed if mapping.get(key) is None]:
            raise ConfigurationError(f"{where} has rope_type {rope_type!r}, which needs {', '.join(absent)}.")
        _refuse(mapping, "partial_rotary_factor", harmless=1.0, where=where)
        if rope_type == "yarn":
            # transformers 5 always rounds the correction range for this model, 4 obeys the key.
            _refuse(mapping, "truncate", harmless=True, where=where)
        values: dict[str, Any] = {}
        for key in (*needed, *optional):
            if mapping.get(key) is not None:
                read = as_integer if key == "original_max_position_embeddings" else as_number
                values[key] = read(mapping[key], f"{where}.{key}")
        if "original_max_position_embeddings" in optional:
            values.setdefault("original_max_position_embeddings", max_position_embeddings)
        known = {*needed, *optional, *_TYPE_KEYS, "partial_rotary_factor", "truncate"}
        unused = tuple(f"{where}.{key}" for key in mapping if key not in known and mapping[key] is not None)
        return cls(rope_type, theta, **values), unused

    def to_mapping(self) -> dict[str, Any]:
        """The parameters under upstream's key names, without `rope_theta`.

        >>> RotaryParameters("linear", 160000.0, factor=2.0).to_mapping()
        {'rope_type': 'linear', 'factor': 2.0}
        """
        needed, optional = _KEYS[self.rope_type]
        values = {key: getattr(self, key) for key in (*needed, *optional)}
        return {"rope_type": self.rope_type, **{key: v for key, v in values.items() if v is not None}}

    @property
    def attention_scaling(self) -> float:
        """The factor on cosines and sines: 1 except for yarn."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_scale(self.factor, self.mscale) / _yarn_scale(self.factor, self.mscale_all_dim)
        return _yarn_scale(self.factor, 1.0)

    def validate_head_dim(self, head_dim: int) -> None:
        """Raises `ConfigurationError` if the formulas have no meaning for this head width."""
        if head_dim % 2:
            raise ConfigurationError(
                f"The head width (hidden_size / num_attention_heads) is {head_dim}, but rotary embeddings "
                "need an even one. Choose another number of heads."
            )
        if self.rope_type == "dynamic" and head_dim == 2:
            raise ConfigurationError(
                "rope_type 'dynamic' is undefined for a head width of 2. Use fewer heads."
            )

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float32]:
        """Radians per position of each rotated pair, (head_dim // 2,).

        "dynamic" stretches the base only beyond `max_position_embeddings`, by
        `(factor * n / max_position_embeddings - (factor - 1)) ** (D / (D - 2))` at a length of n. Within the
        context, and nothing here runs past it, that is 1 and the frequencies are the default ones.

        >>> [round(float(f), 3) for f in RotaryParameters(theta=10000.0).inverse_frequencies(8)]
        [1.0, 0.1, 0.01, 0.001]
        """
        self.validate_head_dim(head_dim)
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # The power is rounded once, from float64: that is what PyTorch's float32 kernel yields. numpy's
        # float32 power differs in the last bit, which at position 8192 would be an angle error of 5e-4.
        base = np.float64(np.float32(self.theta))
        periods = np.power(base, exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1.0) / periods
        if self.rope_type == "linear":
            return frequencies / np.float32(self.factor)
        if self.rope_type == "yarn":
            return self._yarn_frequencies(periods, head_dim)
        if self.rope_type == "llama3":
            return self._llama3_frequencies(frequencies)
        return frequencies

    def tables(self, num_positions: int, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines for positions 0 to num_positions - 1, attention scaling multiplied in.

        Returns:
            cos and sin, each (num_positions, head_dim // 2). Half-split rotation: pair i of a head is its
            elements i and i + head_dim // 2, so upstream's tables are these, repeated twice along the last
            axis.
        """
        positions = np.arange(num_positions, dtype=np.float32)
        angles = (
            positions[:, None] * self.inverse_frequencies(head_dim)[None, :]
        )  # rounded to float32, as upstream
        wide = angles.astype(np.float64)
        scaling = np.float32(self.attention_scaling)
        return np.cos(wide).astype(np.float32) * scaling, np.sin(wide).astype(np.float32) * scaling

    def _yarn_frequencies(self, periods: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
        """Fast pairs keep their frequency, slow ones are divided by `factor`, a ramp between (2309.00071)."""
        low = max(math.floor(self._pair_with_rotations(self.beta_fast, head_dim)), 0)
        high = min(math.ceil(self._pair_with_rotations(self.beta_slow, head_dim)), head_dim - 1)
        span = float(high - low) or 0.001
        pairs = np.arange(head_dim // 2, dtype=np.float32)
        kept = np.float32(1) - np.clip(
            (pairs - np.float32(low)) / np.float32(span), np.float32(0), np.float32(1)
        )
        interpolated = np.float32(1) / (np.float32(self.factor) * periods)
        result: NDArray[np.float32] = interpolated * (np.float32(1) - kept) + (np.float32(1) / periods) * kept
        return result

    def _pair_with_rotations(self, rotations: float, head_dim: int) -> float:
        """The (fractional) pair that turns `rotations` times within the original context."""
        assert self.original_max_position_embeddings is not None
        turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(self.theta))

    def _llama3_frequencies(self, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
        """Waves longer than the context are stretched by `factor`, short ones kept, the rest blended."""
        assert self.original_max_position_embeddings is not None
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        length, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        factor = np.float32(self.factor)
        wavelengths = (np.float32(1) / frequencies) * np.float32(2 * math.pi)
        is_long = wavelengths > np.float32(length / low)
        is_short = wavelengths < np.float32(length / high)
        stretched = np.where(is_long, frequencies / factor, frequencies)
        blend = ((np.float32(1) / wavelengths) * np.float32(length) - np.float32(low)) / np.float32(
            high - low
        )
        blended = (np.float32(1) - blend) * stretched / factor + blend * stretched
        result: NDArray[np.float32] = np.where(~is_long & ~is_short, blended, stretched)
        return result


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rope_type(mapping: Mapping[str, Any], where: str) -> str:
    """`rope_type`, or its old name `type`; "default" when neither is stated."""
    new, old = mapping.get("rope_type"), mapping.get("type")
    if new is not None and old is not None and new != old:
        raise ConfigurationError(f"{where} says rope_type {new!r} and type {old!r}. Remove `type`.")
    rope_type = new if new is not None else old
    if rope_type is None:
        return "default"
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        raise ConfigurationError(
            f"{where} asks for rope_type {rope_type!r}, which is not implemented. Supported: "
            f"{', '.join(ROPE_TYPES)}."
        )
    return rope_type


def _refuse(mapping: Mapping[str, Any], key: str, *, harmless: object, where: str) -> None:
    if mapping.get(key) not in (None, harmless):
        raise ConfigurationError(
            f"{where}.{key} is {mapping[key]!r}, which is not implemented for this model. Remove the key or "
            f"set it to {harmless!r}."
        )
