"""What a caller may ask of sampling: `SamplingParams`, with vLLM's names, validated when constructed.

This module knows nothing of logits, models or tokenizers; what depends on a vocabulary is checked by
`SamplingParams.validate_against`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from modernbert_decoder.engine.structured import StructuredOutput
from modernbert_decoder.errors import InputError

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this one choose the most likely token, as in vLLM."""


# Each takes memory before anything runs; a slip of the finger should not take all of it.
_MAX_COMPLETIONS: Final = 16_384


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends. Names and meanings are vLLM's, except where stated.

    Attributes:
        n: Completions per prompt, each with its own random stream. Greedy decoding allows only 1.
        temperature: Divides the logits; 0 (anything below 1e-5) is greedy, ties going to the lowest id,
            and makes `top_k`, `top_p` and `min_p` irrelevant.
        top_k: Keeps exactly this many tokens, ties at the edge going to the lowest ids; 0 and -1 keep all
            (stored as 0).
        top_p: Keeps the smallest set of most likely tokens whose probability reaches this, after `top_k`.
        min_p: Drops tokens less likely than this times the most likely one, before `top_k` and `top_p`.
        repetition_penalty: Divides positive and multiplies negative logits of prompt and output tokens.
        presence_penalty: Subtracted once from the logit of every output token.
        frequency_penalty: Subtracted from the logit of an output token for each time it was output.
        logit_bias: Token id to a number added to its logit: -100 to 100, or -inf, which forbids the token.
            (vLLM moves larger values to that range; here they are an error.)
        stop: Strings that end the completion (stored as a tuple).
        stop_token_ids: Token ids that end the completion (stored as a tuple).
        ignore_eos: Continue past the end-of-text token.
        min_tokens: Until so many tokens are out, the end-of-text token (even with `ignore_eos`) and
            `stop_token_ids` are forbidden.
        max_tokens: Most tokens per completion; None: until the context is full.
        seed: Makes a completion reproducible, alone or in any batch; None takes entropy from the system.
        logprobs: How many most likely tokens to report with their log-probabilities besides the chosen
            one; 0 reports the chosen one only, None nothing. They are those of the raw model distribution,
            before any of the settings above.
        include_stop_str_in_output: Keep the matched stop string at the end of the text.
        skip_special_tokens: Leave special tokens out of the text.
        structured: What the text must look like; the end-of-text token is allowed only where it is complete,
            `min_tokens` or not. (vLLM's `structured_outputs`.)

    Raises:
        InputError: A value is of the wrong type or out of its range.

    >>> SamplingParams(temperature=0.8, top_k=50, stop="END").stop
    ('END',)
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    seed: int | None = None
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"{name} must be True or False, got {value!r}")
        self._check_structured()
        if self.is_greedy and self.n > 1:
            raise InputError(
                f"n must be 1 when temperature is 0, got {self.n}: greedy completions are all the same; "
                "set a temperature above 0"
            )

    def _check_numbers(self) -> None:
        ranges = {
            "temperature": (0.0, math.inf),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.01, 100.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        for name, (low, high) in ranges.items():
            self._set(name, _number(name, getattr(self, name), low, high))
        if self.top_p == 0.0:
            raise InputError(
                "top_p must be above 0 and at most 1, got 0; for greedy decoding set temperature to 0"
            )
        self._set("n", _integer("n", self.n, 1, _MAX_COMPLETIONS))
        self._set("top_k", max(0, _integer("top_k", self.top_k, -1)))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        if self.logprobs is not None:
            self._set("logprobs", _integer("logprobs", self.logprobs, 0))

    def _check_lengths(self) -> None:
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is None:
            return
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, 1))
        if self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )

    def _check_structured(self) -> None:
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise InputError(f"structured must be a StructuredOutput, got {self.structured!r}")
        if self.structured is not None and self.ignore_eos:
            raise InputError(
                "ignore_eos must be False with structured output, which ends with the end-of-text token"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen each time."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` with the type it is stored in."""
        assert isinstance(self.stop, tuple)
        return self.stop

    def stop_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The token ids that end a completion of a model whose end-of-text ids are given."""
        return frozenset(self.stop_token_ids or ()).union(() if self.ignore_eos else eos_token_ids)

    def validate_against(self, vocab_size: int) -> None:
        """Checks what depends on the model's vocabulary.

        Raises:
            InputError: A token id lies outside the vocabulary, or `logprobs` is larger than it.
        """
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            outside = [token_id for token_id in ids or () if token_id >= vocab_size]
            if outside:
                raise InputError(f"{name} must hold token ids from 0 to {vocab_size - 1}, got {outside[0]}")
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise InputError(
                f"logprobs must be at most the size of the vocabulary ({vocab_size}), got {self.logprobs}"
            )


def _number(name: str, value: Any, low: float, high: float) -> float:
    wanted = f"between {low:g} and {high:g}" if high < math.inf else f"a finite number, at least {low:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name} must be {wanted}, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        raise InputError(f"{name} must be {wanted}, got {value!r}")
    return number


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be an integer, {wanted}, got {value!r}")
    return int(value)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise InputError(f"stop must be a string or a list of strings, got {stop!r}")
    if "" in strings:
        raise InputError(f"stop must not contain an empty string, got {stop!r}; leave it out to stop at none")
    return tuple(dict.fromkeys(strings))


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InputError(f"{name} must be a list of token ids, got {ids!r}")
    return tuple(dict.fromkeys(_integer(f"each of {name}", token_id, 0) for token_id in ids))


def _biases(biases: Any) -> dict[int, float] | None:
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise InputError(f"logit_bias must map token ids to numbers, got {biases!r}")
    checked = {}
    for token_id, bias in biases.items():
        name = f"logit_bias[{token_id!r}]"
        is_ban = isinstance(bias, numbers.Real) and bias == -math.inf
        checked[_integer("each id in logit_bias", token_id, 0)] = (
            -math.inf if is_ban else _number(name, bias, -100.0, 100.0)
        )
    return checked
