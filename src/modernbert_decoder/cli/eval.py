"""`mbd eval`: perplexity of files, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from modernbert_decoder.cli.completion_options import (
    DTYPES,
    adapter_option,
    model_option,
    threads_option,
    vocabulary_dtype_option,
)
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import write, write_json, write_table
from modernbert_decoder.errors import InputError

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM
    from modernbert_decoder.evaluation.harness import TaskOptions
    from modernbert_decoder.evaluation.perplexity import FilePerplexity, Measure

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    "mbd eval 'books/*.txt' --stride 512\n"
    "mbd eval --tasks lambada_file --data lambada_file=lambada_test.jsonl\n"
    "mbd eval --model jhu-clsp/ettin-decoder-17m --dtype float32 --tasks ettin\n"
)


@click.command("eval", short_help="Perplexity of files; benchmark tasks.", epilog=_EXAMPLES)
@click.argument("files", nargs=-1)
@model_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Format of the weights.  [default: int8, or what a packed folder holds]",
)
@vocabulary_dtype_option
@adapter_option
@threads_option
@click.option(
    "--max-context",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Length of a window.  [default: the model's context]",
)
@click.option("--stride", type=click.IntRange(min=1), metavar="TOKENS", help="Tokens from window to window.")
@click.option("--concatenate", is_flag=True, help="Join all documents, [CLS] text [SEP] each, first.")
@click.option("--column", default="text", show_default=True, help="Column of .jsonl, .csv, .parquet files.")
@click.option("--tasks", metavar="NAMES", help="Tasks, separated by commas; `ettin`: those of the paper.")
@click.option("--data", multiple=True, metavar="TASK=FILE", help="The local file that a task reads.")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with more task files of the harness.",
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in front.  [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many documents of each task.")
@click.option(
    "--published",
    metavar="SIZE",
    help="Released model to compare with, 17m to 1b.  [default: the one of these sizes]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(context: click.Context, /, files: tuple[str, ...], tasks: str | None, **options: Any) -> None:
    """Measure a language model on FILES, or with --tasks on tasks of lm-evaluation-harness.

    Of FILES (.txt: one document each; .jsonl, .csv, .tsv, .parquet: a document each row) perplexity and bits
    per byte are printed, and how they were measured. Documents that fit the context are read whole, longer
    ones in windows that advance by --stride (by default a window less one token).

    Tasks come from lm-evaluation-harness, which is installed with `modernbert-decoder[eval]`, from
    --include-path, or from this package: lambada_file, multiple_choice_file and texts_file read the JSON
    lines that --data names.
    """
    if bool(files) == (tasks is not None):
        raise InputError("give files, whose perplexity is measured, or --tasks; one of the two")
    _refuse_options_of_the_other(context, has_tasks=tasks is not None)
    with interrupts_deferred():
        from modernbert_decoder.engine.llm import LLM

    chosen = None if tasks is None else _task_options(tasks, options)
    engine = {
        name: options[name]
        for name in ("dtype", "vocabulary_dtype", "adapter", "revision", "threads", "max_context")
    }
    with LLM(options["model"], **engine) as llm:
        if chosen is None:
            _measure_files(llm, files, options)
        else:
            _run_tasks(llm, chosen, options)


_OF_FILES: Final = ("stride", "concatenate", "column")
_OF_TASKS: Final = ("data", "include_path", "num_fewshot", "limit", "published")


def _refuse_options_of_the_other(context: click.Context, *, has_tasks: bool) -> None:
    for option in context.command.params:
        if option.name in (_OF_FILES if has_tasks else _OF_TASKS):
            source = context.get_parameter_source(option.name or "")
            if source is click.core.ParameterSource.COMMANDLINE:
                belongs = "files" if has_tasks else "--tasks"
                raise InputError(f"{option.opts[0]} goes with {belongs}; leave it out")


def _task_options(tasks: str, options: Mapping[str, Any]) -> TaskOptions:
    from modernbert_decoder.evaluation.harness import TaskOptions

    data_files = {}
    for entry in options["data"]:
        task, separator, path = entry.partition("=")
        if not separator or not path:
            raise InputError(f"--data {entry} names no file; write TASK=FILE")
        data_files[task] = path
    return TaskOptions(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        data_files=data_files,
        include_path=options["include_path"],
        num_fewshot=options["num_fewshot"],
        limit=options["limit"],
    )


def _measure_files(llm: LLM, files: Sequence[str], options: Mapping[str, Any]) -> None:
    from modernbert_decoder.evaluation.perplexity import Measure, file_perplexities
    from modernbert_decoder.jobs.inputs import expand_files

    measure = Measure(stride=options["stride"], concatenate=options["concatenate"])
    found = list(file_perplexities(llm, expand_files(files), measure=measure, column=options["column"]))
    if options["as_json"]:
        write_json(_files_report(llm, measure, found, model=options["model"]))
        return
    rows = [
        (
            each.name,
            f"{each.num_documents:,}",
            f"{each.num_tokens:,}",
            f"{each.num_bytes:,}",
            f"{each.perplexity:.4g}",
            f"{each.bits_per_byte:.4f}",
        )
        for each in (found[-1:] if len(found) == 2 else found)
    ]
    write_table(("file", "documents", "tokens", "bytes", "perplexity", "bits per byte"), rows)
    write(f"\n{options['model']}, {llm.scheme.name}: {measure.sentence(llm.max_context)}\n")


def _files_report(
    llm: LLM, measure: Measure, found: Sequence[FilePerplexity], *, model: str
) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": llm.scheme.name,
        "window": llm.max_context,
        "stride": measure.stride_of(llm.max_context),
        "concatenate": measure.concatenate,
        "files": [
            {**asdict(each), "perplexity": each.perplexity, "bits_per_byte": each.bits_per_byte}
            for each in found
        ],
    }


def _run_tasks(llm: LLM, chosen: TaskOptions, options: Mapping[str, Any]) -> None:
    from modernbert_decoder.evaluation.harness import comparison_rows, run_tasks
    from modernbert_decoder.evaluation.published import published_sizes, released_size

    size = options["published"]
    if size is not None and size not in published_sizes():
        raise InputError(f"nothing was published for {size!r}; choose one of {', '.join(published_sizes())}")
    size = size or released_size(llm.architecture)
    results = run_tasks(llm, chosen, size=size)
    if options["as_json"]:
        write_json(
            {
                "model": options["model"],
                "dtype": llm.scheme.name,
                "published": size,
                "results": [asdict(result) for result in results],
            }
        )
        return
    header, rows = comparison_rows(results, size=size)
    write_table(header, rows, num_left=2)
