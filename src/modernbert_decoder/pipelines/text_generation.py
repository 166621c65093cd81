"""`"text-generation"`: completions of prompts, with transformers' arguments and records.

It encodes prompts, shapes records and hands tokens to streamers; tokens are chosen by the engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from modernbert_decoder.architecture import Head
from modernbert_decoder.config_keys import load_config
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.arguments import as_flag, without_unset
from modernbert_decoder.pipelines.encoding import tokenizer_limit
from modernbert_decoder.pipelines.engine_pipeline import EnginePipeline, require_text
from modernbert_decoder.pipelines.generation_options import (
    DEFAULTS,
    GENERATION_ADVICE,
    GENERATION_ARGUMENTS,
    NEUTRAL,
    GenerationOptions,
    Layer,
    config_layer,
    file_layer,
    merged,
)
from modernbert_decoder.pipelines.text_classification import described

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM

# Prompts of a stream that are completed together where no batch size is given.
STREAM_BATCH: Final = 32
_SEEDS: Final = 2**64
_RECORD_ARGUMENTS: Final = frozenset(
    {
        "return_full_text",
        "return_text",
        "return_tensors",
        "skip_special_tokens",
        "clean_up_tokenization_spaces",
    }
)
_PROMPT_ARGUMENTS: Final = frozenset(
    {"prefix", "add_special_tokens", "handle_long_generation", "padding", "truncation"}
)
_CONTAINERS: Final = frozenset({"generation_config", "generate_kwargs", "stop_sequence", "streamer"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it is fed, and as it is shown."""

    text: str
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Everything one call asks for."""

    options: GenerationOptions
    arguments: Mapping[str, Any]  # those of prompts and records
    num_prefix_tokens: int


class TextGenerationPipeline(EnginePipeline):
    """Completes prompts: `[{"generated_text": ...}, ...]` for each, `num_return_sequences` of them.

    The arguments are those of transformers' pipeline and `generate` that the engine has (docs/pipelines.md),
    at construction or in a call, and `seed`: text i of a call, from 0 on, is drawn with `seed + i`. Without
    it, Python's `random` is asked, so that `random.seed` and transformers' `set_seed` make a program
    repeatable.
    """

    task = "text-generation"
    parameters = frozenset(
        GENERATION_ARGUMENTS | NEUTRAL.keys() | _RECORD_ARGUMENTS | _PROMPT_ARGUMENTS | _CONTAINERS
    )
    advice: ClassVar[Mapping[str, str]] = {
        **GENERATION_ADVICE,
        "return_type": "use return_full_text or return_tensors",
        "continue_final_message": "these models have no chat template",
        "tokenizer_encode_kwargs": "pass add_special_tokens directly",
        "tools": "these models have no chat template",
        "documents": "these models have no chat template",
    }

    def __init__(self, model: LLM, *, batch_size: int | None = None, **parameters: Any) -> None:
        super().__init__(model, batch_size=batch_size, **parameters)
        path = model.folder / "generation_config.json"
        self._file_layer = file_layer(load_config(path)) if path.is_file() else {}

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **parameters: Any) -> Any:
        """As `EnginePipeline.__call__`; a `streamer` (with `put` and `end`) is for a single prompt."""
        if isinstance(inputs, list) and inputs and isinstance(inputs[0], Mapping):
            require_text(inputs[0], task=self.task)  # a chat is one input, not a list of them
        if parameters.get("streamer", self._parameters.get("streamer")) is not None:
            if not isinstance(inputs, str):
                raise InputError("a streamer shows one text: pass a single prompt, not several")
            return self._streamed(inputs, self._call(self._checked(parameters)))
        return super().__call__(inputs, batch_size=batch_size, **parameters)

    def _check_head(self, head: Head) -> None:
        if head is not Head.CAUSAL_LM:
            raise InputError(
                f"{self.task} needs a language model, and this checkpoint is {described(head)}; load a "
                "ModernBertDecoderForCausalLM checkpoint"
            )

    def _computation(
        self, given: Mapping[str, Any], batch_size: int | None
    ) -> Callable[[Iterable[Any]], Iterator[Any]]:
        call = self._call(given)

        def generate(items: Iterable[Any]) -> Iterator[Any]:
            seeds = _seeds(call.options)
            if batch_size is None and isinstance(items, list):
                yield from self._completed(items, seeds, call)
                return
            remaining = iter(items)
            while batch := list(islice(remaining, batch_size or STREAM_BATCH)):
                yield from self._completed(batch, seeds, call)

        return generate

    def _call(self, given: Mapping[str, Any]) -> _Call:
        """The constructor's and a call's arguments together."""
        own = generation_layers(self._parameters)
        new = generation_layers(given)
        # As in transformers, a generation_config of the call replaces what the constructor was given.
        layers = [DEFAULTS, self._file_layer, *([] if "generation_config" in given else own), *new]
        arguments = without_unset({**self._parameters, **given})
        check_prompt_and_record_arguments(arguments)
        prefix = require_text(arguments.get("prefix", ""), task=self.task)
        return _Call(
            options=GenerationOptions.of(merged(layers), task=self.task),
            arguments=arguments,
            num_prefix_tokens=len(self.tokenizer.encode(prefix)) - 1,
        )

    def _completed(self, items: Sequence[Any], seeds: Iterator[int | None], call: _Call) -> Iterator[Any]:
        prompts = [self._prompt(item, call) for item in items]
        params = [self._params(prompt, next(seeds), call) for prompt in prompts]
        outputs = self.model.generate([prompt.ids for prompt in prompts], params)
        for prompt, output in zip(prompts, outputs, strict=True):
            yield [self._record(prompt, each.token_ids, call) for each in output.outputs]

    def _streamed(self, text: str, call: _Call) -> list[dict[str, Any]]:
        streamer = call.arguments["streamer"]
        prompt = self._prompt(text, call)
        params = self._params(prompt, next(_seeds(call.options)), call)
        if params.n > 1:
            raise InputError(f"a streamer shows one text, but num_return_sequences is {params.n}")
        streamer.put(np.asarray([prompt.ids]))
        token_ids: list[int] = []
        with closing(self.model.stream(prompt.ids, params)) as chunks:
            for chunk in chunks:
                for token_id in chunk.token_ids:
                    streamer.put(np.asarray([token_id]))
                token_ids += chunk.token_ids
        streamer.end()
        return [self._record(prompt, token_ids, call)]

    def _prompt(self, item: Any, call: _Call) -> Prompt:
        text = require_text(item, task=self.task)
        ids = self.tokenizer.encode(call.arguments.get("prefix", "") + text)
        start = ids[:1] if call.arguments.get("add_special_tokens", True) else []
        ids = [*start, *ids[1:]]
        if not ids:
            raise InputError("the prompt is empty; with add_special_tokens=False it needs some text")
        if call.arguments.get("handle_long_generation") == "hole":
            limit = min(self.model.max_context, tokenizer_limit(self.model.folder))
            num_new = call.options.num_new_tokens(
                len(ids), num_prefix_tokens=call.num_prefix_tokens, context=limit
            )
            room = limit - num_new - len(start)
            if room < 1:
                raise InputError(f"{num_new} new tokens leave nothing of the limit of {limit} to the prompt")
            if len(ids) - len(start) > room:
                ids = [*start, *ids[-room:]]
        return Prompt(text, ids)

    def _params(self, prompt: Prompt, seed: int | None, call: _Call) -> SamplingParams:
        return call.options.sampling_params(
            len(prompt.ids),
            num_prefix_tokens=call.num_prefix_tokens,
            context=self.model.max_context,
            seed=seed,
        )

    def _record(self, prompt: Prompt, token_ids: Sequence[int], call: _Call) -> dict[str, Any]:
        if call.arguments.get("return_tensors"):
            return {"generated_token_ids": [*prompt.ids, *token_ids]}
        # Decoded anew rather than taken from the engine, which cuts behind a stop string: transformers shows
        # the rest of the token that completed it, too.
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=call.arguments.get("skip_special_tokens", True)
        )
        is_full = call.arguments.get("return_full_text", True)
        return {"generated_text": prompt.text + text if is_full else text}


def generation_layers(parameters: Mapping[str, Any]) -> list[Layer]:
    """The settings among the arguments of a constructor or a call, weakest first.

    Raises:
        InputError: containers that hold something else.
    """
    layers: list[Layer] = []
    if (config := parameters.get("generation_config")) is not None:
        layers.append(config_layer(config))
    own = {name: parameters[name] for name in GENERATION_ARGUMENTS | NEUTRAL.keys() if name in parameters}
    if (stops := parameters.get("stop_sequence")) is not None:
        if own.get("stop_strings") is not None:
            raise InputError("stop_sequence and stop_strings are the same; give one of them")
        own["stop_strings"] = stops
    if (more := parameters.get("generate_kwargs")) is not None:
        if not isinstance(more, Mapping):
            raise InputError(f"generate_kwargs must be a dictionary, got {more!r}")
        if twice := sorted(without_unset(own).keys() & without_unset(more).keys()):
            raise InputError(
                f"{twice[0]} is given twice: as an argument and in generate_kwargs; give it once"
            )
        own = {**own, **more}
    layers.append(own)
    return layers


def check_prompt_and_record_arguments(arguments: Mapping[str, Any]) -> None:
    """Those that concern the prompt and the shape of a record.

    Raises:
        InputError: values that cannot be honoured, or contradict each other.
    """
    for name in (*_RECORD_ARGUMENTS, "add_special_tokens"):
        if name in arguments:
            as_flag(name, arguments[name])
    for first, second in (
        ("return_full_text", "return_text"),
        ("return_full_text", "return_tensors"),
        ("return_tensors", "return_text"),
    ):
        if first in arguments and second in arguments:
            raise InputError(f"{first} and {second} exclude each other; give one of them")
    if arguments.get("return_text") is False:
        raise InputError("return_text=False leaves nothing to return; return_tensors=True returns token ids")
    if arguments.get("clean_up_tokenization_spaces"):
        raise InputError("clean_up_tokenization_spaces=True is not available: text is what the tokens say")
    if arguments.get("handle_long_generation", "hole") != "hole":
        raise InputError(
            f'handle_long_generation must be "hole", got {arguments["handle_long_generation"]!r}'
        )
    if arguments.get("truncation"):
        raise InputError(
            "truncation would cut the end of the prompt, which the completion continues; "
            'handle_long_generation="hole" cuts its start'
        )


def _seeds(options: GenerationOptions) -> Iterator[int | None]:
    """A seed for each text of a call, in order."""
    if not options.is_sampling:
        while True:
            yield None
    first = random.getrandbits(64) if options.seed is None else options.seed
    for number in count(first):
        yield number % _SEEDS
