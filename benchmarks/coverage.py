"""What a run must hold to be published: the cases and parts there have to be, and which of them are missing.

Pure functions on results; nothing here measures or writes anything.
"""

from __future__ import annotations

from typing import Final

from benchmarks.peers import PEERS
from benchmarks.results import Results
from benchmarks.summary import TRANSFORMERS, Case, case_label

DEFAULT_SIZES: Final = ("17m", "32m", "68m", "150m")
DEFAULT_PROMPTS: Final = (128, 2048)
DEFAULT_SEQUENCES: Final = (1, 8)


def wanted_cases() -> list[Case]:
    """The cases that the numbers to hold are about."""
    return [
        Case(size, sequences, prompt)
        for size in DEFAULT_SIZES
        for prompt in DEFAULT_PROMPTS
        for sequences in DEFAULT_SEQUENCES
    ]


def missing_cases(results: Results) -> list[Case]:
    """Those of `wanted_cases` that have no row, whether a note says why or not."""
    measured = {(row.size, row.sequences, row.prompt_tokens) for row in results.rows}
    return [
        case for case in wanted_cases() if (case.size, case.sequences, case.prompt_tokens) not in measured
    ]


def is_complete(results: Results) -> bool:
    """Whether the default cases of all peers that are there were measured or noted as left out, and all else.

    Parity is measured against transformers, and cannot be where that is absent.
    """
    if results.is_quick:
        return False
    for case in missing_cases(results):
        label = case_label(case)
        if not any(note.startswith(label) for note in results.notes):
            return False
    absent = {each.peer for each in results.absent}
    if {row.peer for row in results.rows} | absent != {peer.name for peer in PEERS}:
        return False
    has_parity = bool(results.parity) or TRANSFORMERS in absent
    return bool(results.start_up and results.overhead and results.perplexity) and has_parity
