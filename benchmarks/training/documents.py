"""Synthetic documents as token ids: lengths drawn uniformly, words as frequent as in language.

Written as files that both sides read; knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.protocol import PROMPT_ID_LIMIT
from benchmarks.training.cases import Workload

IDS_KEY = "ids"
_SEED = 5
# [CLS] and [SEP], which both sides put around a document.
NUM_FRAMING = 2
# Zipf's law, flattened for the most frequent words.
_FLATTENING = 10


def write_documents(path: Path, load: Workload) -> Path:
    """The documents of a workload, as JSON lines."""
    random = np.random.default_rng(_SEED)
    lengths = random.integers(load.shortest, load.longest, size=load.num_documents, endpoint=True)
    return write(path, _drawn(lengths, random))


def write_pairs(path: Path, load: Workload) -> Path:
    """Documents of which each two, one after the other, fill a packed sequence exactly: no document is cut,
    so that both sides learn the same tokens from the same contexts.
    """
    random = np.random.default_rng(_SEED + 1)
    count = load.check_steps * load.sequences_per_step
    first = random.integers(load.shortest, load.longest, size=count, endpoint=True)
    return write(path, _drawn(np.stack((first, load.sequence_length - first), axis=1).ravel(), random))


def write(path: Path, documents: Iterable[Sequence[int]]) -> Path:
    """A file of these documents, each without [CLS] and [SEP]."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({IDS_KEY: list(ids)}) + "\n" for ids in documents)
    return path


def read_documents(path: Path) -> list[list[int]]:
    """The ids of each document, without [CLS] and [SEP]."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)[IDS_KEY] for line in file]


def _drawn(lengths: Iterable[int], random: np.random.Generator) -> Iterator[list[int]]:
    shares: NDArray[np.float64] = 1.0 / (np.arange(PROMPT_ID_LIMIT) + _FLATTENING)
    shares /= shares.sum()
    for length in lengths:
        yield random.choice(PROMPT_ID_LIMIT, size=int(length) - NUM_FRAMING, p=shares).tolist()
