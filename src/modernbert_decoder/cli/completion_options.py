"""The arguments that `mbd generate` and `mbd run` share: declared once, with their defaults and types.

It knows the names of sampling parameters; their ranges are checked by `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from modernbert_decoder.engine.sampling_params import SamplingParams

BLOCK_DTYPES: Final = ("float32", "int8", "int4")
DTYPES: Final = (*BLOCK_DTYPES, "w8a8")
MAX_THREADS: Final = 1024  # as in machine.py, which takes longer to import than the help may take
FILL_CONTEXT: Final = "context"


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """The values of `completion_options`, as click hands them over."""

    prompt: str | None
    model: str
    revision: str | None
    dtype: str | None
    vocabulary_dtype: str | None
    prefill_dtype: str | None
    adapter: str | None
    max_tokens: int | str
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: tuple[str, ...]
    ignore_eos: bool
    seed: int | None
    n: int
    logprobs: int | None
    threads: int | None
    max_context: int | None
    speculate: bool
    echo: bool
    json: bool
    stats: bool

    def sampling_params(self) -> SamplingParams:
        """The part that concerns sampling.

        Raises:
            InputError: a value out of its range.
        """
        from modernbert_decoder.engine.sampling_params import SamplingParams

        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens if isinstance(self.max_tokens, int) else None,
            seed=self.seed,
            logprobs=self.logprobs,
        )


def model_option(function: Callable[..., None]) -> Callable[..., None]:
    """`--model` and `--revision`."""
    return _apply(
        [
            click.option("--model", "-m", default="storyteller", show_default=True, help="Model to run."),
            revision_option,
        ],
        function,
    )


def revision_option(function: Callable[..., None]) -> Callable[..., None]:
    """`--revision`."""
    return click.option("--revision", help="Branch, tag or commit on the Hub.")(function)


def vocabulary_dtype_option(function: Callable[..., None]) -> Callable[..., None]:
    """`--vocabulary-dtype`."""
    return click.option(
        "--vocabulary-dtype",
        type=click.Choice(BLOCK_DTYPES),
        help="Another format for the embedding and vocabulary matrix; by default int8 with --dtype int4.",
    )(function)


def adapter_option(function: Callable[..., None]) -> Callable[..., None]:
    """`--adapter`."""
    return click.option(
        "--adapter", metavar="FOLDER", help="A LoRA adapter in PEFT's format to merge with the model."
    )(function)


def threads_option(function: Callable[..., None]) -> Callable[..., None]:
    """`--threads`."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1, max=MAX_THREADS),
        help="Threads.  [default: the processors we may use]",
    )(function)


def completion_options(function: Callable[..., None]) -> Callable[..., None]:
    """The prompt and all options of `CompletionOptions`."""
    return _apply(
        [
            click.argument("prompt", required=False),
            model_option,
            click.option("--dtype", type=click.Choice(DTYPES), help=_DTYPE_HELP),
            vocabulary_dtype_option,
            click.option(
                "--prefill-dtype",
                type=click.Choice(DTYPES),
                help="Another format to read the prompt in: w8a8 is fastest, and takes memory of its own.",
            ),
            adapter_option,
            *_LENGTH_OPTIONS,
            *_SAMPLING_OPTIONS,
            threads_option,
            _SPECULATE_OPTION,
            *_OUTPUT_OPTIONS,
        ],
        function,
    )


def _apply(
    decorators: list[Callable[[Callable[..., None]], Callable[..., None]]], function: Callable[..., None]
) -> Callable[..., None]:
    """All decorators, so that `--help` lists them in this order."""
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def _token_count(context: click.Context, option: click.Parameter, value: int | str) -> int | str:
    """A number of tokens, or the word `context` unchanged."""
    try:
        return value if value == FILL_CONTEXT else int(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither a number nor the word {FILL_CONTEXT}", context, option
        ) from None


_DTYPE_HELP: Final = "Format of the weights.  [default: int8, or what a packed folder holds]"

_LENGTH_OPTIONS: Final = (
    click.option(
        "--max-tokens",
        type=str,
        metavar="COUNT|context",
        callback=_token_count,
        default="128",
        show_default=True,
        help="Most new tokens. `context`: as many as fit behind the prompt.",
    ),
    click.option("--min-tokens", type=int, default=0, show_default=True, help="No end of text before these."),
    click.option("--ignore-eos", is_flag=True, help="Go on when the model ends the text."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."
    ),
    click.option("--max-context", type=int, help="Limit of prompt and new tokens.  [default: the model's]"),
)
_SAMPLING_OPTIONS: Final = (
    click.option(
        "--temperature",
        type=float,
        default=0.8,
        show_default=True,
        help="Lower is safer; 0 always takes the most likely token.",
    ),
    click.option(
        "--top-k", type=int, default=50, show_default=True, help="Only the k most likely tokens; 0: all."
    ),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        help="Only the most likely tokens that together have this probability.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="No tokens less likely than this times the most likely one.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Above 1: fewer tokens of the text so far, prompt included.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken from the logit of every new token used before.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken from it for each time it was used.",
    ),
    click.option("--seed", type=int, help="Same seed, same text.  [default: another text each time]"),
    click.option(
        "--n", "-n", type=int, default=1, show_default=True, help="Completions, printed one after the other."
    ),
)
_SPECULATE_OPTION: Final = click.option(
    "--speculate",
    is_flag=True,
    help="Guess ahead from what was said before: faster where a text repeats itself.",
)
_OUTPUT_OPTIONS: Final = (
    click.option("--echo/--no-echo", default=True, show_default=True, help="Print the prompt in front."),
    click.option(
        "--json", is_flag=True, help="Print one JSON object: prompt, completions, token ids, timings."
    ),
    click.option(
        "--logprobs",
        type=int,
        metavar="N",
        help="With --json: log-probabilities of each token and of the N most likely.",
    ),
    click.option("--stats", is_flag=True, help="Print token counts, speed and cache size to standard error."),
)
