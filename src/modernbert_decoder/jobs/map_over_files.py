"""`map_files`: a task over files, in this process or by Ray's workers, from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.inputs import Columns, Inputs, expand_files
from modernbert_decoder.jobs.job import EngineOptions, Job, Listeners, Summary, run_to_file
from modernbert_decoder.jobs.ray_workers import RayOptions, compute_with_ray
from modernbert_decoder.jobs.resumable import files_of_job
from modernbert_decoder.jobs.tasks import Task, reserved_names
from modernbert_decoder.jobs.writers import SUFFIX_FORMATS


def map_files(
    task: Task,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: str | EngineOptions,
    columns: Columns | None = None,
    whole_files: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    ray: RayOptions | None = None,
) -> Summary:
    """Writes the results of a task for every row of the files; called again after being killed, it continues.

    Args:
        task: `Classify()`, `ScoreTexts()`, `Embed()`, `Rank(...)` or `Rerank(...)`.
        files: .txt (a text per line), .csv, .tsv, .jsonl or .parquet; patterns such as "data/*.csv" too,
            which do not mean what an earlier run wrote under the name of `output`.
        output: .csv, .jsonl or .parquet.
        model: what `LLM` takes, or that with its options.
        columns: which column is the text, and which are carried along; by default `text`, and none.
        whole_files: each .txt file is one text.
        overwrite: replace what another job left under this name.
        strict: end with an `InputError` at the first row that cannot be used, instead of saying so in its
            `error`.
        ray: compute by Ray's workers, here or on a cluster.

    Raises:
        UserError: whatever is wrong with files, model or output as a whole.
    """
    engine = model if isinstance(model, EngineOptions) else EngineOptions(model=model)
    path = Path(output)
    inputs = Inputs(
        files=expand_files(files, but=files_of_job(path)),
        columns=columns or Columns(),
        whole_files=whole_files,
        reserved=reserved_names(task),
    )
    if not inputs.files:
        raise InputError("there are no files; give at least one")
    job = Job(task=task, inputs=inputs, engine=engine)
    return run_to_file(
        job,
        path,
        format=format_of(path),
        overwrite=overwrite,
        listeners=Listeners(strict=strict),
        compute=None if ray is None else partial(compute_with_ray, job, ray),
    )


def format_of(output: Path) -> str:
    """The format of a file of results by its suffix.

    Raises:
        InputError: no format has this suffix.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIX_FORMATS:
        raise InputError(
            f"{output} has none of the suffixes {', '.join(SUFFIX_FORMATS)}, so its format is unknown; "
            "rename it or state --format"
        )
    return SUFFIX_FORMATS[suffix]
