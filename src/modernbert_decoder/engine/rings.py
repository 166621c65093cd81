"""How a sliding layer's ring is laid out, and what sums over it depend on.

A ring holds the newest positions in order from row 0 and is compacted now and then. This module knows the
layout that ONNX Runtime keeps and how its products sum; it knows nothing of buffers.
"""

from __future__ import annotations

from typing import Final

from modernbert_decoder.architecture import DecoderArchitecture

# Positions a ring holds beyond the window, unless it needs more: it is compacted once in (slack + 1) tokens,
# not at every token. It moves by so many then: every position keeps its place in the vectors that are summed.
RING_SLACK: Final = 63
# A call gives a ring that is not aligned to whole sums room for at least so many new tokens in one sum.
_LEAST_PIECE: Final = 80
# Attention takes new tokens in blocks of so many, and sums from the first position on that a block sees.
QUERY_BLOCK: Final = 64


def ring_length(total: int, capacity: int, window: int) -> int:
    """How many of the last positions a ring holds after `total` tokens (ONNX Runtime's contract).

    The newest `ring_length` positions lie in order from row 0. With capacity 6 and window 4, every compaction
    frees G = 6 - 4 + 1 = 3 rows: after 6 tokens all 6 are there, the seventh drops three and leaves 4.

    >>> [ring_length(total, 6, 4) for total in (1, 6, 7, 8, 9, 10)]
    [1, 6, 4, 5, 6, 4]
    """
    if total <= capacity:
        return total
    freed = capacity - window + 1
    return total - freed * -(-(total - capacity) // freed)


def summed_terms(head_width: int) -> int:
    """How many positions' values ONNX Runtime sums in one go, for heads of that width; more are sums of sums.

    >>> summed_terms(32), summed_terms(64), summed_terms(96)
    (512, 256, 128)
    """
    columns = 128
    while columns > 16 and columns // 2 >= head_width:
        columns //= 2
    return 128 * 128 // columns


def ring_capacity(architecture: DecoderArchitecture) -> int:
    """Positions of a ring: the window and slack, so that sums do not depend on how often it was compacted.

    Either a ring and new tokens (`most_new_tokens`) are summed in one go, or it moves by whole sums, and one
    block of new tokens is summed from its beginning on.
    """
    capacity = architecture.window + RING_SLACK
    terms = summed_terms(architecture.head_dim)
    return capacity if capacity + _LEAST_PIECE <= terms else architecture.window + terms - 1


def most_new_tokens(architecture: DecoderArchitecture) -> int | None:
    """Most tokens of a text in one call for which its sums are those of any other cut; None: any number.

    In either case the last block must not be a single token (`QUERY_BLOCK`).
    """
    if not architecture.num_sliding_layers:
        return None
    room = summed_terms(architecture.head_dim) - ring_capacity(architecture)
    return room // 2 * 2 if room > 0 else QUERY_BLOCK
