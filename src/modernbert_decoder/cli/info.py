"""`mbd info`: what a checkpoint resolves to, what it costs, and how fast this machine could decode it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from modernbert_decoder.cli.completion_options import revision_option, threads_option
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import bytes_text, count_text, rate_text, write, write_json, write_table

if TYPE_CHECKING:
    from modernbert_decoder.architecture import DecoderArchitecture
    from modernbert_decoder.checkpoint import Checkpoint

# Where decode steps are priced, and the lengths at which the cache is.
_DECODE_LENGTH: Final = 512
_CACHE_LENGTHS: Final = (128, 1024, 4096)


@click.command("info", short_help="What a model is and what it costs here.")
@click.argument("model")
@revision_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, revision: str | None, threads: int | None, as_json: bool) -> None:
    """Show what MODEL is and what it costs here.

    The last table divides the memory's read bandwidth, measured now in a fraction of a second, by the bytes
    that a decode step must read: no engine decodes faster, unless the weights fit into the processor's
    cache.
    """
    with interrupts_deferred():
        from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
        from modernbert_decoder.machine import usable_threads

    checkpoint = Checkpoint.open(find_checkpoint(model, revision=revision))
    report = {
        "model": model,
        "folder": str(checkpoint.folder),
        **_architecture_report(checkpoint.architecture),
        **_weights_report(checkpoint),
        **_cache_report(checkpoint.architecture),
        **_decode_report(checkpoint.architecture, threads=threads or usable_threads()),
    }
    if as_json:
        write_json(report)
    else:
        _print(report)


def _architecture_report(architecture: DecoderArchitecture) -> dict[str, Any]:
    rotary = {
        kind.value: {name: value for name, value in asdict(parameters).items() if value is not None}
        for kind, parameters in architecture.rotary.items()
        if kind in architecture.layer_kinds
    }
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tokens = ("cls_token_id", "sep_token_id", "pad_token_id", "bos_token_id")
    return {
        "head": architecture.head.value,
        "architecture": {
            **{name: getattr(architecture, name) for name in names},
            "head_dim": architecture.head_dim,
            "layer_kinds": [kind.value for kind in architecture.layer_kinds],
            "window": architecture.window,
            "rotary": rotary,
            "max_position_embeddings": architecture.max_position_embeddings,
            "hidden_activation": architecture.hidden_activation,
            "tie_word_embeddings": architecture.tie_word_embeddings,
            **{name: getattr(architecture, name) for name in tokens},
            "eos_token_ids": list(architecture.eos_token_ids),
        },
    }


def _weights_report(checkpoint: Checkpoint) -> dict[str, Any]:
    from modernbert_decoder.costs import EMBEDDING

    architecture = checkpoint.architecture
    split = {"embedding": 0, "body": 0, "head": 0}
    for name, shape in architecture.tensor_shapes().items():
        is_body = name.startswith("model.")
        part = "embedding" if name == EMBEDDING else "body" if is_body else "head"
        split[part] += math.prod(shape)
    stored = sorted({checkpoint.stored_dtype(name) for name in checkpoint.names()})
    files = sorted(path for path in checkpoint.folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return {
        "parameters": {"total": architecture.num_parameters(), **split},
        "stored_as": checkpoint.scheme.name if checkpoint.scheme else ", ".join(stored),
        "file_bytes": {path.name: path.stat().st_size for path in files},
    }


def _cache_report(architecture: DecoderArchitecture) -> dict[str, Any]:
    limit = architecture.max_position_embeddings
    lengths = [*(length for length in _CACHE_LENGTHS if length < limit), limit]
    return {
        "kv_cache": [
            {
                "length": length,
                "bytes": architecture.kv_cache_bytes(length),
                "bytes_with_all_layers_in_full": architecture.naive_kv_cache_bytes(length),
            }
            for length in lengths
        ]
    }


def _decode_report(architecture: DecoderArchitecture, *, threads: int) -> dict[str, Any]:
    """Costs of a decode step and the ceiling that the memory sets."""
    from modernbert_decoder.cli.formats import compared_schemes, decode_bytes
    from modernbert_decoder.machine import last_level_cache_bytes, read_bandwidth

    length = min(_DECODE_LENGTH, architecture.max_position_embeddings)
    bandwidth = read_bandwidth(threads=threads)
    steps = {
        name: decode_bytes(architecture, scheme, context_length=length)
        for name, scheme in compared_schemes().items()
    }
    return {
        "decode": {
            "context_length": length,
            "flops_per_token": architecture.flops_per_token(length),
            "formats": {
                name: {"bytes_per_step": step, "ceiling_tokens_per_second": bandwidth / step}
                for name, step in steps.items()
            },
        },
        "machine": {
            "threads": threads,
            "read_bytes_per_second": bandwidth,
            "last_level_cache_bytes": last_level_cache_bytes(),
        },
    }


def _print(report: Mapping[str, Any]) -> None:
    _print_model(report)
    write("\n")
    rows = [
        (
            f"{entry['length']:,}",
            bytes_text(entry["bytes"]),
            bytes_text(entry["bytes_with_all_layers_in_full"]),
            f"{entry['bytes'] / entry['bytes_with_all_layers_in_full']:.2f}x",
        )
        for entry in report["kv_cache"]
    ]
    write_table(("tokens", "KV cache", "all layers in full", "ratio"), rows, num_left=0)
    write("\n")
    _print_ceiling(report["decode"], report["machine"])


def _print_model(report: Mapping[str, Any]) -> None:
    a, parameters = report["architecture"], report["parameters"]
    kinds = a["layer_kinds"]
    full = [str(index) for index, kind in enumerate(kinds) if kind == "full_attention"]
    rotary = "; ".join(
        f"{kind.removesuffix('_attention')} {values['rope_type']}, base {values['theta']:,.0f}"
        for kind, values in a["rotary"].items()
    )
    tokens = ", ".join(
        f"{name.removesuffix('_token_id')} {a[name]}"
        for name in ("cls_token_id", "sep_token_id", "pad_token_id")
    )
    lines = (
        ("model", f"{report['model']} ({report['folder']})"),
        ("head", report["head"].replace("_", " ")),
        (
            "layers",
            f"{len(kinds)}: full attention in {', '.join(full) or 'none'}, else a window of {a['window']}",
        ),
        (
            "sizes",
            f"hidden {a['hidden_size']}, intermediate {a['intermediate_size']}, "
            f"{a['num_attention_heads']} heads of {a['head_dim']}, vocabulary {a['vocab_size']:,}",
        ),
        ("context", f"{a['max_position_embeddings']:,} tokens"),
        ("RoPE", rotary),
        ("tokens", f"{tokens}, end of text {', '.join(map(str, a['eos_token_ids'])) or 'none'}"),
        (
            "parameters",
            f"{parameters['total']:,} (embedding {count_text(parameters['embedding'])}"
            f"{', tied' if a['tie_word_embeddings'] else ''}; body {count_text(parameters['body'])}; "
            f"head {count_text(parameters['head'])})",
        ),
        ("stored as", report["stored_as"]),
        ("files", ", ".join(f"{name} {bytes_text(size)}" for name, size in report["file_bytes"].items())),
    )
    for name, value in lines:
        write(f"{name:<11} {value}\n")


def _print_ceiling(decode: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    cache = machine["last_level_cache_bytes"]
    write(
        f"One token after {decode['context_length']:,}: {count_text(decode['flops_per_token'])}FLOP. "
        f"{machine['threads']} threads read {bytes_text(machine['read_bytes_per_second'])}/s.\n"
    )
    rows = [
        (
            name,
            bytes_text(entry["bytes_per_step"]),
            rate_text(entry["ceiling_tokens_per_second"]),
            "fits into the cache: can be faster" if cache and entry["bytes_per_step"] < cache else "",
        )
        for name, entry in decode["formats"].items()
    ]
    write_table(("format", "read per token", "at most tokens/s", ""), rows)
