"""A finished run of the recipe `storyteller` becomes the model in the package, and docs/storyteller.md.

    python -m benchmarks.bundled_model build/storyteller

It copies what the package needs of RUN/model, measures perplexity and bits per byte of every number format on
the held-out books, and writes the page with curve and samples. The card in the package is written by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import find_peers
from benchmarks.protocol import REPOSITORY
from benchmarks.quality import Perplexity, perplexity_table, shared_folder
from benchmarks.session import report
from benchmarks.summary import ENGINE, variant_name
from benchmarks.tables import number, table
from modernbert_decoder import LLM, SamplingParams
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import BUNDLED_MODEL
from modernbert_decoder.machine import usable_threads

ASSET = REPOSITORY / "src" / "modernbert_decoder" / "assets" / BUNDLED_MODEL
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
MOST_BYTES = 8_000_000
PROMPTS = (
    "Once upon a time",
    "The old fox said to the hare,",
    "In the middle of the forest there stood",
    "\u201cWho are you?\u201d asked the princess.",
)
PARAMS = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=120, seed=1)
_DTYPE = "int8"


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model wrote, to the end of its tokens."""

    prompt: str
    text: str


def install(model: Path, asset: Path = ASSET) -> int:
    """Copy a model's files into the package; returns their bytes.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: the files are too large for the package.
    """
    missing = [name for name in FILES if not (model / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{model} lacks {', '.join(missing)}: is the run finished?")
    num_bytes = sum((model / name).stat().st_size for name in FILES)
    if num_bytes > MOST_BYTES:
        raise ValueError(f"{model} takes {num_bytes:,} bytes, more than the {MOST_BYTES:,} of the package")
    for name in FILES:
        shutil.copyfile(model / name, asset / name)  # with the rights of new files, not of the run's
    return num_bytes


def write_samples() -> list[Sample]:
    """What the bundled model writes; the seed is the same for all."""
    with LLM(BUNDLED_MODEL, dtype=_DTYPE) as llm:
        outputs = llm.generate(list(PROMPTS), PARAMS)
    return [Sample(each.prompt or "", each.outputs[0].text) for each in outputs]


def page(
    architecture: DecoderArchitecture,
    *,
    num_bytes: int,
    qualities: Sequence[Perplexity],
    samples: Sequence[Sample],
) -> str:
    """docs/storyteller.md."""
    a = architecture
    rows = [
        [
            variant_name(each.variant),
            f"{each.perplexity:.3f}",
            "" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}",
            f"{each.cost:+.2%}",
        ]
        for each in qualities
    ]
    sampling = (
        f"--temperature {PARAMS.temperature:g} --top-p {PARAMS.top_p:g} --seed {PARAMS.seed} "
        f"--max-tokens {PARAMS.max_tokens}"
    )
    told = "\n\n".join(
        f"> **{each.prompt}**{' '.join(each.text.splitlines()).replace('  ', ' ')} ..." for each in samples
    )
    return f"""# The bundled model

Written by `python -m benchmarks.bundled_model` from a run of the recipe
[storyteller.yaml](../src/modernbert_decoder/training/recipes/storyteller.yaml). How it was trained, and the
runs that chose its shape: [training.md](training.md#the-bundled-model). Its card:
[README.md](../src/modernbert_decoder/assets/storyteller/README.md).

{number(a.num_parameters() / 1e6)} M parameters, {a.num_hidden_layers} layers of width {a.hidden_size}, a
vocabulary of {a.vocab_size:,}; {num_bytes / 1e6:.2f} MB in the package, tokenizer included. Weights are
stored as float16.

## Quality

On six books that it was not trained on, {qualities[0].num_scored:,} tokens, each predicted from a window of
512 as the card says. Formats are those of the engine; *against float32* is the change of perplexity.

{table(["format", "perplexity", "bits per byte", "against float32"], rows)}

## Curve

![Training loss and held-out bits per byte over tokens](images/storyteller-curve.png)

Held-out bits per byte in the curve are those of the first hundred windows. The numbers:
[storyteller-curve.csv](../benchmarks/results/storyteller-curve.csv).

## Samples

{_DTYPE}, {PARAMS.max_tokens} tokens with one seed for all; line breaks became spaces, nothing was chosen:

```bash
mbd generate --model storyteller --dtype {_DTYPE} {sampling} "{PROMPTS[0]}"
```

{told}
"""


def main(arguments: list[str] | None = None) -> int:
    """Install, measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bundled_model", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("--threads", type=int, default=usable_threads())
    options = parser.parse_args(arguments)
    shared = shared_folder()
    peers, _ = find_peers([ENGINE], {ENGINE: sys.executable})
    if shared is None or ENGINE not in peers:
        report("the held-out books are not here (set MBD_SHARED to their folder), or the package is not")
        return 2
    model = options.run / "model"
    num_bytes = install(model)
    report(
        f"copied {num_bytes:,} bytes into the package; stated by the run: "
        f"{json.loads((model / 'evaluation.json').read_text(encoding='utf-8'))}"
    )
    docs = REPOSITORY / "docs"
    shutil.copyfile(model / "curve.png", docs / "images" / "storyteller-curve.png")
    shutil.copyfile(model / "curve.csv", REPOSITORY / "benchmarks" / "results" / "storyteller-curve.csv")
    qualities = perplexity_table(
        peers[ENGINE], shared, threads=options.threads, is_quick=False, report=report
    )
    text = page(
        DecoderArchitecture.from_folder(ASSET),
        num_bytes=num_bytes,
        qualities=qualities,
        samples=write_samples(),
    )
    (docs / "storyteller.md").write_text(text, encoding="utf-8")
    report("wrote docs/storyteller.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
