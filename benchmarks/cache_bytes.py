"""Bytes of keys and values at the longest context: the engine's buffers against every layer in full."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from modernbert_decoder.architecture import released_architecture
from modernbert_decoder.engine.kv_cache import KVCache

LENGTH = 7_999


@dataclass(frozen=True)
class CacheBytes:
    """One size: the buffers of a slot that holds `length` tokens, and every layer in full."""

    size: str
    length: int
    buffer_bytes: int
    naive_bytes: int

    @property
    def ratio(self) -> float:
        """Ours over naive."""
        return self.buffer_bytes / self.naive_bytes


def cache_table(sizes: Iterable[str]) -> list[CacheBytes]:
    """From the real buffers of one slot, ring slack included."""
    table = []
    for size in sizes:
        architecture = released_architecture(size)
        cache = KVCache(architecture, num_slots=1, capacity=LENGTH)
        buffers = sum(array[:1].nbytes for layer in cache.layers for array in layer)  # of the slot
        table.append(CacheBytes(size, LENGTH, buffers, architecture.naive_kv_cache_bytes(LENGTH)))
    return table
