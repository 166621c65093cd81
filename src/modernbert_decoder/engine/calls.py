"""The calls of a session: what each kind is fed, and the arrays it is bound to.

This module knows the inputs of each kind of graph; which call is due is the runtime's business.

Legend: B rows of a call, S new tokens per row (right-padded), M logit rows, N state rows, V vocabulary or
labels, C model width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike, NDArray

from modernbert_decoder.engine.kv_cache import Float32, Layers, Slot
from modernbert_decoder.engine.selective import ScratchPair, Selection, append, past_of
from modernbert_decoder.engine.session import shared_value


@dataclass(slots=True)
class Row:
    """New tokens for a slot.

    Attributes:
        slot: where they go.
        token_ids: at least one.
        num_logits: for so many of the last ones logits are wanted.
        is_prompt: whether they are of a prompt, even if it is a single one; several with one row of logits or
            none are in any case.
    """

    slot: Slot
    token_ids: Sequence[int]
    num_logits: int = 1
    is_prompt: bool = False


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
        kept: what pieces of the same `layers` share, by their shape: calls that can be filled anew.
    """

    layers: Layers
    token_ids: Sequence[Sequence[int]]
    num_past: Sequence[int] | NDArray[np.integer[Any]]
    logit_positions: Sequence[int] = ()
    state_positions: Sequence[int] = ()
    is_last: bool = False
    kept: dict[tuple[int, int], SelectiveCall] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return len(self.token_ids), max(map(len, self.token_ids))

    @property
    def asks_for_nothing(self) -> bool:
        """Whether it is only read for the sake of what comes behind it."""
        return not (len(self.logit_positions) or len(self.state_positions))


class Call:
    """Bindings of inputs, outputs and caches for `shape` = (B, S) tokens.

    Of the B rows those behind the first `num_rows` have no tokens: nothing is read or written there. Logits
    behind those that were asked for are of any position.

    Attributes:
        session: that they are for.
        logits: (M, V), or None where the model has no head.
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
        if is_decode:  # every row brings one token and wants its logits
            self.logit_positions[:num_rows] = range(num_rows)
        self.session = session
        self.binding = session.io_binding()
        self.binding.bind_ortvalue_output("states", shared_value(states))
        if logits is not None:
            self.binding.bind_ortvalue_output("logits", shared_value(logits))
        inputs = self._positions()
        if logits is None:
            del inputs["logit_positions"]
        inputs |= {"input_ids": self.input_ids, **self._lengths()}
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, shared_value(array))
        for index, layer in enumerate(layers):
            for name, array in zip(("key", "value"), layer, strict=True):
                value = shared_value(array)
                self.binding.bind_ortvalue_input(f"past_{name}.{index}", value)
                for place in self._places_of_outputs():
                    self.binding.bind_ortvalue_output(f"present_{name}.{index}{place}", value)

    def _lengths(self) -> dict[str, NDArray[Any]]:
        """The inputs that say how long the texts are, and how many of their tokens are new."""
        return {name: getattr(self, name) for name in ("last_positions", "longest", "query_lengths")}

    def _places_of_outputs(self) -> Sequence[str]:
        """What the names of outputs with keys and values end in."""
        return ("",)

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


class Meter:
    """Carries out calls, of any thread, and counts them.

    Attributes:
        seconds: that they took, of all threads together.
        num_calls: how many there were.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_calls = 0
        self._lock = threading.Lock()

    def execute(self, call: Call) -> None:
        """Runs the session on what the call is bound to."""
        started = time.perf_counter()
        call.session.run_with_iobinding(call.binding)
        seconds = time.perf_counter() - started
        with self._lock:
            self.seconds += seconds
            self.num_calls += 1


class SelectiveCall(Call):
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
        self._num_positions = num_positions
        num_rows, longest = piece.shape
        self._token_places = np.empty(piece.shape, np.int64)
        self._is_token = np.empty((num_rows, longest, 1), np.bool_)
        selection = self.refill(piece)
        past = past_of(last, selection.num_past)
        new_shape = (num_rows, last[0].shape[1], longest, last[0].shape[3])
        self._new = new.pair(new_shape)
        index = len(layers)
        inputs = {
            "selected": selection.selected,
            "positions": self._token_places,
            "selected_positions": selection.selected_positions,
            "visible": selection.visible(),
            "num_keys": np.array([selection.num_past, longest]),
            "is_token": self._is_token,
            f"past_key.{index}": past[0],
            f"past_value.{index}": past[1],
        }
        self._bound = tuple(inputs.values())  # so that they live as long
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, shared_value(array))
        for name, array in zip(("key", "value"), self._new, strict=True):
            self.binding.bind_ortvalue_output(f"present_{name}.{index}", shared_value(array))
        num_logits = len(piece.logit_positions)
        self.state_positions[:] = selection.found[num_logits:]
        if logits is not None:
            self.logit_positions[:] = selection.found[:num_logits]

    def _positions(self) -> dict[str, NDArray[Any]]:
        return {"logit_positions": self.logit_positions, "state_positions": self.state_positions}

    def refill(self, piece: Piece) -> Selection:
        """Writes the tokens of a piece into the bound arrays; returns what it asks for.

        Of another piece than the call was made for, with the same shape and layers, if both ask for nothing.
        """
        self._num_past = np.asarray(piece.num_past, np.int64)
        self._fill(piece.token_ids, self._num_past)
        wanted = [*piece.logit_positions, *piece.state_positions]
        selection = Selection(wanted, piece.shape, self._num_past, num_positions=self._num_positions)
        self._token_places[:] = selection.positions
        self._is_token[:] = selection.is_token(self.query_lengths)
        return selection

    def keep(self) -> None:
        """Writes the last layer's new keys and values behind the past ones, once they are computed."""
        append(self._last, self._new, self._num_past)


class Stepwise(NamedTuple):
    """What gives a stepwise graph when it is needed, and how many tokens of a row that takes."""

    build: Callable[[], bytes]
    num_steps: int


class StepwiseCall(Call):
    """Several tokens per row for a stepwise graph, which has lengths for each place in a row."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        layers: Layers,
        *,
        num_steps: int,
        shape: tuple[int, int],
        logits: Float32,
        states: Float32,
        num_rows: int,
    ) -> None:
        num_places, width = shape
        assert width <= num_steps, (width, num_steps)
        # By place and row: where the token is in its text, and whether there is one.
        self._ends = np.zeros((num_steps, num_places), np.int32)
        self._counts = np.zeros((num_steps, num_places), np.int32)
        self._longest = np.ones(num_steps, np.int32)
        self._token_places = np.arange(width)
        self._tokens = np.zeros(num_steps, np.int64)
        self._tokens[:width] = self._token_places
        super().__init__(session, layers, shape=shape, logits=logits, states=states, num_rows=num_rows)

    def fill_rows(self, rows: Sequence[Row]) -> None:
        """Writes tokens, and where each is in its text, into the bound arrays."""
        super().fill_rows(rows)
        steps = np.arange(len(self._longest))[:, None]
        counts, ends = self._counts[:, : len(rows)], self._ends[:, : len(rows)]
        counts[:] = steps < [len(row.token_ids) for row in rows]
        ends[:] = (steps + [row.slot.length for row in rows]) * counts
        self._longest[:] = ends.max(axis=1) + 1

    def _lengths(self) -> dict[str, NDArray[Any]]:
        lengths: dict[str, NDArray[Any]] = {"places": self._tokens, "token_places": self._token_places}
        for j in range(len(self._longest)):
            lengths[f"last_positions.{j}"] = self._ends[j]
            lengths[f"longest.{j}"] = self._longest[j : j + 1].reshape(())
            lengths[f"query_lengths.{j}"] = self._counts[j]
        return lengths

    def _places_of_outputs(self) -> Sequence[str]:
        return [f".{j}" for j in range(len(self._longest))]
