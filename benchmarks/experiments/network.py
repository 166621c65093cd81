"""One session of an altered graph with its caches, fed and read in the way under test.

It repeats in a few lines what the package's runtime does for one sequence, with everything open that an
experiment may want to change; the experiment `the package's own runtime` shows that the two cost the same.

Legend: S new tokens, M = 1 logit row, N = 0 state rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.experiments.heads import NUM_CANDIDATES
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import KVCache
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.selection import Workspace, log_sum_exp, top_k_ids

CONTEXT = 1024
Outputs = Mapping[str, NDArray[Any]]
Reader = Callable[[Outputs, Workspace], int]

# Logits of one position are asked for, and no states.
_ROWS = {"M": 1, "N": 0}
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Feeding(Enum):
    """How inputs and outputs reach the session."""

    BOUND = "bound once, written in place"
    REBOUND = "bound anew for every call"
    ARRAYS = "session.run with arrays, caches returned as new ones"


# How long idle threads spin before they sleep, as the package sets it.
SPINNING: Final = ("session.intra_op.spin_duration_us", "1000")


@dataclass(frozen=True)
class Settings:
    """Everything about a session but its graph; the defaults are what the package sets.

    Attributes:
        threads: of the session's kernels, the calling thread included.
        optimization: name of a GraphOptimizationLevel.
        entries: session configuration entries.
        feeding: how inputs and outputs reach the session.
        only_path_to_fetches: run option `only_execute_path_to_fetches`.
        has_arena: whether the session's allocator keeps memory.
        profile_prefix: path prefix of a profile to write.
    """

    threads: int
    optimization: str = "ORT_ENABLE_BASIC"
    entries: tuple[tuple[str, str], ...] = (SPINNING,)
    feeding: Feeding = Feeding.BOUND
    only_path_to_fetches: bool = False
    has_arena: bool = True
    profile_prefix: str | None = None


def greedy(outputs: Outputs, workspace: Workspace) -> int:
    """The best token, from all logits: what greedy decoding does."""
    return int(outputs["logits"][0].argmax())


def greedy_in_graph(outputs: Outputs, workspace: Workspace) -> int:
    """The token that the graph chose."""
    return int(outputs["token"].ravel()[0])


def candidates(outputs: Outputs, workspace: Workspace) -> int:
    """Top-k candidates and the log-sum that log-probabilities need, from all logits."""
    row = outputs["logits"][0]
    leading = top_k_ids(row, NUM_CANDIDATES)
    log_sum_exp(row, row[leading[0]], scratch=workspace.weights)
    return int(leading[0])


def candidates_in_graph(outputs: Outputs, workspace: Workspace) -> int:
    """Candidates and log-sum as the graph computed them."""
    float(outputs["log_sum"][0, 0])
    return int(outputs["ids"][0, 0])


def candidates_with_log_sum(outputs: Outputs, workspace: Workspace) -> int:
    """Candidates from all logits, the log-sum as the graph computed it."""
    float(outputs["log_sum"][0, 0])
    return int(top_k_ids(outputs["logits"][0], NUM_CANDIDATES)[0])


class Network:
    """A session and one sequence."""

    def __init__(
        self,
        architecture: DecoderArchitecture,
        graph: bytes,
        weights: Mapping[str, NDArray[Any]],
        settings: Settings,
        *,
        reader: Reader = greedy,
    ) -> None:
        self.settings = settings
        self._reader = reader
        self._workspace = Workspace(architecture.vocab_size)
        self._held = [np.asarray(array) for array in weights.values()]
        self.session = _session(graph, list(weights), self._held, settings)
        self._cache = KVCache(architecture, num_slots=1, capacity=CONTEXT)
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = settings.only_path_to_fetches
        self._caches = {
            f"{name}.{i}": array[:1]  # without the spare place
            for i, layer in enumerate(self._cache.layers)
            for name, array in zip(("key", "value"), layer, strict=True)
        }
        self._calls: dict[int, _Call] = {}
        self.length = 0

    def prefill(self, ids: Sequence[int]) -> int:
        """A new sequence; returns its first token."""
        self.length = 0
        return self.step(ids)

    def step(self, ids: Sequence[int]) -> int:
        """Feeds the next tokens; returns the one that the reader takes."""
        count = len(ids)
        if count not in self._calls:
            self._calls[count] = _Call(self.session, count, self._caches)
        call = self._calls[count]
        self.length += count
        call.fill(ids, self.length)
        match self.settings.feeding:
            case Feeding.ARRAYS:
                self._run_with_arrays(call)
            case Feeding.REBOUND:
                call.bind()
                self.session.run_with_iobinding(call.binding, self._options)
            case Feeding.BOUND:
                self.session.run_with_iobinding(call.binding, self._options)
        return self._reader(call.outputs, self._workspace)

    def outputs(self, count: int) -> Outputs:
        """What the last call with `count` tokens put out, caches apart."""
        return self._calls[count].outputs

    def close(self) -> None:
        """Releases session and caches."""
        self._calls.clear()
        self._caches.clear()
        del self.session, self._cache
        self._held.clear()

    def _run_with_arrays(self, call: _Call) -> None:
        feeds = {**call.inputs, **{f"past_{name}": array for name, array in self._caches.items()}}
        names = [each.name for each in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds, self._options), strict=True):
            if name.startswith("present_"):
                self._caches[name.removeprefix("present_")] = array
            else:
                call.outputs[name] = array


class PackageNetwork:
    """The package's runtime behind the same two verbs."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._slot = runtime.cache.allocate()

    def prefill(self, ids: Sequence[int]) -> int:
        self._runtime.cache.free(self._slot)
        self._slot = self._runtime.cache.allocate()
        return self.step(ids)

    def step(self, ids: Sequence[int]) -> int:
        return int(self._runtime.step([Row(self._slot, ids)])[0][0].argmax())

    def close(self) -> None:
        self._runtime.close()


class _Call:
    """Arrays and bindings for calls with `count` new tokens of the one sequence."""

    def __init__(
        self, session: onnxruntime.InferenceSession, count: int, caches: Mapping[str, NDArray[Any]]
    ) -> None:
        self._session, self._caches = session, caches
        shapes = {each.name: len(each.shape) for each in session.get_inputs()}
        self.inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.zeros((1, count) if shapes["input_ids"] == 2 else count, np.int64),
            "last_positions": np.zeros(1, np.int32),
            "longest": np.zeros((), np.int32),
            "query_lengths": np.full(1, count, np.int32),
            "kept_positions": np.full(1, count - 1, np.int64),
            "logit_positions": np.zeros(1, np.int64),
            "state_positions": np.zeros(0, np.int64),
        }
        if "valid_tokens" in shapes:
            self.inputs["valid_tokens"] = np.arange(count)
            self.inputs["padded_tokens"] = np.arange(count)[None]
        self.outputs: dict[str, NDArray[Any]] = {
            each.name: np.empty([_ROWS.get(size, size) for size in each.shape], _TYPES[each.type])
            for each in session.get_outputs()
            if not each.name.startswith("present_")
        }
        self.bind()

    def bind(self) -> None:
        """Binds every array anew."""
        self.binding = self._session.io_binding()
        for name, array in self.inputs.items():
            self.binding.bind_ortvalue_input(name, _value(array))
        for name, array in self.outputs.items():
            self.binding.bind_ortvalue_output(name, _value(array))
        for name, array in self._caches.items():
            value = _value(array)
            self.binding.bind_ortvalue_input(f"past_{name}", value)
            self.binding.bind_ortvalue_output(f"present_{name}", value)

    def fill(self, ids: Sequence[int], total: int) -> None:
        """Writes what changes from call to call."""
        self.inputs["input_ids"][...] = ids
        self.inputs["last_positions"][0] = total - 1
        self.inputs["longest"][...] = total


def _value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _session(
    graph: bytes, names: list[str], arrays: list[NDArray[Any]], settings: Settings
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, settings.optimization)
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = settings.has_arena
    for key, value in settings.entries:
        options.add_session_config_entry(key, value)
    if settings.profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = settings.profile_prefix
    options.add_external_initializers(names, [_value(array) for array in arrays])
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
