"""One model's sessions and cache: `step(rows)` for slots, `read(piece)` for texts that are only read.

A row is a slot and its new tokens: a whole prompt, a chunk of one, or a single token. `step` groups rows into
as few session calls as pay: single tokens of neighbouring slots share a call, prompts share one when padding
them to equal length costs little. `read` is one call with keys and values that the caller keeps. Which tokens
to feed is the scheduler's and the reader's business, which token comes next the sampler's.

Legend: B rows of a call, S new tokens per row (right-padded), M logit rows, N state rows, V vocabulary or
labels, C model width.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.engine.batch_invariance import CallShape, Pairs, pieces
from modernbert_decoder.engine.calls import Call, Meter, Piece, Row, Stepwise, StepwiseCall
from modernbert_decoder.engine.kv_cache import Float32, KVCache, Layers, SlotBuffer
from modernbert_decoder.engine.piece_reader import PieceReader
from modernbert_decoder.engine.rings import most_new_tokens
from modernbert_decoder.engine.session import CPU_PROVIDER, open_session

# Prompts share a call while padding adds at most this share of tokens.
_MAX_PADDING: Final = 0.15
# Bound calls kept for reuse: one per number of decoding rows, in the steady state just one; and beside them
# those of single rows that verify up to so many tokens, or read the two that a draft model lacks after it was
# right.
_MAX_KEPT_CALLS: Final = 32
_MAX_KEPT_TOKENS: Final = 16
_Open = Callable[..., onnxruntime.InferenceSession]
# More threads do not read side by side: each would hold keys and values of its own.
_MOST_LANES: Final = 4
# Nor do any if the layers take more: each thread reads them all, at best from a cache they share.
_MOST_LANE_BYTES: Final = 16 << 20
_Key = TypeVar("_Key")


class _Kind(enum.Enum):
    """What a row is: one token, some of a prompt, or some that are to be verified."""

    TOKEN = enum.auto()
    TEXT = enum.auto()
    DRAFTS = enum.auto()

    @classmethod
    def of(cls, row: Row) -> _Kind:
        """Only drafts want the logits of more than their last token."""
        if row.num_logits > 1:
            return cls.DRAFTS
        return cls.TEXT if row.is_prompt or len(row.token_ids) > 1 else cls.TOKEN


class PromptModel(NamedTuple):
    """A graph, its weights by name, and which numbers must be even in a batch-invariant call of it."""

    graph: bytes
    weights: Mapping[str, NDArray[Any]]
    pairs: Pairs


class Runtime:
    """The sessions of one model and its cache.

    Args:
        architecture: of the model.
        graph: from `build_graph`, for at least `context_length` positions.
        is_selective: whether it is a selective one, which reads texts but has no slots.
        weights: initializer name -> array; kept alive and shared, not copied, where the kernels allow it.
        num_slots: most requests at a time.
        context_length: most tokens per request.
        threads: for the kernels of each session.
        providers: ONNX Runtime execution providers.
        pairs: which numbers must be even where `is_batch_invariant` is set.
        stepwise: gives a stepwise graph of the same model, for rows that want the logits of more than their
            last token where `is_batch_invariant` is set.
        prompt_model: of the same model, for the tokens of prompts.

    Attributes:
        cache: the slots.
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
        stepwise: Stepwise | None = None,
        prompt_model: PromptModel | None = None,
    ) -> None:
        self.architecture = architecture
        self._is_batch_invariant = False
        self._stepwise = stepwise
        self._stepwise_session: onnxruntime.InferenceSession | None = None
        self._pairs = self._prompt_pairs = pairs or Pairs()
        self._most_new_tokens = most_new_tokens(architecture)
        self._is_selective = is_selective
        self._num_positions = context_length
        self._threads = threads
        self._providers = tuple(providers)
        self._graph = graph
        self._layer_bytes = sum(each.nbytes for name, each in weights.items() if "layers." in name)
        self._lane_session: onnxruntime.InferenceSession | None = None
        self.cache = KVCache(architecture, num_slots=num_slots, capacity=context_length)
        self._meter = Meter()
        self._held: list[NDArray[Any]] = []

        def opener(weights: Mapping[str, NDArray[Any]]) -> _Open:
            arrays = [np.asarray(array) for array in weights.values()]
            self._held += arrays
            return partial(
                open_session, names=list(weights), arrays=arrays, threads=threads, providers=providers
            )

        self._open = opener(weights)
        self._session = self._prompt_session = self._open(graph)
        self._reader = self._piece_reader(self._session)
        if prompt_model is not None:
            self._prompt_session = opener(prompt_model.weights)(prompt_model.graph)
            self._prompt_pairs = prompt_model.pairs
        # By first slot, number of rows, and whether batch-invariant.
        self._decoding: dict[tuple[int, int, bool], Call] = {}
        # By first slot, number of rows, shape, what the rows are, and whether as if one by one.
        self._kept: dict[tuple[int, int, CallShape, _Kind, bool], Call] = {}
        # One row of logits per slot for all single-token calls; other calls bring rows of their own.
        self._decode_logits = SlotBuffer(
            (num_slots, architecture.vocab_size), slot_bytes=4 * architecture.vocab_size, num_spare=1
        ).array
        self._no_states = np.empty((0, architecture.hidden_size), np.float32)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether logits are the same to the last bit whatever rows are fed together.

        And however a text is cut into rows of two tokens or more. Of a row of one token they are others, as
        attention then sums in another order. A row that wants the logits of more than its last token has
        those of so many rows of one token where there is a stepwise graph; without one it is cut only if the
        last piece holds them all, and if it is long its logits may be others.

        With the first time that this is set, a stepwise graph takes memory for weights of its own.
        """
        return self._is_batch_invariant

    @is_batch_invariant.setter
    def is_batch_invariant(self, value: bool) -> None:
        if value and self._stepwise is not None and self._stepwise_session is None:
            self._stepwise_session = self._open(self._stepwise.build())
        self._is_batch_invariant = value

    def step(self, rows: Sequence[Row]) -> list[Float32]:
        """Feeds every row its tokens and returns its logits (num_logits, V), valid until the next step."""
        assert not self._is_selective, "a selective graph has no slots"
        if _are_decoding_neighbours(rows):  # as nearly always: nothing to be sorted or grouped
            logits = self._decode(rows)
            return [logits[i : i + 1] for i in range(len(rows))]
        if self._is_batch_invariant:
            rows = [self._shortened(row) for row in rows]
        if len(rows) == 1:
            return [self._run(rows)[: rows[0].num_logits]]
        results: dict[int, Float32] = {}
        for group in self._groups(rows):
            logits = self._decode(group) if _are_decoding_neighbours(group) else self._run(group)
            start = 0
            for row in group:
                results[row.slot.index] = logits[start : start + row.num_logits]
                start += row.num_logits
        return [results[row.slot.index] for row in rows]

    def read(self, piece: Piece, *, logits: Float32 | None = None) -> tuple[Float32, Float32]:
        """Feeds the texts of a piece their tokens; see `PieceReader.read`."""
        return self._reader.read(piece, logits=logits)

    @property
    def logit_width(self) -> int:
        """The length of a row of logits: labels of a classifier, else the vocabulary."""
        return self._reader.logit_width

    def empty_logits(self, count: int) -> Float32:
        """Memory for `count` rows of logits."""
        return self._reader.empty_logits(count)

    @property
    def network_seconds(self) -> float:
        """Time spent inside session calls so far, of all threads that made some together."""
        return self._meter.seconds

    @property
    def num_calls(self) -> int:
        """Session calls so far."""
        return self._meter.num_calls

    @property
    def suits_lanes(self) -> bool:
        """Whether texts had better be read side by side, each by one thread, if there are several."""
        return self.architecture.head is not Head.CAUSAL_LM and self._layer_bytes <= _MOST_LANE_BYTES

    @property
    def num_lanes(self) -> int:
        """How many texts are read side by side; 1 if all threads share every call."""
        is_possible = self._providers == (CPU_PROVIDER,) and self._threads <= _MOST_LANES
        return self._threads if is_possible and self.suits_lanes else 1

    def lanes(self) -> list[PieceReader]:
        """So many readers for as many threads, on a session that packs the weights once more."""
        if self._lane_session is None:
            self._lane_session = self._open(self._graph, threads=1)
        return [self._piece_reader(self._lane_session) for _ in range(self.num_lanes)]

    def _piece_reader(self, session: onnxruntime.InferenceSession) -> PieceReader:
        return PieceReader(
            session,
            self.architecture,
            is_selective=self._is_selective,
            num_positions=self._num_positions,
            meter=self._meter,
        )

    def close(self) -> None:
        """Releases sessions, weights and cache; nothing can be run afterwards."""
        self._kept.clear()
        self._decoding.clear()
        self._held.clear()
        self._stepwise_session = self._lane_session = None
        del self._session, self._reader, self._prompt_session, self._open, self._decode_logits
        self.cache.close()

    def _shortened(self, row: Row) -> Row:
        """What is left of a row to be fed once all of it but a last piece was."""
        kind = _Kind.of(row)
        if kind is _Kind.TOKEN or self._is_stepwise(kind):
            return row
        *leading, last = pieces(row.token_ids, self._most_new_tokens)
        # Those with more logits verify drafts, which without a stepwise graph equal no single tokens anyway.
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
                is_alike = (count == 1) == (longest == 1) and _Kind.of(row) is _Kind.of(group[-1])
                if is_neighbour and pays and fits and is_alike:
                    group.append(row)
                    longest, num_tokens = max(longest, count), num_tokens + count
                    continue
            groups.append([row])
            longest, num_tokens = count, count
        return groups

    def _is_stepwise(self, kind: _Kind) -> bool:
        return kind is _Kind.DRAFTS and self._is_batch_invariant and self._stepwise is not None

    def _decode(self, rows: Sequence[Row]) -> Float32:
        """Feeds neighbours one token each; their logits, and maybe further rows."""
        first, count = rows[0].slot.index, len(rows)
        key = (first, count, self._is_batch_invariant)
        call = self._decoding.get(key)
        if call is None:
            shape = CallShape(count, 1, count)
            if self._is_batch_invariant:
                shape = self._pairs.padded(shape, has_room=False)
            logits = self._decode_logits[first : first + shape.positions]
            call = Call(
                self._session,
                self._layers(first, shape),
                shape=(shape.places, 1),
                logits=logits,
                states=self._no_states,
                num_rows=count,
                is_decode=True,
            )
            _keep(self._decoding, key, call)
        call.fill_tokens(rows)
        self._meter.execute(call)
        for row in rows:
            row.slot.length += 1
        assert call.logits is not None
        return call.logits

    def _run(self, rows: Sequence[Row]) -> Float32:
        call = self._call(rows[0].slot.index, rows)
        call.fill_rows(rows)
        self._meter.execute(call)
        for row in rows:
            row.slot.length += len(row.token_ids)
        assert call.logits is not None, "rows with slots are for language models"
        return call.logits

    def _call(self, first: int, rows: Sequence[Row]) -> Call:
        """Bindings for these rows; those of small calls that come again and again are kept."""
        kind = _Kind.of(rows[0])
        pairs = self._prompt_pairs if kind is _Kind.TEXT else self._pairs
        longest = max(len(row.token_ids) for row in rows)
        num_logits = sum(row.num_logits for row in rows)
        most = max(row.slot.length for row in rows) + longest
        shape = CallShape(len(rows), longest, num_logits)
        if self._is_batch_invariant:
            shape = pairs.padded(shape, has_room=most < self.cache.capacity)
        is_stepwise = self._is_stepwise(kind)
        key = (first, len(rows), shape, kind, is_stepwise)
        if key in self._kept:
            return self._kept[key]
        logits = np.empty((shape.positions, self.architecture.vocab_size), np.float32)
        session = self._prompt_session if kind is _Kind.TEXT else self._session
        make: Callable[..., Call] = partial(Call, session)
        if is_stepwise:
            assert self._stepwise is not None
            make = partial(StepwiseCall, self._stepwise_session, num_steps=self._stepwise.num_steps)
        call = make(
            self._layers(first, shape),
            shape=(shape.places, shape.width),
            logits=logits,
            states=self._no_states,
            num_rows=len(rows),
        )
        if len(rows) == 1 and longest <= _MAX_KEPT_TOKENS and longest in (num_logits, 2):
            _keep(self._kept, key, call)
        return call

    def _layers(self, first: int, shape: CallShape) -> Layers:
        """Keys and values of the slots from `first` on."""
        end = first + shape.places
        return [(keys[first:end], values[first:end]) for keys, values in self.cache.layers]


def _are_decoding_neighbours(rows: Sequence[Row]) -> bool:
    """Whether every row brings one token and wants its logits, and their slots are neighbours, in order."""
    for index, row in enumerate(rows, rows[0].slot.index if rows else 0):
        is_decoding = len(row.token_ids) == 1 == row.num_logits and not row.is_prompt
        if not is_decoding or row.slot.index != index:
            return False
    return bool(rows)


def _keep(calls: dict[_Key, Call], key: _Key, call: Call) -> None:
    """Keeps a call, in place of the oldest one if there are many."""
    if len(calls) == _MAX_KEPT_CALLS:
        del calls[next(iter(calls))]
    calls[key] = call
