"""What is trained, and the ways in which each side does it.

Numbers and names only; the workers import this module as well as the harness.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

OURS = "modernbert-decoder"
UPSTREAM = "transformers"
SIZE = "17m"
PRECISIONS = ("float32", "bfloat16")
# Processor features with which matrices are multiplied in bfloat16.
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-5


# Of documents: as they come, which is at random; or by upstream's `train_sampling_strategy`.
RANDOM = "random"
GROUPED = "group_by_length"


@dataclass(frozen=True)
class Way:
    """How one side trains.

    Attributes:
        runtime: ours or upstream's.
        name: as readers see it.
        at_once: upstream's `per_device_train_batch_size`; of ours, sequences at once.
        order: of the documents.
        is_flattened: upstream's documents stand in one row, without padding.
        precision: float32, or bfloat16 autocast.
    """

    runtime: str
    name: str
    at_once: int
    order: str = RANDOM
    is_flattened: bool = False
    precision: str = "float32"

    @property
    def key(self) -> tuple[str, str, str]:
        """Tells ways apart."""
        return self.runtime, self.name, self.precision


@dataclass(frozen=True)
class Workload:
    """How much is trained in a round.

    Attributes:
        shortest: tokens of the shortest document, [CLS] and [SEP] included.
        longest: of the longest one.
        num_documents: of an epoch; more than a round takes, so that length groups have a choice.
        documents_per_step: of the optimizer, on upstream's side.
        steps: of the optimizer in a round.
        check_steps: in which both sides get the same documents.
        ways: measured one after the other in every round.
    """

    shortest: int
    longest: int
    num_documents: int
    documents_per_step: int
    steps: int
    check_steps: int
    ways: tuple[Way, ...]

    @property
    def sequence_length(self) -> int:
        """Of packed sequences: as long as two documents of mean length."""
        return self.shortest + self.longest

    @property
    def mean_length(self) -> int:
        """Tokens of a document."""
        return self.sequence_length // 2

    @property
    def sequences_per_step(self) -> int:
        """Of ours, which hold as many tokens as upstream's documents do in the mean."""
        return self.documents_per_step // 2

    def tokens_at_once(self, way: Way) -> int:
        """Of a micro-batch, padding apart; of upstream's, in the mean."""
        return way.at_once * (self.sequence_length if way.runtime == OURS else self.mean_length)

    def with_precisions(self, precisions: Iterable[str]) -> Workload:
        """The same with the ways of these precisions only."""
        chosen = frozenset(precisions)
        return replace(self, ways=tuple(way for way in self.ways if way.precision in chosen))


def pairs(ways: Iterable[Way]) -> Iterator[tuple[Way, Way]]:
    """Our way with each of upstream's in the same precision."""
    listed = tuple(ways)
    for ours in listed:
        for upstream in listed:
            is_pair = (ours.runtime, upstream.runtime) == (OURS, UPSTREAM)
            if is_pair and ours.precision == upstream.precision:
                yield ours, upstream


def available_precisions(flags: Iterable[str]) -> tuple[str, ...]:
    """Those that a processor with these features computes in.

    >>> available_precisions(["avx2"])
    ('float32',)
    """
    has_bfloat16 = not frozenset(_BFLOAT16_FLAGS).isdisjoint(flags)
    return PRECISIONS if has_bfloat16 else PRECISIONS[:1]


_PACKED = Way(OURS, "packed, 1 at once", 1)
_LENGTH_GROUPS = Way(UPSTREAM, "grouped by length, 8 at once", 8, GROUPED)
FULL = Workload(
    shortest=128,
    longest=1024,
    num_documents=1024,
    documents_per_step=8,
    steps=2,
    check_steps=2,
    ways=(
        Way(UPSTREAM, "random order, 8 at once", 8),
        _LENGTH_GROUPS,
        Way(UPSTREAM, "grouped by length, 2 at once", 2, GROUPED),
        Way(UPSTREAM, "flattened, 8 at once", 8, is_flattened=True),
        Way(UPSTREAM, "flattened, 2 at once", 2, is_flattened=True),
        Way(UPSTREAM, "single documents", 1),
        _PACKED,
        Way(OURS, "packed, 4 at once", 4),
        replace(_LENGTH_GROUPS, precision="bfloat16"),
        replace(_PACKED, precision="bfloat16"),
    ),
)
QUICK = Workload(
    shortest=8,
    longest=24,
    num_documents=64,
    documents_per_step=4,
    steps=1,
    check_steps=2,
    ways=(
        Way(UPSTREAM, "grouped by length, 4 at once", 4, GROUPED),
        Way(UPSTREAM, "flattened, 2 at once", 2, is_flattened=True),
        _PACKED,
    ),
)
