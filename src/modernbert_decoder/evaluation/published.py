"""The published zero-shot results of the released decoders, and which task of the harness stands for each.

Numbers of Ettin (arXiv 2507.11412), table of the decoders; measured with lm-evaluation-harness, `--model hf`
and `add_bos_token=True`. The table does not say which of a task's metrics it gives: the ones compared here
are those whose chance level fits its smallest model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.costs import RELEASED_SIZES

# column of the table -> (task of the harness, its metric)
COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "ARC": ("arc_challenge", "acc_norm"),
    "HellaSwag": ("hellaswag", "acc_norm"),
    "LAMBADA": ("lambada_openai", "acc"),
    "OBQA": ("openbookqa", "acc_norm"),
    "PIQA": ("piqa", "acc"),
    "SciQ": ("sciq", "acc"),
    "SIQA": ("social_iqa", "acc"),
    "TriviaQA": ("triviaqa", "exact_match"),
    "WinoGrande": ("winogrande", "acc"),
    "WSC": ("wsc273", "acc"),
}
# per cent, in the order of COLUMNS
_ROWS: Final[Mapping[str, tuple[float, ...]]] = {
    "17m": (21.3, 27.1, 23.0, 27.2, 57.7, 71.1, 35.4, 2.6, 50.9, 48.0),
    "32m": (23.5, 28.5, 28.5, 28.2, 57.7, 77.5, 36.4, 3.8, 53.1, 50.2),
    "68m": (25.3, 33.4, 35.2, 29.4, 61.8, 83.2, 38.8, 5.6, 50.1, 55.3),
    "150m": (28.6, 40.3, 43.2, 29.2, 66.6, 89.6, 40.1, 11.2, 53.7, 59.0),
    "400m": (33.6, 54.3, 52.3, 34.4, 71.0, 91.8, 45.5, 18.3, 57.6, 71.8),
    "1b": (39.7, 62.9, 58.4, 41.6, 74.4, 93.8, 48.2, 29.3, 62.7, 79.1),
}
# Files of this package that hold the data of a published task give its numbers.
_STAND_INS: Final[Mapping[str, str]] = {"lambada_file": "lambada_openai"}


def published_sizes() -> tuple[str, ...]:
    """The models of the table."""
    return tuple(_ROWS)


def released_size(architecture: DecoderArchitecture) -> str | None:
    """The name of the released model of these sizes; None for any other."""
    for name, size in RELEASED_SIZES.items():
        expected = (size.num_hidden_layers, size.hidden_size, size.intermediate_size)
        found = (architecture.num_hidden_layers, architecture.hidden_size, architecture.intermediate_size)
        if expected == found and architecture.vocab_size == 50368 and name in _ROWS:
            return name
    return None


def published_result(size: str, task: str, metric: str) -> float | None:
    """What was published for a model, as a fraction; None where the table does not have it.

    >>> [published_result("17m", "lambada_openai", metric) for metric in ("acc", "perplexity")]
    [0.23, None]
    """
    wanted = (_STAND_INS.get(task, task), metric)
    for column, value in zip(COLUMNS.values(), _ROWS[size], strict=True):
        if column == wanted:
            return round(value / 100, 4)
    return None


def published_tasks() -> tuple[str, ...]:
    """The tasks of the table, as the harness names them."""
    return tuple(task for task, _ in COLUMNS.values())
