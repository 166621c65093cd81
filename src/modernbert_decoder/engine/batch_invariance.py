"""What a call must look like so that no token's numbers depend on what is computed beside it.

Products with packed blocks take tokens in pairs, and the odd one out by another kernel whose sums differ in
the last bit: calls are padded to pairs. Sums over a ring are those of any other cut while a call brings few
new tokens: long rows are cut. This module decides shapes; it knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from modernbert_decoder.engine.rings import QUERY_BLOCK
from modernbert_decoder.quantization import MatrixFormat, QuantizationScheme

# A prompt's last tokens that are computed even where all of it is known: attention of a single token sums in
# another order, which only chosen tokens may see.
FEWEST_TOKENS: Final = 2


class CallShape(NamedTuple):
    """The size of a call: `places` rows of `width` tokens, and `positions` with logits."""

    places: int
    width: int
    positions: int


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which numbers of a call must be even.

    Attributes:
        tokens: of all rows together.
        positions: with logits.
    """

    tokens: bool = False
    positions: bool = False

    @classmethod
    def of(cls, scheme: QuantizationScheme) -> Pairs:
        """Those of a model in these formats: the head's first matrix has the format of the layers'."""
        body, vocabulary = _takes_pairs(scheme.body), _takes_pairs(scheme.vocabulary)
        return cls(tokens=body, positions=body or vocabulary)

    def padded(self, shape: CallShape, *, has_room: bool) -> CallShape:
        """The shape with numbers that must be even made so.

        Args:
            shape: of what is to be computed.
            has_room: whether rows may be one token wider; single tokens stay alone in theirs in any case,
                and then a row without tokens is added.
        """
        places, width = shape.places, shape.width
        if self.tokens and places * width % 2:
            if width > 1 and has_room:
                width += 1
            else:
                places += 1
        return CallShape(places, width, shape.positions + (self.positions and shape.positions % 2))


def _takes_pairs(matrix: MatrixFormat) -> bool:
    return matrix.bits < 32 and not matrix.is_per_row


def pieces(token_ids: Sequence[int], most: int | None) -> Iterator[Sequence[int]]:
    """The tokens in pieces of at most `most`, all of them even but the last.

    None leaves attention a single token in a block, if there are more than one.

    >>> [[len(piece) for piece in pieces(range(count), 128)] for count in (1, 129, 193)]
    [[1], [126, 3], [128, 62, 3]]
    """
    while (num_left := len(token_ids)) > 1:
        if most is not None and num_left > most:
            count = most if num_left - most > 1 else most - 2
        elif num_left % QUERY_BLOCK == 1:
            count = num_left - 3
        else:
            break
        yield token_ids[:count]
        token_ids = token_ids[count:]
    yield token_ids


def chunk_end(start: int, end: int, total: int) -> int:
    """Where a chunk of a prompt's `total` tokens ends that could go from `start` to `end`.

    A bit sooner or later, so that neither it nor what it leaves is a single token; a prompt may be one.

    >>> chunk_end(0, 4, 9), chunk_end(0, 8, 9), chunk_end(0, 1, 9), chunk_end(0, 2, 3), chunk_end(0, 1, 1)
    (4, 7, 2, 3, 1)
    """
    end = max(end, min(start + FEWEST_TOKENS, total))
    if total - end != 1:
        return end
    return end - 1 if end - start > FEWEST_TOKENS else total
