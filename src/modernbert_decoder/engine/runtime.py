"""One ONNX Runtime session and the cache it works on, with one verb: `step(rows)`.

A row is a slot and its new tokens: a whole prompt, a chunk of one, or a single token. `step` groups rows into
as few session calls as pay: single tokens of neighbouring slots share a call, prompts share one when padding
them to equal length costs little. Which tokens to feed is the scheduler's business, which token comes next
the sampler's.

Legend: B rows of a call, S new tokens per row (right-padded), M logit rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.engine.kv_cache import KVCache, Slot
from modernbert_decoder.errors import InputError

Float32 = NDArray[np.float32]

# Prompts share a call while padding adds at most this share of tokens.
_MAX_PADDING: Final = 0.15
# Bound calls kept for reuse: one per number of decoding rows, in the steady state just one.
_MAX_KEPT_CALLS: Final = 32


@dataclass(slots=True)
class Row:
    """New tokens for a slot; logits are wanted for the last `num_logits` of them."""

    slot: Slot
    token_ids: Sequence[int]
    num_logits: int = 1


class Runtime:
    """The session of one model and its cache.

    Args:
        architecture: of the model.
        graph: from `build_graph`, for at least `context_length` positions.
        weights: initializer name -> array; kept alive and shared, not copied, where the kernels allow it.
        num_slots: most requests at a time.
        context_length: most tokens per request.
        threads: for the session's kernels.
        providers: ONNX Runtime execution providers.

    Attributes:
        cache: the slots.
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
    ) -> None:
        self.architecture = architecture
        self.cache = KVCache(architecture, num_slots=num_slots, capacity=context_length)
        self.network_seconds = 0.0
        self.num_calls = 0
        self._held = [np.asarray(array) for array in weights.values()]
        self._session = _session(graph, list(weights), self._held, threads=threads, providers=providers)
        self._kept: dict[tuple[int, int], _Call] = {}
        # One row of logits per slot for all single-token calls; other calls bring rows of their own.
        self._decode_logits = np.empty((num_slots, architecture.vocab_size), np.float32)

    def step(self, rows: Sequence[Row]) -> list[Float32]:
        """Feeds every row its tokens and returns its logits (num_logits, V), valid until the next step."""
        if len(rows) == 1:
            return [self._run(rows)]
        results: dict[int, Float32] = {}
        for group in self._groups(rows):
            logits = self._run(group)
            start = 0
            for row in group:
                results[row.slot.index] = logits[start : start + row.num_logits]
                start += row.num_logits
        return [results[row.slot.index] for row in rows]

    def close(self) -> None:
        """Releases session, weights and cache; nothing can be run afterwards."""
        self._kept.clear()
        self._held.clear()
        del self._session, self._decode_logits
        self.cache.layers.clear()

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
        call.fill(rows)
        started = time.perf_counter()
        self._session.run_with_iobinding(call.binding)
        self.network_seconds += time.perf_counter() - started
        self.num_calls += 1
        for row in rows:
            row.slot.length += len(row.token_ids)
        return call.logits

    def _call(self, first: int, rows: Sequence[Row]) -> _Call:
        """Bindings for these rows; those of single-token calls are kept for the next step."""
        is_decode = all(len(row.token_ids) == 1 and row.num_logits == 1 for row in rows)
        key = (first, len(rows))
        if is_decode and key in self._kept:
            return self._kept[key]
        longest = max(len(row.token_ids) for row in rows)
        num_logits = sum(row.num_logits for row in rows)
        if is_decode:
            logits = self._decode_logits[first : first + len(rows)]
        else:
            # Kernels want at least one row: where none is asked for, one is computed and not given back.
            logits = np.empty((max(1, num_logits), self.architecture.vocab_size), np.float32)
        call = _Call(self._session, self.cache, logits, first=first, shape=(len(rows), longest, num_logits))
        if is_decode:
            if len(self._kept) == _MAX_KEPT_CALLS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = call
        return call


class _Call:
    """Bindings of inputs, `logits` and caches for `shape` = (B, S, M) and B slots from `first` on."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        cache: KVCache,
        logits: Float32,
        *,
        first: int,
        shape: tuple[int, int, int],
    ) -> None:
        num_rows, longest, num_logits = shape
        self.input_ids = np.zeros((num_rows, longest), np.int64)
        self.last_positions = np.zeros(num_rows, np.int32)
        self.longest = np.zeros((), np.int32)
        self.query_lengths = np.ones(num_rows, np.int32)
        self.logit_positions = np.zeros(len(logits), np.int64)
        self.logits = logits[:num_logits]
        self._is_decode = longest == 1 and num_logits == num_rows
        if self._is_decode:
            self.logit_positions[:] = range(num_rows)
        self.binding = session.io_binding()
        self._bind_inputs()
        self.binding.bind_ortvalue_output("logits", _value(logits))
        for index, (keys, values) in enumerate(cache.layers):
            for name, array in (("key", keys), ("value", values)):
                value = _value(array[first : first + num_rows])
                self.binding.bind_ortvalue_input(f"past_{name}.{index}", value)
                self.binding.bind_ortvalue_output(f"present_{name}.{index}", value)

    def _bind_inputs(self) -> None:
        for name in ("input_ids", "last_positions", "longest", "query_lengths", "logit_positions"):
            self.binding.bind_ortvalue_input(name, _value(getattr(self, name)))

    def fill(self, rows: Sequence[Row]) -> None:
        """Writes what changes from step to step into the bound arrays."""
        longest = 0
        if self._is_decode:
            for i, row in enumerate(rows):
                length = row.slot.length
                self.input_ids[i, 0] = row.token_ids[0]
                self.last_positions[i] = length
                if length >= longest:
                    longest = length + 1
        else:
            start, width = 0, self.input_ids.shape[1]
            for i, row in enumerate(rows):
                count = len(row.token_ids)
                self.input_ids[i, :count] = row.token_ids
                self.query_lengths[i] = count
                self.last_positions[i] = row.slot.length + count - 1
                longest = max(longest, row.slot.length + count, width)
                end = i * width + count
                self.logit_positions[start : start + row.num_logits] = range(end - row.num_logits, end)
                start += row.num_logits
        self.longest[...] = longest


def _value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """The array's own memory as a runtime value."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _session(
    graph: bytes,
    names: list[str],
    arrays: list[NDArray[Any]],
    *,
    threads: int,
    providers: Sequence[str],
) -> onnxruntime.InferenceSession:
    missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise InputError(
            f"execution provider {missing[0]} is not in this build of ONNX Runtime; "
            f"available: {', '.join(onnxruntime.get_available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The graph is built fused; the extended optimizations would only undo what was measured to be faster.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    # Threads spin within a call, not between calls: a second session or the sampler needs the processor.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_external_initializers(names, [_value(array) for array in arrays])
    return onnxruntime.InferenceSession(graph, options, providers=list(providers))
