"""`mbd convert`: an encoder or a checkpoint of the trainer becomes a decoder, or the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modernbert_decoder.cli.completion_options import revision_option
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import bytes_text, write, write_json

if TYPE_CHECKING:
    from modernbert_decoder.conversion.convert import Conversion

_COUNTS = {
    "num_split": "split into q, k and v",
    "num_joined": "joined from q, k and v",
    "num_renamed": "renamed",
    "num_dropped": "copies of the tied embedding left out",
}


@click.command("convert", short_help="Turn an encoder or a trainer's checkpoint into a decoder, or back.")
@click.argument("model", metavar="INPUT")
@click.argument("out", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["decoder", "encoder"]), required=True, help="What OUTPUT shall be.")
@click.option(
    "--max-positions",
    type=click.IntRange(min=1),
    help="Longest text, for a FlexBERT INPUT, whose config.json does not say.",
)
@revision_option
@click.option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    out: Path,
    *,
    to: str,
    max_positions: int | None,
    revision: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the model INPUT in the other format, in the folder OUTPUT, bit for bit.

    INPUT is a ModernBERT encoder, a ModernBERT decoder, or a FlexBERT checkpoint of the trainer as
    safetensors; which of them, its config.json says. OUTPUT appears when it is complete, or not at all.
    """
    with interrupts_deferred():
        from modernbert_decoder.checkpoint import find_checkpoint
        from modernbert_decoder.conversion.convert import convert_checkpoint
        from modernbert_decoder.conversion.kinds import CheckpointKind
        from modernbert_decoder.errors import InputError

    if quiet and as_json:
        raise InputError("--quiet and --json contradict each other; choose one")
    conversion = convert_checkpoint(
        find_checkpoint(model, revision=revision),
        out,
        to=CheckpointKind(to),
        overwrite=overwrite,
        max_positions=max_positions,
    )
    report = _report(model, out, conversion)
    if as_json:
        write_json(report)
    elif not quiet:
        _print(report)


def _report(model: str, out: Path, conversion: Conversion) -> dict[str, Any]:
    architecture = conversion.architecture
    return {
        "model": model,
        "out": str(out),
        "from": conversion.source_kind.value,
        "to": conversion.target_kind.value,
        "num_read": conversion.num_read,
        "num_written": conversion.num_written,
        **{name: getattr(conversion, name) for name in _COUNTS},
        "weight_bytes": conversion.weight_bytes,
        "window": architecture.window,
        "rope_theta": {kind.value: rotary.theta for kind, rotary in architecture.rotary.items()},
        "layer_types": [kind.value for kind in architecture.layer_kinds],
        "copied": list(conversion.copied),
        "limitations": list(conversion.limitations),
    }


def _print(report: dict[str, Any]) -> None:
    counts = [f"{report[name]} {what}" for name, what in _COUNTS.items() if report[name]]
    thetas = report["rope_theta"]
    if report["to"] == "decoder":
        window = f"{report['window']} tokens, self included"
    else:
        window = f"{report['window']} tokens to either side"
    lines = {
        "from, to": f"{report['from']} -> {report['to']}",
        "tensors": f"{report['num_read']} -> {report['num_written']}: {', '.join(counts) or 'none changed'}",
        "weights": f"{bytes_text(report['weight_bytes'])}, every bit as it was",
        "window": window,
        "RoPE bases": f"{thetas['full_attention']:g} full, {thetas['sliding_attention']:g} sliding",
        "copied": ", ".join(report["copied"]) or "no tokenizer files, there were none",
    }
    for name, text in lines.items():
        write(f"{name:<12}{text}\n")
    write(f"\n{report['out']} is written\n")
