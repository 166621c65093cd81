"""The runs that chose the bundled model's shape, vocabulary, rate and batch: short ones, at equal compute.

Every variant is the recipe `storyteller` with some keys changed and its tokens set so that all cost the same
number of operations. A run that was interrupted goes on; a finished one is not repeated.

    python -m benchmarks.storyteller_scaling --corpus corpus --out build/scaling --tera 60
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modernbert_decoder.training.building import new_configuration
from modernbert_decoder.training.documents import open_source
from modernbert_decoder.training.pretraining import pretrain
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.recipe_files import read_recipe
from modernbert_decoder.training.tokenizer_training import TrainingTokenizer, read_tokenizer, train_tokenizer
from modernbert_decoder.training.trainer import training_flops_per_token

_DECAY = 0.3  # share of the tokens


@dataclass(frozen=True)
class Variant:
    """A name and the keys that it changes."""

    name: str
    changes: tuple[str, ...]


def keys(
    width: int, layers: int, heads: int, feed_forward: int, vocabulary: int, *, rate: float = 2e-3
) -> tuple[str, ...]:
    """All that is compared, so that a variant stays what its name says whatever the recipe becomes."""
    return (
        f"model.hidden_size={width}",
        f"model.num_hidden_layers={layers}",
        f"model.num_attention_heads={heads}",
        f"model.intermediate_size={feed_forward}",
        f"tokenizer.train.vocab_size={vocabulary}",
        f"optimizer.learning_rate={rate}",
    )


VARIANTS = (
    Variant("192 x 8, vocabulary 4096", keys(192, 8, 3, 384, 4096)),
    Variant("192 x 7, vocabulary 6144", keys(192, 7, 3, 384, 6144)),
    Variant("192 x 6, vocabulary 8192", keys(192, 6, 3, 384, 8192)),
    Variant("256 x 4, vocabulary 4096", keys(256, 4, 4, 512, 4096)),
    Variant("256 x 4, vocabulary 6144", keys(256, 4, 4, 384, 6144)),
    Variant("256 x 4, vocabulary 6144, rate 4e-3", keys(256, 4, 4, 384, 6144, rate=4e-3)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the books")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--tera", type=float, default=60.0, help="operations of each run, in 10^12")
    parser.add_argument("--only", action="append", help="variants whose name contains this")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="for all variants")
    arguments = parser.parse_args()
    chosen = [v for v in VARIANTS if not arguments.only or any(part in v.name for part in arguments.only)]
    rows = [run(v, arguments.corpus, arguments.out, arguments.tera * 1e12, arguments.changes) for v in chosen]
    print(table(rows))


def run(variant: Variant, corpus: Path, out: Path, flops: float, changes: Sequence[str]) -> dict[str, object]:
    """Trains a variant and returns its row."""
    name = "".join(c if c.isalnum() else "-" for c in variant.name)
    row_file = out / f"{name}.json"
    if row_file.is_file():
        row: dict[str, object] = json.loads(row_file.read_text(encoding="utf-8"))
        return row
    everywhere = (f"data.files={[str(corpus / '*.txt')]!r}", *_evaluation(corpus), *changes)
    recipe = read_recipe("storyteller", changes=[*variant.changes, *everywhere])
    tokenizer = _tokenizer(recipe, out)
    architecture = new_configuration(recipe, tokenizer).to_architecture()
    tokens = flops / training_flops_per_token(architecture, recipe.phases[0].sequence_length)
    batch = recipe.phases[0].batch_sequences
    phase = {
        **{"name": "pretrain", "tokens": int(tokens), "sequence_length": 512, "batch_sequences": batch},
        **{"batch_warmup_start": min(4, batch), "batch_warmup_tokens": int(tokens * 0.15)},
        **{"warmup_tokens": int(tokens * 0.03), "decay_tokens": int(tokens * _DECAY), "final_rate": 0.02},
    }
    sized = [f"phases={json.dumps([phase])}", "run.keep_checkpoints=1", "evaluation.every_steps=null"]
    recipe = read_recipe("storyteller", changes=[*variant.changes, *everywhere, *sized])
    started = time.perf_counter()
    result = pretrain(recipe, out / name, write=lambda line: print(line, flush=True))
    seconds = time.perf_counter() - started
    size = sum((result.folder / file).stat().st_size for file in ("model.safetensors", "tokenizer.json"))
    row = {
        "variant": variant.name,
        "parameters": architecture.num_parameters(),
        "megabytes": size / 1e6,
        "tokens": result.tokens,
        "seconds": seconds,
        **{entry.dtype: entry.bits_per_byte for entry in result.evaluations},
    }
    row_file.write_text(json.dumps(row), encoding="utf-8")
    return row


def table(rows: Sequence[dict[str, object]]) -> str:
    header = "| variant | M parameters | MB | M tokens | seconds | bits/byte float32 | float16 |"
    lines = [
        f"| {r['variant']} | {float(str(r['parameters'])) / 1e6:.2f} | {float(str(r['megabytes'])):.2f} | "
        f"{float(str(r['tokens'])) / 1e6:.2f} | {float(str(r['seconds'])):.0f} | "
        f"{float(str(r['float32'])):.4f} | {float(str(r['float16'])):.4f} |"
        for r in rows
    ]
    return "\n".join([header, "|---|---:|---:|---:|---:|---:|---:|", *lines])


def _evaluation(corpus: Path) -> tuple[str, ...]:
    names = read_recipe("storyteller").evaluation
    assert names is not None
    return (f"evaluation.files={[str(corpus / Path(name).name) for name in names.files]!r}",)


def _tokenizer(recipe: Recipe, out: Path) -> TrainingTokenizer:
    """The tokenizer that the run will train: only its size is of interest here."""
    settings = recipe.tokenizer.train
    assert settings is not None
    folder = out / f"tokenizer-{settings.vocab_size}"
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(open_source(recipe.data), settings, seed=0).write(folder, max_length=512)
    return read_tokenizer(str(folder))


if __name__ == "__main__":
    main()
