"""The shapes of the released decoder sizes, as numbers only.

Shared by every worker, some of which run in interpreters without the package: standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY_SIZE = 50_368
GLOBAL_EVERY = 3
WINDOW = 64
ROPE_THETA = 160_000.0
NORM_EPS = 1e-5
CONTEXT_LENGTH = 7_999


@dataclass(frozen=True)
class Shape:
    """One size of the family: everything a peer needs to build random weights of the same shape."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("17m", 7, 256, 384, 4),
        Shape("32m", 10, 384, 576, 6),
        Shape("68m", 19, 512, 768, 8),
        Shape("150m", 22, 768, 1152, 12),
        Shape("400m", 28, 1024, 2624, 16),
        Shape("1b", 28, 1792, 3840, 28),
    )
}
