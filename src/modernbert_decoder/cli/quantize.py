"""`mbd quantize`: write a checkpoint with int8, int4 or w8a8 weights, and say what that costs in accuracy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modernbert_decoder.cli.completion_options import revision_option, threads_option, vocabulary_dtype_option
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import bytes_text, write, write_json, write_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modernbert_decoder.checkpoint import Checkpoint
    from modernbert_decoder.quantization import PackedMatrix, QuantizationScheme


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix."""

    name: str
    shape: tuple[int, int]
    bits: int
    block_size: int
    relative_error: float


@click.command("quantize", short_help="Write a model with quantized weights.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["int8", "int4", "w8a8"]), required=True, help="Format of the weights."
)
@vocabulary_dtype_option
@revision_option
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    out: Path,
    *,
    dtype: str,
    vocabulary_dtype: str | None,
    revision: str | None,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL with quantized weights into the folder OUT, which loads like any other model.

    OUT appears when it is complete, or not at all. The error of a matrix is the root mean square of what
    rounding changed, divided by that of the matrix.
    """
    with interrupts_deferred():
        from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
        from modernbert_decoder.errors import InputError
        from modernbert_decoder.quantization import QuantizationScheme

    if quiet and as_json:
        raise InputError("--quiet and --json contradict each other; choose one")
    checkpoint = Checkpoint.open(find_checkpoint(model, revision=revision))
    scheme = QuantizationScheme.named(dtype, vocabulary_dtype)
    started = time.perf_counter()
    matrices = _quantize(
        checkpoint, scheme, out, threads=threads, overwrite=overwrite, show_progress=not quiet
    )
    report = {
        "model": model,
        "out": str(out),
        "dtype": scheme.name,
        "seconds": time.perf_counter() - started,
        "weight_bytes_before": _weight_bytes(checkpoint),
        "weight_bytes_after": _weight_bytes(Checkpoint.open(out.expanduser())),
        "matrices": [asdict(matrix) for matrix in matrices],
    }
    if as_json:
        write_json(report)
    elif not quiet:
        _print(report, matrices)


def _quantize(
    checkpoint: Checkpoint,
    scheme: QuantizationScheme,
    out: Path,
    *,
    threads: int | None,
    overwrite: bool,
    show_progress: bool,
) -> list[MatrixReport]:
    """Writes the folder under a progress bar and returns what became of each matrix."""
    from tqdm import tqdm

    with interrupts_deferred():
        from modernbert_decoder.engine.weights import quantize_checkpoint
        from modernbert_decoder.machine import usable_threads
        from modernbert_decoder.quantization import fused_shapes

    reports: list[MatrixReport] = []
    num_matrices = sum(
        len(shape) == 2 and scheme.format_of(name).bits < 32
        for name, shape in fused_shapes(checkpoint.architecture).items()
    )
    # disable=None: no bar where standard error is not a terminal
    bar = tqdm(
        total=num_matrices,
        desc="quantize",
        unit=" matrices",
        leave=False,
        disable=None if show_progress else True,
    )

    def on_matrix(name: str, packed: PackedMatrix, original: NDArray[np.float32]) -> None:
        error = packed.relative_error(original)
        reports.append(MatrixReport(name, packed.shape, packed.format.bits, packed.format.block_size, error))
        bar.update()
        if len(reports) == num_matrices:
            bar.set_description("write")

    with bar:
        quantize_checkpoint(
            checkpoint,
            scheme,
            out,
            threads=threads or usable_threads(),
            overwrite=overwrite,
            on_matrix=on_matrix,
        )
    return reports


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.raw(name).nbytes for name in checkpoint.names())


def _print(report: dict[str, Any], matrices: Sequence[MatrixReport]) -> None:
    rows = [
        (
            matrix.name,
            f"{matrix.shape[0]} x {matrix.shape[1]}",
            f"{matrix.bits}",
            f"{matrix.block_size}",
            f"{matrix.relative_error:.2%}",
        )
        for matrix in matrices
    ]
    write_table(("matrix", "shape", "bits", "block", "relative error"), rows)
    before, after = (bytes_text(report[f"weight_bytes_{when}"]) for when in ("before", "after"))
    write(
        f"\n{report['out']}: {report['dtype']}, {before} of weights became {after}, "
        f"in {report['seconds']:.1f} s\n"
    )
