"""Where the time of a call goes, node by node, from ONNX Runtime's own profiler.

Nodes are grouped by what they compute: products by their weight, attention by its window. It knows the
profile's format and the graph's names; the session comes from network.py.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from benchmarks.experiments.catalogue import FORMATS
from benchmarks.experiments.graphs import Shipped, build
from benchmarks.experiments.models import Model
from benchmarks.experiments.network import Network, Settings
from modernbert_decoder.costs import EMBEDDING
from modernbert_decoder.quantization import QuantizationScheme

BETWEEN_NODES = "between nodes"
_LAYER = re.compile(r"^model\.(layers\.\d+\.)?")
_PREFILLS = 6
_STEPS = 60


@dataclass(frozen=True)
class Kind:
    """Nodes that compute the same thing in different layers; seconds of all of them per call."""

    name: str
    num_nodes: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """The calls of one network: `seconds` is the median call with the profiler on."""

    size: str
    format: str
    what: str
    seconds: float
    kinds: list[Kind]


def profile(size: str, fmt: str, model: Model, *, threads: int, prompt: Sequence[int]) -> list[Profile]:
    """Decode steps of one token behind the prompt, and prefills of the prompt."""
    scheme = QuantizationScheme.named(*FORMATS[fmt])
    graph, weights = build(
        Shipped,
        model.architecture,
        scheme,
        model.weights(scheme),
        model.tensor,
        num_positions=model.num_positions,
    )
    with TemporaryDirectory() as folder:
        settings = Settings(threads, profile_prefix=str(Path(folder) / "profile"))
        network = Network(model.architecture, graph, weights, settings)
        token = 0
        for _ in range(_PREFILLS):
            token = network.prefill(prompt)
        for _ in range(_STEPS):
            token = network.step((token,))
        events = json.loads(Path(network.session.end_profiling()).read_text(encoding="utf-8"))
        network.close()
    names = node_kinds(graph)
    calls = calls_of(events)
    assert len(calls) == _PREFILLS + _STEPS
    # The first calls of either kind allocate and warm up.
    return [
        Profile(size, fmt, "decode", *summary(calls[_PREFILLS + _STEPS // 6 :], names)),
        Profile(size, fmt, f"prefill of {len(prompt)}", *summary(calls[_PREFILLS // 3 : _PREFILLS], names)),
    ]


def node_kinds(graph: bytes) -> dict[str, str]:
    """Node name -> what it computes."""
    kinds = {}
    for node in onnx.load_model_from_string(graph).graph.node:
        kinds[node.name] = node.op_type
        if node.op_type in ("MatMulNBits", "FusedMatMul"):
            weight = node.input[1].removesuffix(".data").removesuffix(".weight")
            role = "vocabulary" if EMBEDDING.startswith(weight) else _LAYER.sub("", weight)
            kinds[node.name] = f"{node.op_type} {role}"
        elif node.op_type == "GroupQueryAttention":
            is_sliding = any(attribute.name == "local_window_size" for attribute in node.attribute)
            kinds[node.name] = f"{node.op_type} {'sliding' if is_sliding else 'full'}"
    return kinds


def calls_of(events: Iterable[Mapping[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """Seconds of every call in order, and seconds of its kernels by node name."""
    runs: list[tuple[int, int, dict[str, float]]] = []
    kernels: list[tuple[int, str, int]] = []
    for event in events:
        name = event["name"]
        if name == "model_run":
            runs.append((event["ts"], event["ts"] + event["dur"], {}))
        elif event.get("cat") == "Node" and name.endswith("_kernel_time"):
            kernels.append((event["ts"], name.removesuffix("_kernel_time"), event["dur"]))
    runs.sort(key=lambda run: run[0])
    kernels.sort()
    place = 0
    for time, name, duration in kernels:
        while time > runs[place][1]:
            place += 1
        found = runs[place][2]
        found[name] = found.get(name, 0.0) + duration / 1e6
    return [((end - start) / 1e6, found) for start, end, found in runs]


def summary(
    calls: Sequence[tuple[float, Mapping[str, float]]], names: Mapping[str, str]
) -> tuple[float, list[Kind]]:
    """The median call, and what its nodes take by kind, longest first; the rest is between nodes.

    >>> summary([(1.0, {"a": 0.25, "b": 0.25})], {"a": "Add", "b": "Add"})[1][0]
    Kind(name='Add', num_nodes=2, seconds=0.5, share=0.5)
    """
    total = statistics.median(seconds for seconds, _ in calls)
    nodes: dict[str, list[str]] = defaultdict(list)
    for name in calls[0][1]:
        # Names that an optimization introduced are kept as they are.
        nodes[names.get(name, name)].append(name)
    kinds = []
    for kind, members in nodes.items():
        seconds = statistics.median(sum(found[name] for name in members) for _, found in calls)
        kinds.append(Kind(kind, len(members), seconds, seconds / total))
    kinds.sort(key=lambda kind: -kind.seconds)
    rest = max(0.0, total - sum(kind.seconds for kind in kinds))
    return total, [*kinds, Kind(BETWEEN_NODES, sum(kind.num_nodes for kind in kinds), rest, rest / total)]
