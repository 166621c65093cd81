"""transformers' generation arguments as the engine's sampling parameters.

Settings come in layers (the pipeline's defaults, the model's `generation_config.json`, the constructor, a
call), each over the one before. It knows names and numbers; prompts come as token counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from modernbert_decoder.engine.sampling_params import GREEDY_TEMPERATURE, SamplingParams
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.arguments import (
    OTHER_WAY,
    as_count,
    as_flag,
    refuse_unknown,
    warn_caller,
    without_unset,
)

Layer = Mapping[str, Any]

DEFAULT_NEW_TOKENS: Final = 256
DEFAULTS: Final[Layer] = {"do_sample": True, "temperature": 0.7, "top_k": 50}
"""What transformers' pipeline samples with when neither model nor caller say otherwise."""

_SAMPLING: Final = frozenset({"temperature", "top_k", "top_p", "min_p"})
_RIVALS: Final = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
GENERATION_ARGUMENTS: Final = (
    _SAMPLING
    | {name for pair in _RIVALS for name in pair}
    | {"do_sample", "num_return_sequences", "repetition_penalty", "stop_strings", "eos_token_id", "seed"}
    | {"pad_token_id"}
)
# What transformers offers and the engine does not -> the values with which it changes nothing.
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "early_stopping": (False,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "use_cache": (True,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
GENERATION_ADVICE: Final = {
    "stop": "it is called stop_strings",
    "max_tokens": "it is called max_new_tokens",
    "min_tokens": "it is called min_new_tokens",
    "n": "it is called num_return_sequences",
    "generator": "pass seed, or seed Python's random",
    "logits_processor": OTHER_WAY,
    "stopping_criteria": "use stop_strings, eos_token_id or a stream of LLM.stream that you close; "
    + OTHER_WAY,
    "bad_words_ids": "LLM.generate has logit_bias",
    "suppress_tokens": "LLM.generate has logit_bias",
    "assistant_model": OTHER_WAY,
}
# Keys of a generation_config.json that are no settings of sampling, or that the engine reads itself.
_NOT_SETTINGS: Final = frozenset(
    {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What one call asks for, checked as far as that goes without a prompt.

    Attributes:
        sampling: arguments of `SamplingParams` that are the same for every prompt, `n` included.
        max_new_tokens: None: `max_length` limits instead, or `DEFAULT_NEW_TOKENS` if that is None too.
        max_length: prompt and completion together.
        min_new_tokens: as long as the end of text is forbidden.
        min_length: the same, prompt included.
        seed: of the first text; the next ones count on from it. None: drawn by the caller.
    """

    sampling: Mapping[str, Any]
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int
    min_length: int
    seed: int | None

    @classmethod
    def of(cls, settings: Layer, *, task: str) -> Self:
        """From merged layers.

        Raises:
            InputError: a name or value that cannot be honoured.
        """
        settings = without_neutral(settings)
        refuse_unknown(settings, GENERATION_ARGUMENTS, task=task, advice=GENERATION_ADVICE)
        do_sample = as_flag("do_sample", settings["do_sample"])
        n = as_count("num_return_sequences", settings.get("num_return_sequences", 1))
        sampling: dict[str, Any] = {"n": n, "include_stop_str_in_output": True}
        if "repetition_penalty" in settings:
            sampling["repetition_penalty"] = settings["repetition_penalty"]
        if do_sample:
            sampling |= {name: settings[name] for name in _SAMPLING if name in settings}
        else:
            sampling["temperature"] = 0.0
        sampling |= _endings(settings)
        if not do_sample and n > 1:
            raise InputError(
                f"num_return_sequences is {n}, but with do_sample=False all of them are the same; "
                "set do_sample=True"
            )
        checked = SamplingParams(**sampling)
        if do_sample and checked.temperature < GREEDY_TEMPERATURE:
            raise InputError(
                f"temperature must be above 0 with do_sample=True, got {settings['temperature']!r}; for the "
                "most likely token each time set do_sample=False"
            )
        return cls(
            sampling=sampling,
            max_new_tokens=_count_or_none("max_new_tokens", settings, at_least=1),
            max_length=_count_or_none("max_length", settings, at_least=1),
            min_new_tokens=_count_or_none("min_new_tokens", settings, at_least=0) or 0,
            min_length=_count_or_none("min_length", settings, at_least=0) or 0,
            seed=_count_or_none("seed", settings, at_least=0),
        )

    @property
    def is_sampling(self) -> bool:
        """Whether chance plays a part."""
        return bool(self.sampling.get("temperature", 1.0) >= GREEDY_TEMPERATURE)

    def num_new_tokens(self, num_prompt_tokens: int, *, num_prefix_tokens: int, context: int) -> int:
        """Most new tokens behind a prompt of so many tokens.

        Raises:
            InputError: `max_length` leaves nothing.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return max(1, min(DEFAULT_NEW_TOKENS, context - num_prompt_tokens))
        wanted = self.max_length + num_prefix_tokens - num_prompt_tokens
        if wanted < 1:
            raise InputError(
                f"max_length is {self.max_length} and counts the prompt, which alone has {num_prompt_tokens} "
                "tokens; raise it, or use max_new_tokens, which counts new tokens only"
            )
        return wanted

    def sampling_params(
        self, num_prompt_tokens: int, *, num_prefix_tokens: int, context: int, seed: int | None
    ) -> SamplingParams:
        """The engine's parameters for a prompt of so many tokens.

        Raises:
            InputError: lengths that do not fit together or into the context.
        """
        lengths = {"num_prefix_tokens": num_prefix_tokens, "context": context}
        max_tokens = self.num_new_tokens(num_prompt_tokens, **lengths)
        if num_prompt_tokens + max_tokens > context:
            raise InputError(
                f"the prompt has {num_prompt_tokens} tokens and {max_tokens} new ones are wanted, but the "
                f'context holds {context}; ask for fewer, or pass handle_long_generation="hole" to cut the '
                "prompt from its start"
            )
        min_tokens = self.min_new_tokens
        if self.min_length:
            min_tokens = max(min_tokens, self.min_length + num_prefix_tokens - num_prompt_tokens)
        if min_tokens > max_tokens:
            raise InputError(f"at least {min_tokens} new tokens are wanted, but at most {max_tokens}")
        return SamplingParams(**self.sampling, max_tokens=max_tokens, min_tokens=min_tokens, seed=seed)


def merged(layers: Iterable[Layer]) -> dict[str, Any]:
    """The layers, later ones over earlier ones; of a new-token and a total length the last given counts.

    >>> merged([{"max_new_tokens": 256, "top_k": 50}, {"max_length": 20}])
    {'top_k': 50, 'max_length': 20}
    """
    result: dict[str, Any] = {}
    for layer in layers:
        given = without_unset(layer)
        for new, total in _RIVALS:
            if new in given and total in given:
                warn_caller(f"{new}={given[new]} and {total}={given[total]} are both given: {new} is used")
                del given[total]
            for name, rival in ((new, total), (total, new)):
                if name in given:
                    result.pop(rival, None)
        if given.get("do_sample") is False and (idle := sorted(_SAMPLING & given.keys())):
            warn_caller(f"do_sample=False takes the most likely token: {', '.join(idle)} changes nothing")
        result |= given
    return result


def file_layer(content: Layer) -> Layer:
    """The settings of a `generation_config.json`, or of a transformers `GenerationConfig` as a dictionary."""
    return {
        name: value
        for name, value in without_unset(content).items()
        if name not in _NOT_SETTINGS and not name.startswith("_")
    }


def config_layer(config: Any) -> Layer:
    """The settings of a `generation_config` argument: a dictionary or a transformers `GenerationConfig`.

    Raises:
        InputError: something else.
    """
    if isinstance(config, Mapping):
        return without_unset(config)
    if hasattr(config, "to_diff_dict"):
        stated = config.to_diff_dict()
        # transformers 4 leaves do_sample=False out, since that is its default.
        more = {"eos_token_id": stated.get("eos_token_id"), "do_sample": getattr(config, "do_sample", None)}
        return without_unset({**file_layer(stated), **more})
    raise InputError(
        f"generation_config must be a dictionary or a transformers GenerationConfig, got {config!r}"
    )


def without_neutral(settings: Layer) -> dict[str, Any]:
    """The settings without those that ask for nothing the engine lacks.

    Raises:
        InputError: one that asks for something.
    """
    result = dict(settings)
    for name, values in NEUTRAL.items():
        if name in result and (value := result.pop(name)) not in values:
            raise InputError(
                f"{name}={value!r} is not available in the engine; pass {name}={values[0]!r} to do without. "
                + OTHER_WAY
            )
    return result


def _endings(settings: Layer) -> dict[str, Any]:
    """Stop strings and end-of-text ids as the engine calls them."""
    endings: dict[str, Any] = {}
    if "stop_strings" in settings:
        endings["stop"] = settings["stop_strings"]
    if "eos_token_id" in settings:
        ids = settings["eos_token_id"]
        endings["stop_token_ids"] = [ids] if isinstance(ids, int) else ids
        endings["ignore_eos"] = True
    return endings


def _count_or_none(name: str, settings: Layer, *, at_least: int) -> int | None:
    return as_count(name, settings[name], at_least=at_least) if name in settings else None
