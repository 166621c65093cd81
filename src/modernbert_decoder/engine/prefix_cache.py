"""Beginnings of texts whose keys and values are kept: prompts that share one do not compute it again.

`PrefixTree` is a radix tree over token ids with copies of slots' contents in bounded memory; `PrefixCache`
decides where in a prompt such copies are taken and which prompts wait for them. Copies, because the attention
operator wants a slot in one block of memory. This module knows requests and slots, not the session.

Legend: H heads, D head width, F full and S sliding layers, W window.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from modernbert_decoder.engine.batch_invariance import FEWEST_TOKENS
from modernbert_decoder.engine.kv_cache import Float32, KVCache, Slot
from modernbert_decoder.engine.request import Request

# Fewer tokens than this are computed anew: a mark takes the memory of 60 to 120 tokens of the full layers.
MIN_GAP: Final = 32
# So many gaps lie before a mark that stands where a chunk happened to end.
_CHUNK_GAPS: Final = 6


class _Node:
    """An edge of the tree and what lies at its end.

    Attributes:
        ids: the tokens of the edge; at least one but for the root.
        full: (2F, H, len(ids), D) keys and values of the full layers.
        window: (2S, H, up to W - 1, D) those of the sliding layers before its end; None where no prompt can
            be resumed. A node that has it is a mark.
    """

    __slots__ = ("children", "full", "ids", "parent", "window")

    def __init__(self, ids: array[int], full: Float32 | None, parent: _Node | None) -> None:
        self.ids = ids
        self.full = full
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.window: Float32 | None = None

    @property
    def edge_bytes(self) -> int:
        """Bytes of the ids and of the full layers."""
        return self.ids.itemsize * len(self.ids) + (0 if self.full is None else self.full.nbytes)


@dataclass(frozen=True, slots=True)
class Found:
    """What a tree knows of a text.

    Attributes:
        length: tokens up to its last mark, 0 without one.
        num_shared: tokens that some text in the tree begins with as well, at least `length`.
        nodes: the edges up to that mark.
    """

    length: int
    num_shared: int
    nodes: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Walk:
    """How far a text is in the tree: whole edges (`nodes`, `depth` tokens), then `partial` of `child`."""

    nodes: list[_Node]
    depth: int
    partial: int
    child: _Node | None


class PrefixTree:
    """Texts by their tokens, each as far as its last mark; the marks used least recently go first.

    Args:
        cache: of the slots whose contents are kept.
        max_bytes: most bytes of all ids, keys and values kept.

    Attributes:
        num_bytes: bytes held now.
        num_evictions: marks given up for others so far.
    """

    def __init__(self, cache: KVCache, *, max_bytes: int) -> None:
        self._cache = cache
        self._max_bytes = max_bytes
        self._root = _Node(array("i"), None, None)
        # Least recently used first. Every leaf is a mark.
        self._marks: OrderedDict[_Node, None] = OrderedDict()
        self.num_bytes = 0
        self.num_evictions = 0

    def __len__(self) -> int:
        """The number of marks."""
        return len(self._marks)

    def find(self, ids: array[int]) -> Found:
        """The longest known beginning of a text."""
        walk = self._walk(ids)
        nodes = walk.nodes
        length = walk.depth
        while nodes and nodes[-1].window is None:
            length -= len(nodes[-1].ids)
            nodes = nodes[:-1]
        return Found(length, walk.depth + walk.partial, tuple(nodes))

    def restore(self, found: Found, slot: Slot) -> None:
        """Puts what was found, which must not be nothing, into an empty slot."""
        mark = found.nodes[-1]
        assert mark.window is not None
        self._marks.move_to_end(mark)
        self._cache.restore(slot, [node.full for node in found.nodes if node.full is not None], mark.window)

    def store(self, ids: array[int], slot: Slot, *, min_gap: int) -> None:
        """Makes a mark behind `ids`, with which the slot's contents begin.

        There is none where the rings have lost what it needs, where it would stand less than `min_gap` tokens
        behind another, or where it is larger than all the memory.
        """
        walk = self._walk(ids)
        if walk.depth == len(ids) and walk.nodes and walk.nodes[-1].window is not None:
            self._marks.move_to_end(walk.nodes[-1])
            return
        if len(ids) - _last_mark(walk.nodes) < min_gap or not self._cache.has_window(slot, len(ids)):
            return
        begin = walk.depth + walk.partial
        path_bytes = self._bytes_of(begin)
        new_bytes = self._bytes_of(len(ids) - begin) + self._cache.saved_bytes(0, len(ids))
        if path_bytes + new_bytes > self._max_bytes:
            return
        nodes = walk.nodes
        if walk.child is not None:
            nodes = [*nodes, self._split(walk.child, walk.partial)]
        self._make_room(new_bytes, nodes)
        node = nodes[-1] if nodes else self._root
        if begin < len(ids):
            node = self._grow(node, ids[begin:], self._cache.save_full(slot, begin, len(ids)))
        node.window = self._cache.save_window(slot, len(ids))
        self.num_bytes += node.window.nbytes
        self._marks[node] = None

    def fits(self, length: int) -> bool:
        """Whether a mark behind so many tokens could be held at all."""
        return self._bytes_of(length) + self._cache.saved_bytes(0, length) <= self._max_bytes

    def clear(self) -> None:
        """Forgets everything."""
        self._root.children.clear()
        self._marks.clear()
        self.num_bytes = 0

    def _walk(self, ids: array[int]) -> _Walk:
        node, nodes, depth = self._root, list[_Node](), 0
        while depth < len(ids):
            child = node.children.get(ids[depth])
            if child is None:
                break
            shared = common_length(child.ids, ids[depth : depth + len(child.ids)])
            if shared < len(child.ids):
                return _Walk(nodes, depth, shared, child)
            depth += shared
            nodes.append(child)
            node = child
        return _Walk(nodes, depth, 0, None)

    def _bytes_of(self, count: int) -> int:
        """Bytes of edges of `count` tokens."""
        return self._cache.saved_bytes(count, 0) + array("i").itemsize * count

    def _grow(self, parent: _Node, ids: array[int], full: Float32) -> _Node:
        node = _Node(ids, full, parent)
        parent.children[ids[0]] = node
        self.num_bytes += node.edge_bytes
        return node

    def _split(self, node: _Node, count: int) -> _Node:
        """Cuts an edge behind its first `count` tokens; returns the upper part, a node without a mark."""
        parent, full = node.parent, node.full
        assert parent is not None
        assert full is not None
        # Copies, not views: a view would keep the memory of the whole edge when the other part is given up.
        upper = _Node(node.ids[:count], full[:, :, :count].copy(), parent)
        upper.children[node.ids[count]] = node
        parent.children[node.ids[0]] = upper
        node.ids, node.full, node.parent = node.ids[count:], full[:, :, count:].copy(), upper
        return upper

    def _make_room(self, num_bytes: int, kept: Sequence[_Node]) -> None:
        """Gives up marks until there is room, and the edges that lead to none, but not those of `kept`."""
        while self.num_bytes + num_bytes > self._max_bytes:
            node, _ = self._marks.popitem(last=False)
            assert node.window is not None
            self.num_bytes -= node.window.nbytes
            node.window = None
            self.num_evictions += 1
            self._prune(node, kept)

    def _prune(self, node: _Node, kept: Sequence[_Node]) -> None:
        """Gives up the edges that end here and lead to no mark."""
        while node.parent is not None and node not in kept and node.window is None and not node.children:
            self.num_bytes -= node.edge_bytes
            del node.parent.children[node.ids[0]]
            node = node.parent


class PrefixCache:
    """Resumes prompts behind beginnings that were computed before, and keeps the contents of slots for that.

    Marks are made where a chunk ends anyway, before a prompt's last token (whose logits are always needed),
    at the end of a completion (so that a conversation goes on from there), and where a prompt parts from
    another that is known or waits: there its prefill pauses, so that a third one resumes at that very place.

    Args:
        cache: of the slots.
        max_bytes: most bytes kept.
        min_gap: fewest tokens between two marks of a text.

    Attributes:
        num_hit_tokens: prompt tokens that were not computed so far.
        is_batch_invariant: whether a prompt that is resumed must get, to the last bit, what it gets when all
            of it is computed. Completions are not kept then, as tokens that were fed one by one have other
            keys and values than those of a prompt, and a prompt's last two tokens are always computed.
    """

    def __init__(self, cache: KVCache, *, max_bytes: int, min_gap: int = MIN_GAP) -> None:
        self._cache = cache
        self._tree = PrefixTree(cache, max_bytes=max_bytes)
        self._min_gap = min_gap
        self.num_hit_tokens = 0
        self.is_batch_invariant = False

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._tree.num_bytes

    @property
    def num_entries(self) -> int:
        """Places at which a prompt can be resumed."""
        return len(self._tree)

    @property
    def num_evictions(self) -> int:
        """Entries given up for others so far."""
        return self._tree.num_evictions

    def announce(self, request: Request, *, others: Sequence[Request]) -> None:
        """Has those that are prefilled pause where a prompt that has just got its slot parts from them."""
        found = self._tree.find(self._reusable(request))
        wanted = found.length + self._min_gap
        for other, length in self._partings(request, others, wanted).items():
            self._waits_for(other, length, wanted)

    def begin(self, request: Request, *, others: Sequence[Request]) -> bool:
        """Fills a prompt's empty slot as far as it is known; False if the prompt had better wait for a step.

        Args:
            request: has a slot and nothing in it.
            others: all that are prefilled. A prompt waits for those that compute what they share.
        """
        if request.awaited is not None:
            other, length = request.awaited
            if not other.is_finished and other.num_prefilled < length:
                return False
            request.awaited = None
        ids = self._reusable(request)
        found = self._tree.find(ids)
        wanted = found.length + self._min_gap
        partings = self._partings(request, others, wanted)
        for other, length in partings.items():
            if self._waits_for(other, length, wanted):
                place = next((each for each in other.pauses if wanted <= each <= length), length)
                request.awaited = other, place
                return False
        if found.length:
            assert request.row is not None
            self._tree.restore(found, request.row.slot)
            request.num_prefilled = found.length
            self.num_hit_tokens += found.length
        waiting = [length for other, length in partings.items() if not _has_begun(other)]
        pauses = {found.num_shared, len(ids), *([min(waiting)] if waiting else [])}
        request.pauses = self._spaced(
            place
            for place in pauses
            if wanted <= place and self._is_pause(request, place) and self._tree.fits(place)
        )
        return True

    def _partings(self, request: Request, others: Sequence[Request], wanted: int) -> dict[Request, int]:
        """Where a prompt parts from others, for those that share at least `wanted` tokens."""
        ids = self._reusable(request)
        last = slice(max(0, wanted - self._min_gap), wanted)
        partings = {}
        for other in others:
            # Most differ in the tokens behind those that are known, and are not looked at any further.
            if other is request or other.prompt_ids[last] != request.prompt_ids[last]:
                continue
            if not other.is_shareable:
                continue
            length = common_length(ids, self._reusable(other))
            if length >= wanted:
                partings[other] = length
        return partings

    def _waits_for(self, other: Request, length: int, wanted: int) -> bool:
        """Whether `other` is about to compute the `length` tokens that a prompt shares with it.

        It is then told to pause there, unless it pauses or ends a little before, behind the `wanted` tokens
        that are worth to wait for.
        """
        if not _has_begun(other) or other.num_prefilled >= length or not self._tree.fits(length):
            return False
        gap = self._min_gap
        if self._is_pause(other, length) and not any(
            max(wanted, length - gap + 1) <= each <= length for each in other.pauses
        ):
            other.pauses = sorted([*(each for each in other.pauses if abs(each - length) >= gap), length])
        return True

    def _spaced(self, places: Iterable[int]) -> list[int]:
        """The places in order, without those too near to the one before."""
        spaced: list[int] = []
        for place in sorted(places):
            if not spaced or place - spaced[-1] >= self._min_gap:
                spaced.append(place)
        return spaced

    def keep(self, request: Request) -> None:
        """Makes a mark behind what has been prefilled so far, if it is worth its memory."""
        if not request.is_shareable:
            return
        assert request.row is not None
        done, num_prompt = request.num_prefilled, len(request.prompt_ids)
        is_wanted = done == num_prompt or done in request.pauses
        ids = self._reusable(request)[:done]
        gap = self._min_gap if is_wanted else _CHUNK_GAPS * self._min_gap
        self._tree.store(ids, request.row.slot, min_gap=gap)

    def keep_completion(self, request: Request) -> None:
        """Makes a mark at the end of a completion; of several of one prompt, nobody knows which goes on."""
        if self.is_batch_invariant or not request.is_shareable or request.params.n > 1:
            return
        if request.finish_reason not in ("stop", "length"):
            return
        assert request.row is not None
        slot = request.row.slot
        ids = array("i", [*request.prompt_ids, *request.token_ids][: slot.length])
        self._tree.store(ids, slot, min_gap=self._min_gap)

    def clear(self) -> None:
        """Forgets everything."""
        self._tree.clear()

    def _reusable(self, request: Request) -> array[int]:
        """A prompt without its last tokens, which are always computed."""
        return array("i", request.prompt_ids[: -self._num_computed])

    def _is_pause(self, request: Request, place: int) -> bool:
        """Whether a prompt has to pause for a mark at a place, and does not make it at its end anyway."""
        num_prompt = len(request.prompt_ids)
        end = num_prompt - self._num_computed
        return place < end or (place == end and not self._cache.keeps_window(num_prompt, end))

    @property
    def _num_computed(self) -> int:
        """Tokens at a prompt's end that are computed even if it is known: one gives the logits."""
        return FEWEST_TOKENS if self.is_batch_invariant else 1


def _has_begun(request: Request) -> bool:
    """Whether tokens of a prompt have been fed, or are in this step."""
    return request.row is not None and len(request.row.token_ids) > 0


def common_length(first: array[int], second: array[int]) -> int:
    """How many tokens two texts begin with in common.

    >>> common_length(array("i", [5, 6, 7, 8]), array("i", [5, 6, 9]))
    2
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _last_mark(nodes: Sequence[_Node]) -> int:
    """Tokens up to the last mark of a path."""
    length = last = 0
    for node in nodes:
        length += len(node.ids)
        if node.window is not None:
            last = length
    return last
