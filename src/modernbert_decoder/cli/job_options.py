"""The arguments that `mbd classify`, `score`, `embed` and `rank` share: declared once, checked together.

It knows the names of a job's parts; what they mean is `jobs`' business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from modernbert_decoder.cli.completion_options import (
    DTYPES,
    adapter_option,
    revision_option,
    threads_option,
    vocabulary_dtype_option,
)
from modernbert_decoder.errors import InputError

if TYPE_CHECKING:
    from modernbert_decoder.jobs.inputs import Inputs
    from modernbert_decoder.jobs.job import EngineOptions
    from modernbert_decoder.jobs.tasks import Task

TABLE: Final = "table"
FORMATS: Final = (TABLE, "csv", "jsonl", "parquet")
_RAY_HERE: Final = "local"
_RAY_ADDRESS: Final = re.compile(r"local|auto|ray://\S+|[^\s/]+:\d+")

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The values of `job_options`, as click hands them over."""

    texts: tuple[str, ...]
    input: tuple[str, ...]
    column: str
    keep: tuple[str, ...]
    whole_files: bool
    output: Path | None
    format: str | None
    overwrite: bool
    strict: bool
    quiet: bool
    model: str
    revision: str | None
    dtype: str | None
    vocabulary_dtype: str | None
    adapter: str | None
    threads: int | None
    max_context: int | None
    ray: str | None
    workers: int | None

    def check(self) -> None:
        """Refuses combinations that mean nothing.

        Raises:
            InputError: says which, and what to do.
        """
        if self.texts and self.input:
            raise InputError("texts and --input exclude each other; put the texts into a file")
        from modernbert_decoder.jobs.inputs import SUFFIXES

        for text in self.texts:
            if Path(text).suffix.lower() in SUFFIXES and os.path.isfile(text):
                raise InputError(
                    f"{text} is a file, but arguments are texts; name files with --input, once for each, and "
                    "put patterns in quotes: --input '*.csv'"
                )
        if self.output is None:
            self._check_streaming()
        elif self.format == TABLE:
            raise InputError("a table is for reading; write a file as csv, jsonl or parquet")
        if self.workers is not None and self.ray is None:
            raise InputError("--workers is the number of Ray's workers; add --ray")

    def _check_streaming(self) -> None:
        if self.format == "parquet":
            raise InputError("Parquet cannot be streamed; add --output FILE")
        for is_given, option in ((self.overwrite, "--overwrite"), (self.ray is not None, "--ray")):
            if is_given:
                raise InputError(f"{option} needs a file for the results; add --output FILE")

    @property
    def streamed_format(self) -> str:
        """What goes to standard output."""
        return self.format or TABLE

    def engine(self) -> EngineOptions:
        """The model and how it is run."""
        from modernbert_decoder.jobs.job import EngineOptions

        return EngineOptions(
            model=self.model,
            revision=self.revision,
            dtype=self.dtype,
            vocabulary_dtype=self.vocabulary_dtype,
            adapter=self.adapter,
            threads=self.threads,
            max_context=self.max_context,
        )

    def inputs(
        self, task: Task, *, pair_column: str | None = None, candidates_column: str | None = None
    ) -> Inputs:
        """What is read: the texts, the files, or standard input where there are neither.

        Raises:
            InputError: a file is not there, or a text is not valid UTF-8.
        """
        from modernbert_decoder.jobs.inputs import STANDARD_INPUT, Columns, Inputs, expand_files
        from modernbert_decoder.jobs.resumable import files_of_job
        from modernbert_decoder.jobs.tasks import reserved_names

        for number, text in enumerate(self.texts, 1):
            try:
                text.encode()
            except UnicodeEncodeError:  # Python marks bytes of the command line that it cannot read
                raise InputError(f"text {number} on the command line is not valid UTF-8") from None
        is_shown = self.output is None and self.streamed_format == TABLE
        columns = Columns(
            text=self.column,
            pair=pair_column,
            candidates=candidates_column,
            keep=self.keep or ((self.column,) if is_shown else ()),
        )
        results = () if self.output is None else files_of_job(self.output)
        files = expand_files(self.input, but=results) if self.input or self.texts else (STANDARD_INPUT,)
        return Inputs(
            files=files,
            texts=self.texts,
            columns=columns,
            whole_files=self.whole_files,
            reserved=reserved_names(task),
        )


def job_options(*, model: str | None) -> Decorator:
    """The texts and all options of `JobOptions`.

    Args:
        model: the default of `--model`; None where one must be given.
    """
    if model is None:
        model_option = click.option("--model", "-m", required=True, help="Model to run.")
    else:
        model_option = click.option("--model", "-m", default=model, show_default=True, help="Model to run.")
    decorators: list[Decorator] = [
        click.argument("texts", nargs=-1),
        *_INPUT_OPTIONS,
        *_OUTPUT_OPTIONS,
        model_option,
        revision_option,
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Format of the weights.  [default: int8, or what a packed folder holds]",
        ),
        vocabulary_dtype_option,
        adapter_option,
        threads_option,
        click.option("--max-context", type=int, help="Most tokens of a text.  [default: the model's]"),
        *_RAY_OPTIONS,
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for each in reversed(decorators):
            function = each(function)
        return function

    return decorate


def length_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--truncate` and `--max-length`."""
    truncate = click.option("--truncate", is_flag=True, help="Cut texts that are too long.")
    max_length = click.option(
        "--max-length", type=click.IntRange(min=1), help="Most tokens of a text.  [default: the context]"
    )
    return truncate(max_length(function))


def _ray_address(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _RAY_ADDRESS.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is no address; it is auto, host:port or ray://host:port. Write --ray={_RAY_HERE} for "
            "this machine where a text follows",
            context,
            option,
        )
    return value


_INPUT_OPTIONS: Final = (
    click.option(
        "--input",
        "-i",
        multiple=True,
        metavar="FILE",
        help="Read .txt (a text per line), .csv, .tsv, .jsonl or .parquet; a quoted pattern such as "
        "'data/*.csv'; may be given several times; - is standard input.",
    ),
    click.option("--column", default="text", show_default=True, help="Column that holds the texts."),
    click.option(
        "--keep",
        multiple=True,
        metavar="COLUMN",
        help="Carry a column of the input along; '*' carries all. May be given several times.",
    ),
    click.option("--whole-files", is_flag=True, help="Each .txt file is one text."),
)
_OUTPUT_OPTIONS: Final = (
    click.option(
        "--output",
        "-o",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write into FILE (.csv, .jsonl, .parquet); a run that was killed is continued.",
    ),
    click.option(
        "--format",
        type=click.Choice(FORMATS),
        help="Format of the results.  [default: by the suffix of FILE; without FILE a table]",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the FILE of another job."),
    click.option("--strict", is_flag=True, help="Stop at the first row that cannot be used."),
    click.option("--quiet", "-q", is_flag=True, help="No progress bar and no summary."),
)
_RAY_OPTIONS: Final = (
    click.option(
        "--ray",
        is_flag=False,
        flag_value=_RAY_HERE,
        callback=_ray_address,
        metavar="[ADDRESS]",
        help="Compute by Ray's workers: here, or on the cluster at ADDRESS (auto, host:port, ray://host:port).",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Ray's workers.  [default: all CPUs]"),
)
