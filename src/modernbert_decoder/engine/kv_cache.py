"""Slots and their keys and values: growing buffers for full layers, rings for sliding ones.

Every layer has one key and one value buffer (slots, H, capacity, D). A full layer's capacity is the whole
context, but memory is taken page by page as tokens arrive: 64 short requests do not pay for 64 contexts.
A sliding layer keeps the window and some slack. Slots in use are always 0..n-1, so that a range of rows is
one block of memory. This module knows nothing of sessions or requests.

Legend: H heads, D head width.
"""

from __future__ import annotations

import mmap
import sys
from typing import Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture, LayerKind

Float32 = NDArray[np.float32]

# Positions a ring holds beyond the window: it is compacted once in (slack + 1) tokens, not at every token.
RING_SLACK: Final = 64


# Python names this flag from 3.13 on; its value on Linux is older than that.
_NO_RESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


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


class Slot:
    """One request's place in the cache: row `index` of every buffer, `length` tokens written so far."""

    __slots__ = ("index", "length")

    def __init__(self, index: int) -> None:
        self.index = index
        self.length = 0


class KVCache:
    """The buffers of all layers and the slots that share them."""

    def __init__(self, architecture: DecoderArchitecture, *, num_slots: int, capacity: int) -> None:
        self.architecture = architecture
        self.num_slots = num_slots
        self.capacity = capacity
        self.ring_capacity = architecture.window + RING_SLACK
        heads, width = architecture.num_attention_heads, architecture.head_dim
        self.layers: list[tuple[Float32, Float32]] = []
        for kind in architecture.layer_kinds:
            rows = self.ring_capacity if kind is LayerKind.SLIDING else capacity
            shape = (num_slots, heads, rows, width)
            self.layers.append((_untouched(shape), _untouched(shape)))
        self._slots: list[Slot] = []

    @property
    def num_free(self) -> int:
        """Slots that can still be allocated."""
        return self.num_slots - len(self._slots)

    def allocate(self) -> Slot:
        """An empty slot behind those in use."""
        assert self.num_free, "the scheduler admits no more requests than there are slots"
        slot = Slot(len(self._slots))
        self._slots.append(slot)
        return slot

    def free(self, slot: Slot) -> None:
        """Gives the slot back; the last one in use moves into its place."""
        last = self._slots.pop()
        if last is not slot:
            self._relocate(last, slot.index)
        slot.index = -1

    def fork(self, slot: Slot) -> Slot:
        """A new slot with the same contents."""
        copy = self.allocate()
        self._copy(slot, copy.index)
        copy.length = slot.length
        return copy

    def swap(self, slot: Slot, index: int) -> None:
        """Exchanges the slot with the one at `index`."""
        other = self._slots[index]
        if other is slot:
            return
        place = slot.index
        held = [[buffer[index].copy() for buffer in layer] for layer in self._filled_views(other)]
        self._relocate(slot, index)
        for layer, (keys, values) in zip(held, self._filled_views(other), strict=True):
            keys[place], values[place] = layer
        other.index = place
        self._slots[place] = other

    def reset(self) -> None:
        """Frees every slot."""
        for slot in self._slots:
            slot.index = -1
        self._slots.clear()

    def bytes_at(self, length: int) -> int:
        """Bytes that hold the keys and values of one slot with `length` tokens."""
        return sum(
            2 * rows * keys.shape[1] * keys.shape[3] * keys.itemsize
            for (keys, _), rows in zip(self.layers, self._filled_rows(length), strict=True)
        )

    def used_bytes(self) -> int:
        """Bytes that hold keys and values of the slots in use."""
        return sum(self.bytes_at(slot.length) for slot in self._slots)

    def _relocate(self, slot: Slot, index: int) -> None:
        self._copy(slot, index)
        slot.index = index
        self._slots[index] = slot

    def _copy(self, slot: Slot, index: int) -> None:
        for keys, values in self._filled_views(slot):
            keys[index] = keys[slot.index]
            values[index] = values[slot.index]

    def _filled_views(self, slot: Slot) -> list[tuple[Float32, Float32]]:
        """The buffers cut to the rows that the slot has filled."""
        return [
            (keys[:, :, :rows], values[:, :, :rows])
            for (keys, values), rows in zip(self.layers, self._filled_rows(slot.length), strict=True)
        ]

    def _filled_rows(self, length: int) -> list[int]:
        """How many rows of each layer's buffer hold something after `length` tokens."""
        in_ring = ring_length(length, self.ring_capacity, self.architecture.window)
        is_sliding = (kind is LayerKind.SLIDING for kind in self.architecture.layer_kinds)
        return [in_ring if sliding else length for sliding in is_sliding]


def _untouched(shape: tuple[int, ...]) -> Float32:
    """Zeros that take no memory until they are written, where the system maps memory lazily.

    Not `np.zeros`: numpy asks for huge pages, and the first token of each head would take 2 MB.
    """
    size = int(np.prod(shape)) * 4
    if sys.platform == "win32":
        return np.zeros(shape, np.float32)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
