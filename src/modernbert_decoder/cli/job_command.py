"""Running a job for the terminal: what `mbd classify`, `score`, `embed` and `rank` do once options are known.

Rows that fail are told on standard error as they are met, and make the exit code 3 in the end.
"""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final, cast

import click
from tqdm import tqdm

from modernbert_decoder.cli.job_options import TABLE, JobOptions
from modernbert_decoder.cli.job_table import write_result_table
from modernbert_decoder.cli.output import rate_text, write, write_bytes
from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.inputs import STANDARD_INPUT, Inputs
from modernbert_decoder.jobs.job import Job, Listeners, Summary, run_to_file, stream_blocks
from modernbert_decoder.jobs.map_over_files import format_of
from modernbert_decoder.jobs.ray_workers import RayOptions, compute_with_ray
from modernbert_decoder.jobs.tasks import Task
from modernbert_decoder.jobs.writers import write_rows

EXIT_ROWS_FAILED: Final = 3
_MAX_REPORTS: Final = 100


def run_job(task: Task, inputs: Inputs, options: JobOptions, *, top: int | None = None) -> None:
    """Computes the results and shows or writes them.

    Raises:
        UserError: whatever is wrong with options, inputs, model or output.
        Exit: with code 3, if rows failed.
    """
    job = Job(task=task, inputs=inputs, engine=options.engine(), top=top, on_command_line=True)
    if STANDARD_INPUT in inputs.files and sys.stdin is not None and sys.stdin.isatty():
        click.echo("Reading texts from the terminal, one per line; end them with Ctrl-D.", err=True)
    summary = None
    with _Reporter(task.name, options) as reporter:
        if options.output is None:
            _stream(job, options.streamed_format, reporter.listeners)
        else:
            summary = _write_file(job, options.output, options, reporter.listeners)
            reporter.num_errors = summary.num_errors
    if summary is not None and not options.quiet:
        write(f"{options.output}: {_summary_text(summary)}\n")
    if reporter.num_errors:
        reporter.sum_up()
        raise click.exceptions.Exit(EXIT_ROWS_FAILED)


def _stream(job: Job, format: str, listeners: Listeners) -> None:
    kept = job.inputs.kept_columns()
    if kept is None and format != "jsonl":
        raise InputError(
            "the rows of a .jsonl file may each have other columns; name those to carry along with --keep, "
            "or write --format jsonl"
        )
    columns = job.columns(dict.fromkeys(kept or (), "text"))
    with closing(stream_blocks(job, listeners)) as blocks:
        if format == TABLE:
            write_result_table(blocks, columns)
        else:
            rows = chain.from_iterable(blocks)
            write_rows(cast(BinaryIO, _StandardOutput()), rows, format=format, columns=columns)


def _write_file(job: Job, output: Path, options: JobOptions, listeners: Listeners) -> Summary:
    compute = None
    if options.ray is not None:
        ray = RayOptions(address=options.ray, workers=options.workers, threads=options.threads)
        compute = partial(compute_with_ray, job, ray)
    return run_to_file(
        job,
        output,
        format=options.format or format_of(output),
        overwrite=options.overwrite,
        listeners=listeners,
        compute=compute,
    )


def _summary_text(summary: Summary) -> str:
    if not summary.num_computed:
        return f"{summary.num_rows:,} rows, all of them there already"
    rate = rate_text(summary.num_computed / max(summary.seconds, 1e-9))
    now = "" if summary.num_computed == summary.num_rows else f", {summary.num_computed:,} of them now"
    return f"{summary.num_rows:,} rows{now}, in {summary.seconds:.1f} s ({rate} rows/s)"


class _Reporter:
    """Progress bar and complaints on standard error.

    Attributes:
        num_errors: rows that failed so far.
        listeners: what a job is given.
    """

    def __init__(self, name: str, options: JobOptions) -> None:
        self.num_errors = 0
        self.listeners = Listeners(on_rows=self._on_rows, on_error=self._on_error, strict=options.strict)
        self._name = name
        self._num_told = 0
        shows_rows = options.output is None and sys.stdout is not None and sys.stdout.isatty()
        # disable=None: no bar where standard error is not a terminal
        is_disabled = True if options.quiet or shows_rows or sys.stderr is None else None
        self._bar = tqdm(desc=name, unit=" rows", leave=False, disable=is_disabled)

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def sum_up(self) -> None:
        """One line about all rows that failed."""
        rows = "1 row" if self.num_errors == 1 else f"{self.num_errors:,} rows"
        untold = self.num_errors - self._num_told
        more = f", {untold:,} of them not listed here" if untold else ""
        click.echo(f"mbd: {rows} could not be used{more}; column `error` of the results says why", err=True)

    def _on_rows(self, num_rows: int, share: float | None) -> None:
        if share is not None:
            self._bar.set_description(f"{self._name} {share:.0%}", refresh=False)
        self._bar.update(num_rows)

    def _on_error(self, where: str, message: str) -> None:
        self.num_errors += 1
        if self._num_told < _MAX_REPORTS and sys.stderr is not None:
            self._num_told += 1
            tqdm.write(f"mbd: {where}: {' '.join(message.split())}", file=sys.stderr)


class _StandardOutput:
    """Standard output as a binary file."""

    def write(self, data: bytes) -> int:
        """Without delay."""
        write_bytes(data)
        return len(data)
