"""One ONNX Runtime session and its cache: `step(rows)` for slots, `read(piece)` for texts that are only read.

A row is a slot and its new tokens: a whole prompt, a chunk of one, or a single token. `step` groups rows into
as few session calls as pay: single tokens of neighbouring slots share a call, prompts share one when padding
them to equal length costs little. `read` is one call with keys and values that the caller keeps. Which tokens
to feed is the scheduler's and the reader's business, which token comes next the sampler's.

Legend: B rows of a call, S new tokens per row (right-padded), M logit rows, N state rows, V vocabulary or
labels, C model width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike, NDArray

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.engine.batch_invariance import CallShape, Pairs, pieces
from modernbert_decoder.engine.kv_cache import Float32, KVCache, Layers, Slot, SlotBuffer
from modernbert_decoder.engine.rings import most_new_tokens
from modernbert_decoder.engine.selective import ScratchPair, Selection, append, past_of
from modernbert_decoder.engine.session import open_session, shared_value

# Prompts share a call while padding adds at most this share of tokens.
_MAX_PADDING: Final = 0.15
# Bound calls kept for reuse: one per number of decoding rows, in the steady state just one, and of single
# rows those that verify up to so many tokens, or read the two that a draft model lacks after it was right.
_MAX_KEPT_CALLS: Final = 32
_MAX_KEPT_TOKENS: Final = 16


@dataclass(slots=True)
class Row:
    """New tokens for a slot; logits are wanted for the last `num_logits` of them."""

    slot: Slot
    token_ids: Sequence[int]
    num_logits: int = 1


@dataclass(slots=True)
class Piece:
    """The next tokens of B texts that are read together, and what is wanted of them.

    Attributes:
        layers: their keys and values so far, of B rows; extended in place.
        token_ids: the new tokens of each, at least one.
        num_past: how many tokens of each `layers` holds already.
        logit_positions: (M,) row * S + place, S being the most new tokens of a row.
        state_positions: (N,) likewise.
        is_last: nothing is read behind it, so that `layers` may stay as they are.
    """

    layers: Layers
    token_ids: Sequence[Sequence[int]]
    num_past: Sequence[int] | NDArray[np.integer[Any]]
    logit_positions: Sequence[int] = ()
    state_positions: Sequence[int] = ()
    is_last: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return len(self.token_ids), max(map(len, self.token_ids))


class Runtime:
    """The session of one model and its cache.

    Args:
        architecture: of the model.
        graph: from `build_graph`, for at least `context_length` positions.
        is_selective: whether it is a selective one, which reads texts but has no slots.
        weights: initializer name -> array; kept alive and shared, not copied, where the kernels allow it.
        num_slots: most requests at a time.
        context_length: most tokens per request.
        threads: for the session's kernels.
        providers: ONNX Runtime execution providers.
        pairs: which numbers must be even where `is_batch_invariant` is set.

    Attributes:
        cache: the slots.
        is_batch_invariant: whether logits are the same to the last bit whatever rows are fed together, and
            however a text is cut into rows of two tokens or more. Of a row of one token they are others, as
            attention then sums in another order, and so may those of a long row be that wants the logits of
            more than its last tokens, which is not cut.
        network_seconds: time spent inside session calls so far.
        num_calls: session calls so far.
    """

    def __init__(
        self,
        architecture: DecoderArchitecture,
        graph: bytes,
        weights: Mapping[str, NDArray[Any]],
        *,
        num_slots: int,
        context_length: int,
        threads: int,
        providers: Sequence[str],
        is_selective: bool = False,
        pairs: Pairs | None = None,
    ) -> None:
        self.architecture = architecture
        self.is_batch_invariant = False
        self._pairs = pairs or Pairs()
        self._most_new_tokens = most_new_tokens(architecture)
        self._is_selective = is_selective
        self._num_positions = context_length
        self._scratch = ScratchPair()
        self.cache = KVCache(architecture, num_slots=num_slots, capacity=context_length)
        self.network_seconds = 0.0
        self.num_calls = 0
        self._held = [np.asarray(array) for array in weights.values()]
        self._session = open_session(graph, list(weights), self._held, threads=threads, providers=providers)
        # By first slot, number of rows, shape, and whether all of them decode.
        self._kept: dict[tuple[int, int, CallShape, bool], _Call] = {}
        # One row of logits per slot for all single-token calls; other calls bring rows of their own.
        self._decode_logits = SlotBuffer(
            (num_slots, architecture.vocab_size), slot_bytes=4 * architecture.vocab_size, num_spare=1
        ).array
        self._no_states = np.empty((0, architecture.hidden_size), np.float32)

    def step(self, rows: Sequence[Row]) -> list[Float32]:
        """Feeds every row its tokens and returns its logits (num_logits, V), valid until the next step."""
        assert not self._is_selective, "a selective graph has no slots"
        if self.is_batch_invariant:
            rows = [row if len(row.token_ids) == 1 else self._shortened(row) for row in rows]
        if len(rows) == 1:
            return [self._run(rows)[: rows[0].num_logits]]
        results: dict[int, Float32] = {}
        for group in self._groups(rows):
            logits = self._run(group)
            start = 0
            for row in group:
                results[row.slot.index] = logits[start : start + row.num_logits]
                start += row.num_logits
        return [results[row.slot.index] for row in rows]

    def read(self, piece: Piece, *, logits: Float32 | None = None) -> tuple[Float32, Float32]:
        """Feeds the texts of a piece their tokens; returns logits (M, V) and states (N, C).

        Args:
            piece: what to read.
            logits: memory for them, (M, V), instead of new one.
        """
        architecture = self.architecture
        if logits is None:
            logits = self.empty_logits(len(piece.logit_positions))
        states = np.empty((len(piece.state_positions), architecture.hidden_size), np.float32)
        bound_logits = None if architecture.head is Head.NONE else logits
        if self._is_selective:
            selective = _SelectiveCall(
                self._session,
                piece,
                new=self._scratch,
                num_positions=self._num_positions,
                logits=bound_logits,
                states=states,
            )
            self._execute(selective)
            if not piece.is_last:
                selective.keep()
        else:
            call = _Call(self._session, piece.layers, shape=piece.shape, logits=bound_logits, states=states)
            call.fill_piece(piece)
            self._execute(call)
        return logits, states

    @property
    def logit_width(self) -> int:
        """The length of a row of logits: labels of a classifier, else the vocabulary."""
        is_classifier = self.architecture.head is Head.SEQUENCE_CLASSIFICATION
        return self.architecture.num_labels if is_classifier else self.architecture.vocab_size

    def empty_logits(self, count: int) -> Float32:
        """Memory for `count` rows of logits."""
        return np.empty((count, self.logit_width), np.float32)

    def close(self) -> None:
        """Releases session, weights and cache; nothing can be run afterwards."""
        self._kept.clear()
        self._held.clear()
        del self._session, self._decode_logits
        self.cache.close()

    def _shortened(self, row: Row) -> Row:
        """What is left of a row to be fed once all of it but a last piece was."""
        *leading, last = pieces(row.token_ids, self._most_new_tokens)
        # Those with more logits verify drafts, which steps of single tokens do not equal in any case.
        if not leading or row.num_logits > len(last):
            return row
        for piece in leading:
            self._run([Row(row.slot, piece, 0)])
        return Row(row.slot, last, row.num_logits)

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows in slot order, cut where slots are not neighbours or padding would cost too much."""
        groups: list[list[Row]] = []
        longest = num_tokens = 0
        for row in sorted(rows, key=lambda row: row.slot.index):
            count = len(row.token_ids)
            if groups:
                group = groups[-1]
                is_neighbour = row.slot.index == group[-1].slot.index + 1
                padded = max(longest, count) * (len(group) + 1)
                pays = padded <= (1 + _MAX_PADDING) * (num_tokens + count)
                fits = (
                    max(each.slot.length for each in (*group, row)) + max(longest, count)
                    <= self.cache.capacity
                )
                if is_neighbour and pays and fits and (count == 1) == (longest == 1):
                    group.append(row)
                    longest, num_tokens = max(longest, count), num_tokens + count
                    continue
            groups.append([row])
            longest, num_tokens = count, count
        return groups

    def _run(self, rows: Sequence[Row]) -> Float32:
        first = rows[0].slot.index
        call = self._call(first, rows)
        if call.is_decode:
            call.fill_tokens(rows)
        else:
            call.fill_rows(rows)
        self._execute(call)
        for row in rows:
            row.slot.length += len(row.token_ids)
        assert call.logits is not None, "rows with slots are for language models"
        return call.logits

    def _execute(self, call: _Call) -> None:
        started = time.perf_counter()
        self._session.run_with_iobinding(call.binding)
        self.network_seconds += time.perf_counter() - started
        self.num_calls += 1

    def _call(self, first: int, rows: Sequence[Row]) -> _Call:
        """Bindings for these rows; those of small calls that come again and again are kept."""
        is_decode = all(len(row.token_ids) == 1 and row.num_logits == 1 for row in rows)
        longest = 1 if is_decode else max(len(row.token_ids) for row in rows)
        num_logits = len(rows) if is_decode else sum(row.num_logits for row in rows)
        shape = CallShape(len(rows), longest, num_logits)
        if self.is_batch_invariant:
            most = max(row.slot.length for row in rows) + longest
            shape = self._pairs.padded(shape, has_room=most < self.cache.capacity)
        key = (first, len(rows), shape, is_decode)
        if key in self._kept:
            return self._kept[key]
        if is_decode:
            logits = self._decode_logits[first : first + shape.positions]
        else:
            logits = np.empty((shape.positions, self.architecture.vocab_size), np.float32)
        end = first + shape.places
        layers = [(keys[first:end], values[first:end]) for keys, values in self.cache.layers]
        call = _Call(
            self._session,
            layers,
            shape=(shape.places, shape.width),
            logits=logits,
            states=self._no_states,
            num_rows=len(rows),
            is_decode=is_decode,
        )
        is_drafting = len(rows) == 1 and longest <= _MAX_KEPT_TOKENS and longest in (num_logits, 2)
        if is_decode or is_drafting:
            if len(self._kept) == _MAX_KEPT_CALLS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = call
        return call


class _Call:
    """Bindings of inputs, outputs and caches for `shape` = (B, S) tokens.

    Of the B rows those behind the first `num_rows` have no tokens: nothing is read or written there. Logits
    behind those that were asked for are of any position.

    Attributes:
        logits: (M, V), or None where the model has no head.
        is_decode: whether every row brings one token and wants its logits.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        layers: Layers,
        *,
        shape: tuple[int, int],
        logits: Float32 | None,
        states: Float32,
        num_rows: int | None = None,
        is_decode: bool = False,
    ) -> None:
        num_places = shape[0]
        num_rows = num_places if num_rows is None else num_rows
        self.input_ids = np.zeros(shape, np.int64)
        self.last_positions = np.zeros(num_places, np.int32)
        self.longest = np.zeros((), np.int32)
        self.query_lengths = np.ones(num_places, np.int32)
        self.query_lengths[num_rows:] = 0
        num_logits = 0 if logits is None else len(logits)
        self.kept_positions = np.zeros(num_logits + len(states), np.int64)
        self.logit_positions = self.kept_positions[:num_logits]
        self.state_positions = self.kept_positions[num_logits:]
        self._places = np.arange(len(self.kept_positions))  # bound, so they must live as long
        self.logits = logits
        self.is_decode = is_decode
        if is_decode:
            self.logit_positions[:num_rows] = range(num_rows)
        self.binding = session.io_binding()
        self.binding.bind_ortvalue_output("states", shared_value(states))
        if logits is not None:
            self.binding.bind_ortvalue_output("logits", shared_value(logits))
        inputs = self._positions()
        if logits is None:
            del inputs["logit_positions"]
        for name in ("input_ids", "last_positions", "longest", "query_lengths"):
            inputs[name] = getattr(self, name)
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, shared_value(array))
        for index, layer in enumerate(layers):
            for name, array in zip(("key", "value"), layer, strict=True):
                value = shared_value(array)
                self.binding.bind_ortvalue_input(f"past_{name}.{index}", value)
                self.binding.bind_ortvalue_output(f"present_{name}.{index}", value)

    def _positions(self) -> dict[str, NDArray[Any]]:
        """The inputs that say what is asked for: the tokens that are kept, and which of those are what."""
        num_logits = len(self.logit_positions)
        return {
            "kept_positions": self.kept_positions,
            "logit_positions": self._places[:num_logits],
            "state_positions": self._places[num_logits:],
        }

    def fill_tokens(self, rows: Sequence[Row]) -> None:
        """Writes what changes from one decode step to the next into the bound arrays."""
        longest = 0
        for i, row in enumerate(rows):
            length = row.slot.length
            self.input_ids[i, 0] = row.token_ids[0]
            self.last_positions[i] = length
            if length >= longest:
                longest = length + 1
        self.longest[...] = longest

    def fill_rows(self, rows: Sequence[Row]) -> None:
        """Writes prompts, or chunks of them, into the bound arrays."""
        self._fill([row.token_ids for row in rows], [row.slot.length for row in rows])
        start, width = 0, self.input_ids.shape[1]
        for i, row in enumerate(rows):
            end = i * width + len(row.token_ids)
            self.logit_positions[start : start + row.num_logits] = range(end - row.num_logits, end)
            start += row.num_logits

    def fill_piece(self, piece: Piece) -> None:
        """Writes pieces of texts into the bound arrays."""
        self._fill(piece.token_ids, piece.num_past)
        self.state_positions[:] = piece.state_positions
        if self.logits is not None:
            self.logit_positions[:] = piece.logit_positions

    def _fill(self, token_ids: Sequence[Sequence[int]], num_past: ArrayLike) -> None:
        for i, ids in enumerate(token_ids):
            self.input_ids[i, : len(ids)] = ids
        lengths, ends = self.query_lengths[: len(token_ids)], self.last_positions[: len(token_ids)]
        lengths[:] = [len(ids) for ids in token_ids]
        np.add(num_past, lengths, out=ends, casting="unsafe")
        self.longest[...] = max(int(ends.max()), self.input_ids.shape[1])
        ends -= 1


class _SelectiveCall(_Call):
    """A piece for a selective graph: bindings, filled, of its own inputs as well."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        piece: Piece,
        *,
        new: ScratchPair,
        num_positions: int,
        logits: Float32 | None,
        states: Float32,
    ) -> None:
        *layers, last = piece.layers
        super().__init__(session, layers, shape=piece.shape, logits=logits, states=states)
        self._last = last
        self._num_past = np.asarray(piece.num_past, np.int64)
        wanted = [*piece.logit_positions, *piece.state_positions]
        selection = Selection(wanted, piece.shape, self._num_past, num_positions=num_positions)
        past = past_of(last, selection.num_past)
        num_rows, longest = piece.shape
        new_shape = (num_rows, last[0].shape[1], longest, last[0].shape[3])
        self._new = new.pair(new_shape)
        index = len(layers)
        inputs = {
            "selected": selection.selected,
            "positions": selection.positions,
            "selected_positions": selection.selected_positions,
            "visible": selection.visible(),
            "num_keys": np.array([selection.num_past, longest]),
            f"past_key.{index}": past[0],
            f"past_value.{index}": past[1],
        }
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, shared_value(array))
        for name, array in zip(("key", "value"), self._new, strict=True):
            self.binding.bind_ortvalue_output(f"present_{name}.{index}", shared_value(array))
        self._fill(piece.token_ids, self._num_past)
        num_logits = len(piece.logit_positions)
        self.state_positions[:] = selection.found[num_logits:]
        if logits is not None:
            self.logit_positions[:] = selection.found[:num_logits]

    def _positions(self) -> dict[str, NDArray[Any]]:
        return {"logit_positions": self.logit_positions, "state_positions": self.state_positions}

    def keep(self) -> None:
        """Writes the last layer's new keys and values behind the past ones, once they are computed."""
        append(self._last, self._new, self._num_past)
