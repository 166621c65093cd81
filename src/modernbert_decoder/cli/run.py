"""`mbd run`: the spelling of `transformers run`, for the tasks of `pipeline`.

Text generation is what `mbd generate` does; the other tasks read one text a line and print one JSON value a
line. It knows which option belongs to which task; what a task does is the pipelines' business.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click
from click.core import ParameterSource

from modernbert_decoder.cli.completion_options import CompletionOptions, completion_options
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import write
from modernbert_decoder.errors import InputError

GENERATION: Final = "text-generation"
CLASSIFICATION: Final = "text-classification"
ZERO_SHOT: Final = "zero-shot-classification"
EXTRACTION: Final = "feature-extraction"
# What a task takes besides the options of all tasks; text generation takes all that no other task has.
_OWN_OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    CLASSIFICATION: frozenset({"top_k", "function_to_apply", "truncation"}),
    ZERO_SHOT: frozenset({"candidate_labels", "hypothesis_template", "multi_label", "normalization"}),
    EXTRACTION: frozenset({"truncation"}),
}
_MODEL_OPTIONS: Final = frozenset(
    {"model", "revision", "dtype", "vocabulary_dtype", "adapter", "threads", "max_context"}
)
_SHARED_OPTIONS: Final = _MODEL_OPTIONS | {"task", "device", "prompt"}
_NOT_FOR_GENERATION: Final = frozenset().union(*_OWN_OPTIONS.values()) - {"top_k"}

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    '\b\necho "The future of AI is" | mbd run --task text-generation --model jhu-clsp/ettin-decoder-17m\n'
    "mbd run --task text-classification --model ./my-classifier < texts.txt\n"
    'mbd run --task zero-shot-classification --candidate-labels "animals, the sea" "The fox ran home."\n'
)


@click.command("run", short_help="Tasks, spelled like transformers run.", epilog=_EXAMPLES)
@click.option(
    "--task",
    default=GENERATION,
    show_default=True,
    help=f"{GENERATION}, {CLASSIFICATION}, {ZERO_SHOT} or {EXTRACTION}.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, -1 or auto: the CPU. 0, cuda: a GPU.")
@click.option("--candidate-labels", metavar="LABELS", help=f"{ZERO_SHOT}: the labels, separated by commas.")
@click.option(
    "--hypothesis-template", metavar="TEXT", help=f"{ZERO_SHOT}: a sentence with {{}} for the label."
)
@click.option("--multi-label", is_flag=True, help=f"{ZERO_SHOT}: judge every label by itself.")
@click.option("--normalization", metavar="NAME", help=f"{ZERO_SHOT}: unconditional, sum, token or byte.")
@click.option("--function-to-apply", metavar="NAME", help=f"{CLASSIFICATION}: sigmoid, softmax or none.")
@click.option("--truncation", is_flag=True, help="Cut texts that are too long.")
@completion_options
@click.pass_context
def command(context: click.Context, /, task: str, device: str, **options: Any) -> None:
    """Run a task, as `transformers run` would.

    Text generation takes the options of `mbd generate`. The other tasks read PROMPT, or standard input line
    by line, and print a JSON value for each text; `--top-k` is then the number of labels. A GPU can be used
    only where onnxruntime-gpu with CUDA is installed.
    """
    _refuse_options_of_other_tasks(context, task)
    if task != GENERATION:
        own = {name for name in _OWN_OPTIONS[task] if _is_given(context, name)}
        given = {name: context.params[name] for name in own | _MODEL_OPTIONS}
        _run_task(task, options["prompt"], device, given)
        return
    with interrupts_deferred():
        from modernbert_decoder.cli.completion import complete
        from modernbert_decoder.pipelines.devices import engine_providers

    kept = {name: value for name, value in options.items() if name not in _NOT_FOR_GENERATION}
    complete(CompletionOptions(**kept), providers=engine_providers(device_on_cli(device), shown=device))


def device_on_cli(device: str) -> str | None:
    """The name of a device as the command line spells it; `auto` is the CPU."""
    from modernbert_decoder.pipelines.devices import CPU, device_name

    return CPU if device == "auto" else device_name(device)


def _refuse_options_of_other_tasks(context: click.Context, task: str) -> None:
    """Nothing is accepted that the task would not use.

    Raises:
        InputError: names the option.
    """
    if task not in (GENERATION, *_OWN_OPTIONS):
        known = ", ".join((GENERATION, *_OWN_OPTIONS))
        raise InputError(f"task {task!r} is not available; mbd run knows {known}")
    for option in context.command.params:
        name = option.name
        assert name is not None
        is_used = (
            name not in _NOT_FOR_GENERATION
            if task == GENERATION
            else name in _SHARED_OPTIONS | _OWN_OPTIONS[task]
        )
        if not is_used and _is_given(context, name):
            raise InputError(f"{option.opts[0]} does nothing for {task}; leave it out")


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _run_task(task: str, prompt: str | None, device: str, given: dict[str, Any]) -> None:
    with interrupts_deferred():
        from modernbert_decoder.engine.llm import LLM
        from modernbert_decoder.pipelines.devices import engine_providers
        from modernbert_decoder.pipelines.factory import pipeline

    providers = engine_providers(device_on_cli(device), shown=device)
    of_model = {name: given.pop(name) for name in _MODEL_OPTIONS if name in given}
    reads_lines = prompt is None or prompt == "-"
    if reads_lines and sys.stdin is None:
        raise InputError("there is no text: none was given and standard input is closed")
    with LLM(of_model.pop("model"), providers=providers, **of_model) as llm:
        run = pipeline(task, llm, **given)
        results = run(_lines() if reads_lines else iter([prompt]))
        for result in _with_line_numbers(results) if reads_lines else results:
            write(json.dumps(result, allow_nan=False) + "\n")


def _with_line_numbers(results: Iterator[Any]) -> Iterator[Any]:
    """The results of the lines of standard input; what is wrong with one comes behind those before it.

    Raises:
        InputError: with the number of the line.
    """
    number = 1
    try:
        for result in results:
            yield result
            number += 1
    except InputError as error:
        raise InputError(f"line {number} of standard input: {error.on_command_line()}") from error


def _lines() -> Iterator[str]:
    """The lines of standard input, which is UTF-8 whatever the locale, without their line breaks.

    Raises:
        InputError: a line is not UTF-8.
    """
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise InputError("it is not valid UTF-8; convert it first") from None
