"""Slots and their keys and values: growing buffers for full layers, rings for sliding ones.

Every layer has one key and one value buffer (slots, H, capacity, D). A full layer's capacity is the whole
context, but memory is taken page by page as tokens arrive, and given back when slots are freed: 64 short
requests do not pay for 64 contexts. A sliding layer keeps the window and some slack. Slots in use are always
0..n-1, so that a range of rows is one block of memory. This module knows nothing of sessions or requests.

Legend: H heads, D head width, F full and S sliding layers, W window.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture, LayerKind
from modernbert_decoder.engine.rings import ring_capacity, ring_length
from modernbert_decoder.errors import InputError

Float32 = NDArray[np.float32]
Layers = Sequence[tuple[Float32, Float32]]
"""Keys and values of every layer, (B, H, capacity, D) each."""

# Tokens for whose pages all free places together are kept: the next requests find them ready.
KEPT_TOKENS: Final = 4096
# Pages for so many tokens more than it holds may lie behind a slot that moved into a longer one's place.
_SPARE_TOKENS: Final = 256

# Python names this flag from 3.13 on; its value on Linux is older than that.
_NO_RESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Slot:
    """One request's place in the cache: row `index` of every buffer, `length` tokens written so far."""

    __slots__ = ("index", "length")

    def __init__(self, index: int) -> None:
        self.index = index
        self.length = 0


class KVCache:
    """The buffers of all layers and the slots that share them.

    Memory follows the tokens in use: on Linux, full layers keep pages for at most `KEPT_TOKENS` tokens beside
    them. Rings, bounded by the window, keep theirs. On other systems every place keeps the pages of its
    longest request until `close`.

    Raises:
        InputError: the system does not give that much memory.
    """

    def __init__(self, architecture: DecoderArchitecture, *, num_slots: int, capacity: int) -> None:
        self.architecture = architecture
        self.num_slots = num_slots
        self.capacity = capacity
        self.ring_capacity = ring_capacity(architecture)
        heads, width = architecture.num_attention_heads, architecture.head_dim
        rows = [
            self.ring_capacity if kind is LayerKind.SLIDING else capacity for kind in architecture.layer_kinds
        ]
        slot_bytes = 2 * sum(rows) * heads * width * 4
        # What one token takes in all full layers, and in all sliding ones.
        self._token_bytes = (
            2 * architecture.num_full_layers * heads * width * 4,
            2 * architecture.num_sliding_layers * heads * width * 4,
        )
        buffers = [
            [
                # The place behind the last slot is never written: a call may take it along without tokens.
                SlotBuffer((num_slots, heads, count, width), slot_bytes=slot_bytes, num_spare=1)
                for _ in ("key", "value")
            ]
            for count in rows
        ]
        self.layers: list[tuple[Float32, Float32]] = [(keys.array, values.array) for keys, values in buffers]
        self._releasable = [
            buffer
            for kind, pair in zip(architecture.layer_kinds, buffers, strict=True)
            for buffer in pair
            if kind is LayerKind.FULL
        ]
        self._slots: list[Slot] = []
        # Place -> most tokens that slots which have left it wrote there since its pages were given back.
        self._written: dict[int, int] = {}

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
        self.empty(slot)
        if last is not slot:
            self._relocate(last, slot.index)
        slot.index = -1
        self._trim()

    def empty(self, slot: Slot) -> None:
        """Drops what the slot holds, which is then not worth moving."""
        self._leave(slot)
        slot.length = 0

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
        self._leave(other)
        held = [[buffer[index].copy() for buffer in layer] for layer in self._filled_views(other)]
        self._relocate(slot, index)
        self._clear_for(other, place)
        for layer, (keys, values) in zip(held, self._filled_views(other), strict=True):
            keys[place], values[place] = layer
        other.index = place
        self._slots[place] = other

    def num_reversible(self, length: int) -> int:
        """How many tokens may follow `length` and be taken back by `truncate`; negative without room for it.

        A ring that is compacted loses positions which a shorter text still sees.
        """
        room = self.capacity - length
        if not self.architecture.num_sliding_layers:
            return room
        return min(room, self.ring_capacity - self._ring_length(length))

    def truncate(self, slot: Slot, length: int) -> None:
        """Takes the slot's last tokens back, at most `num_reversible(length)`.

        Their keys and values stay where they are: raising `slot.length` again brings them back.
        """
        assert 0 <= slot.length - length <= self.num_reversible(length), (slot.length, length)
        slot.length = length

    def save_full(self, slot: Slot, begin: int, end: int) -> Float32:
        """A copy of the full layers' keys and values from position `begin` to `end`, (2F, H, -, D)."""
        assert 0 <= begin <= end <= slot.length, (begin, end, slot.length)
        return self._stacked(
            [buffer[slot.index, :, begin:end] for buffer in self._buffers(LayerKind.FULL)], end - begin
        )

    def has_window(self, slot: Slot, length: int) -> bool:
        """Whether the rings still hold all that the token behind the first `length` sees."""
        return self.keeps_window(slot.length, length)

    def keeps_window(self, total: int, length: int) -> bool:
        """Whether rings hold after `total` tokens all that the token behind the first `length` sees."""
        first = total - self._ring_length(total)
        begin = max(0, length - self._num_visible)
        return length <= total and (begin >= first or begin == length)

    def save_window(self, slot: Slot, length: int) -> Float32:
        """A copy of what the token behind the first `length` sees in the rings, (2S, H, up to W - 1, D)."""
        assert self.has_window(slot, length), (slot.length, length)
        first = slot.length - self._ring_length(slot.length)
        begin, end = max(0, length - self._num_visible) - first, length - first
        return self._stacked(
            [buffer[slot.index, :, begin:end] for buffer in self._buffers(LayerKind.SLIDING)], end - begin
        )

    def restore(self, slot: Slot, full: Sequence[Float32], window: Float32) -> None:
        """Fills an empty slot with pieces of `save_full`, from position 0 on, and what `save_window` gave."""
        assert slot.length == 0, "restored slots are empty"
        length = 0
        for piece in full:
            end = length + piece.shape[2]
            for buffer, saved in zip(self._buffers(LayerKind.FULL), piece, strict=True):
                buffer[slot.index, :, length:end] = saved
            length = end
        end = self._ring_length(length)
        begin = end - window.shape[2]
        for buffer, saved in zip(self._buffers(LayerKind.SLIDING), window, strict=True):
            # No later token sees these rows, but whatever is not a number there would spoil its sums.
            buffer[slot.index, :, :begin] = 0
            buffer[slot.index, :, begin:end] = saved
        slot.length = length

    def saved_bytes(self, num_full: int, num_window: int) -> int:
        """Bytes of copies of that many tokens of the full layers and of the rings."""
        architecture = self.architecture
        per_layer = 2 * 4 * architecture.num_attention_heads * architecture.head_dim
        num_sliding = architecture.num_sliding_layers * min(num_window, self._num_visible)
        return per_layer * (architecture.num_full_layers * num_full + num_sliding)

    @property
    def _num_visible(self) -> int:
        """Most earlier positions that a token sees in a ring."""
        return self.architecture.window - 1

    def _buffers(self, kind: LayerKind) -> Iterator[Float32]:
        for each, pair in zip(self.architecture.layer_kinds, self.layers, strict=True):
            if each is kind:
                yield from pair

    def _stacked(self, views: list[Float32], count: int) -> Float32:
        architecture = self.architecture
        shape = (len(views), architecture.num_attention_heads, count, architecture.head_dim)
        stacked = np.empty(shape, np.float32)
        for i, view in enumerate(views):
            stacked[i] = view
        return stacked

    def _ring_length(self, length: int) -> int:
        return ring_length(length, self.ring_capacity, self.architecture.window)

    def reset(self) -> None:
        """Frees every slot, also after a move that was interrupted half-way."""
        for slot in {*self._slots}:
            self._leave(slot)
            slot.index = -1
        self._slots.clear()
        self._trim()

    def close(self) -> None:
        """Gives all memory back; nothing can be allocated afterwards."""
        self.layers.clear()
        self._releasable.clear()

    def bytes_at(self, length: int) -> int:
        """Bytes that hold the keys and values of one slot with `length` tokens."""
        in_full, in_ring = self._token_bytes
        return in_full * length + in_ring * self._ring_length(length)

    def peak_bytes(self, length: int) -> int:
        """Most bytes that one slot holds on its way to `length` tokens: a ring is fullest before it wraps."""
        in_full, in_ring = self._token_bytes
        return in_full * length + in_ring * min(length, self.ring_capacity)

    def used_bytes(self) -> int:
        """Bytes that hold keys and values of the slots in use."""
        return sum(self.bytes_at(slot.length) for slot in self._slots)

    def _leave(self, slot: Slot) -> None:
        """Remembers how far the slot has filled the place whose contents it is about to leave."""
        self._written[slot.index] = max(slot.length, self._written.get(slot.index, 0))

    def _trim(self) -> None:
        """Gives pages of free places back, of those first that are taken last, until few enough are left."""
        free = sorted((place for place in self._written if place >= len(self._slots)), reverse=True)
        num_kept = sum(self._written[place] for place in free)
        for place in free:
            if num_kept <= KEPT_TOKENS:
                return
            num_kept -= self._written[place]
            self._release(place)

    def _clear_for(self, slot: Slot, place: int) -> None:
        """Gives back the pages of a place that `slot` is about to fill, if it would leave many unused."""
        if self._written.get(place, 0) > slot.length + _SPARE_TOKENS:
            self._release(place)

    def _release(self, place: int) -> None:
        for buffer in self._releasable:
            buffer.release(place)
        del self._written[place]

    def _relocate(self, slot: Slot, index: int) -> None:
        self._leave(slot)
        self._clear_for(slot, index)
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
        in_ring = self._ring_length(length)
        is_sliding = (kind is LayerKind.SLIDING for kind in self.architecture.layer_kinds)
        return [in_ring if sliding else length for sliding in is_sliding]


class SlotBuffer:
    """Float32 zeros (slots, ...) that take no memory until they are written, where the system maps lazily.

    Not `np.zeros`: numpy asks for huge pages, and the first token of each head would take 2 MB.

    Args:
        shape: slots first.
        slot_bytes: what all buffers of one slot take together, for the message.
        num_spare: places behind the slots.

    Attributes:
        array: the whole of it, spare places included.

    Raises:
        InputError: the system does not give that much memory.
    """

    def __init__(self, shape: tuple[int, ...], *, slot_bytes: int, num_spare: int = 0) -> None:
        self._place_bytes = math.prod(shape[1:]) * 4
        places = (shape[0] + num_spare, *shape[1:])
        try:
            self._memory = None if sys.platform == "win32" else _untouched_memory(math.prod(places) * 4)
            flat = (
                np.zeros(places, np.float32)
                if self._memory is None
                else np.frombuffer(self._memory, np.float32)
            )
            self.array: Float32 = flat.reshape(places)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise InputError(
                f"the system does not give the memory for {shape[0]:,} slots of {slot_bytes:,} bytes each "
                f"({error}); lower max_slots or max_context"
            ) from error

    def release(self, place: int) -> None:
        """Makes one slot zeros again that take no memory; elsewhere than on Linux nothing changes."""
        if self._memory is None or sys.platform != "linux":
            return
        # Whole pages only: those at either end may belong to a neighbour as well.
        page = mmap.PAGESIZE
        begin = -(-place * self._place_bytes // page) * page
        end = (place + 1) * self._place_bytes // page * page
        if begin < end:
            self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _untouched_memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
