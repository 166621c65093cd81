"""What the authors published of the released decoders' pretraining, by size."""

from __future__ import annotations

B = 1_000_000_000

# Peak rate, weight decay, warm-up and batch warm-up in billions of tokens.
PUBLISHED = {
    "17m": (3e-3, 3e-4, 4, 125),
    "32m": (3e-3, 3e-4, 4, 100),
    "68m": (3e-3, 3e-4, 3, 75),
    "150m": (8e-4, 1e-5, 3, 50),
    "400m": (5e-4, 1e-5, 2, 10),
    "1b": (5e-4, 5e-5, 2, 3),
}
