"""What is measured: tasks, the ways each runtime does them, and which ways are compared.

Numbers and names only; the workers import this module as well as the harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

OURS = "modernbert-decoder"
UPSTREAM = "transformers"

SIZES = ("17m", "68m", "150m")
# The same texts for every way of a size; larger models get fewer, so that a round stays within a minute.
_NUM_SEQUENCES = {"17m": 8, "68m": 3, "150m": 2}
_SHORTEST = 128
_LONGEST = {"17m": 1024, "68m": 512, "150m": 512}
LOSS_TOKENS = 4_096
NEW_TOKENS = 32


@dataclass(frozen=True)
class Way:
    """One runtime doing a task; the flags hold for training and the loss alone."""

    runtime: str
    is_packed: bool = False
    skips_logits: bool = False

    @property
    def layout(self) -> str:
        """`padded` or `packed`."""
        return "packed" if self.is_packed else "padded"

    @property
    def flags(self) -> dict[str, bool]:
        """What the worker is told."""
        return {"is_packed": self.is_packed, "skips_logits": self.skips_logits}


@dataclass(frozen=True)
class Task:
    """Something both runtimes do.

    Attributes:
        name: as readers see it.
        operation: of the worker.
        arguments: of the operation.
        tokens: counted for tokens per second: real ones, whatever the padding.
        ways: measured one after the other in every round.
        has_layouts: whether texts are padded or packed, which readers are then told.
    """

    name: str
    operation: str
    tokens: int
    ways: tuple[Way, ...] = (Way(UPSTREAM), Way(OURS))
    arguments: Mapping[str, Any] = field(default_factory=dict)
    has_layouts: bool = False

    def way_name(self, way: Way) -> str:
        """`packed, skip_logits`; empty where there is only one way."""
        parts = [way.layout] if self.has_layouts else []
        return ", ".join(parts + (["skip_logits"] if way.skips_logits else []))

    def pairs(self) -> Iterator[tuple[Way, Way]]:
        """Each of our ways with upstream's way of the same layout; packing also with upstream's padding."""
        for ours in self.ways:
            for upstream in self.ways:
                if (ours.runtime, upstream.runtime) != (OURS, UPSTREAM):
                    continue
                if ours.is_packed == upstream.is_packed or (ours.is_packed and ours.skips_logits):
                    yield ours, upstream


TRAINING = "training step"
LOSS = "loss alone"


def lengths(size: str) -> list[int]:
    """Tokens of each text of a batch, from the shortest to the longest in equal steps.

    >>> lengths("68m")
    [128, 320, 512]
    """
    count, longest = _NUM_SEQUENCES[size], _LONGEST[size]
    return [round(_SHORTEST + i * (longest - _SHORTEST) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Workload:
    """How much of everything.

    Attributes:
        texts: tokens of each text of a batch.
        loss_tokens: whose loss is computed alone.
        prompts: lengths of prefilled prompts.
        new_tokens: generated after a prompt of `prompts[0]`.
    """

    texts: tuple[int, ...]
    loss_tokens: int = LOSS_TOKENS
    prompts: tuple[int, int] = (128, 2048)
    new_tokens: int = NEW_TOKENS


def workload_of(size: str) -> Workload:
    """What is published."""
    return Workload(tuple(lengths(size)))


QUICK = Workload((16, 64), loss_tokens=64, prompts=(16, 64), new_tokens=4)


def tasks_of(load: Workload) -> list[Task]:
    """Every task."""
    padded = (Way(UPSTREAM), Way(OURS), Way(OURS, skips_logits=True))
    packed = tuple(replace(way, is_packed=True) for way in padded)
    texts, total = list(load.texts), sum(load.texts)
    prompt = load.prompts[0]
    return [
        Task(TRAINING, "train", total, (*padded, *packed), {"lengths": texts}, has_layouts=True),
        Task(LOSS, "loss", load.loss_tokens, padded, {"tokens": load.loss_tokens}),
        Task("classification", "classify", total, arguments={"lengths": texts}),
        *(
            Task(f"prefill, 1 x {n}", "prefill", n, arguments={"sequences": 1, "tokens": n, "repeats": count})
            for n, count in zip(load.prompts, (5, 1), strict=True)
        ),
        *(
            Task(
                f"generate, {n} x {prompt}",
                "generate",
                n * load.new_tokens,
                arguments={"sequences": n, "tokens": prompt, "new_tokens": load.new_tokens},
            )
            for n in (1, 8)
        ),
    ]
