"""Perplexity of the bundled model in every format on the held-out books, and float32's parity with upstream.

The measure is the model card's: each book as `[CLS] text [SEP]`, all concatenated, windows of 512 tokens
stepping by 511, each token predicted from its own window only; bits per byte of the books' text.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.peers import Installed, start_worker
from benchmarks.protocol import REPOSITORY, Worker
from benchmarks.summary import ENGINE, TRANSFORMERS
from modernbert_decoder import Tokenizer
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint

HELD_OUT = (
    "aesop-the-aesop-for-children-*.txt",
    "burgess-old-mother-west-wind.txt",
    "jacobs-indian-fairy-tales.txt",
    "wilde-*.txt",
)
WINDOW_TOKENS = 512
_QUICK_WINDOWS = 40
_PARITY_SIZES = ("17m", "32m")
_PARITY_TOKENS = 200
_PARITY_PROMPT = 65


@dataclass(frozen=True)
class Perplexity:
    """One format's quality; `cost` is relative to float32 (0.01 is 1 % more perplexity)."""

    variant: str
    perplexity: float
    bits_per_byte: float | None
    num_scored: int
    cost: float


@dataclass(frozen=True)
class Parity:
    """The float32 engine against upstream on a random checkpoint.

    Attributes:
        logit_error: largest absolute difference over largest absolute reference.
        num_differing: greedy tokens that differ, those where both choices are as good left out.
        num_ties: positions whose two best logits are closer than ten times the error.
    """

    size: str
    num_tokens: int
    logit_error: float
    num_differing: int
    num_ties: int


def shared_folder() -> Path | None:
    """The folder of external data (`MBD_SHARED`, by default `../shared`), if it is there."""
    folder = Path(os.environ.get("MBD_SHARED", REPOSITORY.parent / "shared"))
    return folder if (folder / "corpus").is_dir() else None


def held_out_windows(shared: Path) -> tuple[list[list[int]], int]:
    """Windows of token ids of the held-out books, and the bytes of their text."""
    folder = find_checkpoint(BUNDLED_MODEL)
    tokenizer = Tokenizer.from_folder(folder, DecoderArchitecture.from_folder(folder))
    ids: list[int] = []
    num_bytes = 0
    for pattern in HELD_OUT:
        paths = sorted((shared / "corpus").glob(pattern))
        if not paths:
            raise FileNotFoundError(
                f"the held-out books lack {pattern}; check the folder that MBD_SHARED names"
            )
        for path in paths:
            text = path.read_text(encoding="utf-8")
            num_bytes += len(text.encode())
            assert tokenizer.sep_token_id is not None
            ids += [*tokenizer.encode(text), tokenizer.sep_token_id]
    return windows_of(ids, WINDOW_TOKENS), num_bytes


def windows_of(ids: list[int], length: int) -> list[list[int]]:
    """Windows that overlap by one token, so that every token but the first is predicted once.

    >>> windows_of([1, 2, 3, 4, 5, 6], 3)
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]


def perplexity_table(
    engine: Installed, shared: Path, *, threads: int, is_quick: bool, report: Callable[[str], None]
) -> list[Perplexity]:
    """The bundled model's perplexity in every variant; `is_quick` reads the first windows only."""
    windows, num_bytes = held_out_windows(shared)
    if is_quick:
        windows = windows[:_QUICK_WINDOWS]
    results: dict[str, tuple[float, int]] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "windows.json"
        path.write_text(json.dumps(windows))
        for variant in engine.peer.variants:
            report(f"{BUNDLED_MODEL} {variant}: perplexity on {len(windows)} windows")
            worker, _ = start_worker(engine, variant, BUNDLED_MODEL, threads=threads)
            with worker:
                answer = worker.ask("score", windows=str(path))
            results[variant] = (answer["total_logprob"], answer["num_scored"])
    return costs_of(results, num_bytes=None if is_quick else num_bytes)


def costs_of(results: Mapping[str, tuple[float, int]], *, num_bytes: int | None) -> list[Perplexity]:
    """From summed log-probabilities (nats) and counts to perplexities, bits per byte and costs."""
    reference = math.exp(-results["float32"][0] / results["float32"][1])
    table = []
    for variant, (total, num_scored) in results.items():
        perplexity = math.exp(-total / num_scored)
        bits = None if num_bytes is None else -total / math.log(2) / num_bytes
        table.append(Perplexity(variant, perplexity, bits, num_scored, perplexity / reference - 1))
    return table


def parity_table(
    engine: Installed, transformers: Installed, *, threads: int, report: Callable[[str], None]
) -> list[Parity]:
    """Logits and greedy tokens of the float32 engine against upstream, for the small sizes."""
    table = []
    for size in _PARITY_SIZES:
        report(f"{size}: float32 logits and greedy tokens against {TRANSFORMERS}")
        ours, _ = start_worker(engine, "float32", size, threads=threads)
        with ours:
            theirs, _ = start_worker(transformers, "float32", size, threads=threads)
            with theirs:
                table.append(_parity(size, ours, theirs))
    return table


def _parity(size: str, ours: Worker, theirs: Worker) -> Parity:
    with TemporaryDirectory() as folder:
        logits = []
        for name, worker in ((ENGINE, ours), (TRANSFORMERS, theirs)):
            path = Path(folder) / f"{name}.npy"
            worker.ask("logits", tokens=_PARITY_TOKENS, path=str(path))
            logits.append(np.load(path))
    error = float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max())
    chosen = ours.ask("greedy", prompt=_PARITY_PROMPT, tokens=_PARITY_TOKENS)["token_ids"]
    reference = theirs.ask("greedy", prompt=_PARITY_PROMPT, tokens=_PARITY_TOKENS, follow=chosen)
    ties = [gap < 10 * error for gap in reference["gaps"]]
    pairs = zip(chosen, reference["token_ids"], ties, strict=True)
    return Parity(
        size=size,
        num_tokens=_PARITY_TOKENS,
        logit_error=error,
        num_differing=sum(a != b and not is_tie for a, b, is_tie in pairs),
        num_ties=sum(ties),
    )
