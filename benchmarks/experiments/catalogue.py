"""The experiments: what each changes, where it is measured, and why the package does or does not do it.

Data only. A reason says what holds whatever the numbers; the numbers stand beside it in the table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.experiments import graphs, heads
from benchmarks.experiments.measure import SETTLE_SECONDS
from benchmarks.experiments.network import (
    SPINNING,
    Feeding,
    Reader,
    candidates,
    candidates_in_graph,
    candidates_with_log_sum,
    greedy,
    greedy_in_graph,
)
from modernbert_decoder.quantization import QuantizationScheme

# As the tables name them -> dtype, vocabulary_dtype.
FORMATS: Mapping[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "int8": ("int8", None),
    "int4": ("int4", "int4"),
}
CONTROL = "Controls"
# How the names of the experiments begin that change nothing.
SELF = "nothing, "
_BOTH = ("int8", "int4")
_INT8 = ("int8",)
_MORE_SCALES = "Left: more scales to read."
# Threads that nothing stops spin for some 40 ms after a call.
_SPINNING_SECONDS = 0.2


@dataclass(frozen=True)
class Experiment:
    """One change of the shipped configuration.

    Attributes:
        name: as in the table.
        why: what follows for the package.
        group: the table it belongs to.
        formats: of the weights, where it is measured.
        graph: the altered graph.
        settings: fields of `Settings` that differ.
        body_block, vocabulary_block: block sizes that differ.
        reader: how the answer is read, and `shipped_reader` how it is read of the shipped graph.
        pins_caller: whether the calling thread is bound to one processor, the other thread to the next.
        is_package: the package's own runtime, to be compared with this harness.
        settle_seconds: of idleness between turns.
    """

    name: str
    why: str
    group: str
    formats: tuple[str, ...] = _BOTH
    graph: type[graphs.Shipped] = graphs.Shipped
    settings: Mapping[str, Any] = field(default_factory=dict)
    body_block: int | None = None
    vocabulary_block: int | None = None
    reader: Reader = greedy
    shipped_reader: Reader = greedy
    pins_caller: bool = False
    is_package: bool = False
    settle_seconds: float = SETTLE_SECONDS

    def scheme(self, shipped: QuantizationScheme) -> QuantizationScheme:
        """The formats of the weights, from the shipped ones."""
        body, vocabulary = shipped.body, shipped.vocabulary
        if self.body_block:
            body = replace(body, block_size=self.body_block)
        if self.vocabulary_block:
            vocabulary = replace(vocabulary, block_size=self.vocabulary_block)
        return QuantizationScheme(body, vocabulary)


def processors() -> list[int]:
    """The processors this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pinned_entries() -> tuple[tuple[str, str], ...]:
    """Configuration that binds every thread but the calling one to a processor, from the second on."""
    places = ";".join(str(each + 1) for each in processors()[1:])  # counted from 1
    return (SPINNING, ("session.intra_op_thread_affinities", places))


SHIPPED = Experiment("shipped", "What the package does.", CONTROL, formats=tuple(FORMATS))

CONTROLS = (
    *(
        Experiment(
            f"{SELF}{time}: the shipped configuration against itself",
            "What the method cannot tell apart: no smaller difference is a finding.",
            CONTROL,
            formats=tuple(FORMATS),
        )
        for time in ("first time", "second time")
    ),
    Experiment(
        "the package's own runtime",
        "The harness feeds and reads as the package does; they should not differ.",
        CONTROL,
        is_package=True,
    ),
)

GRAPH = (
    Experiment(
        "q, k and v as three products",
        "Left: the same sums in more nodes, and the activations quantized three times.",
        "The graph",
        graph=graphs.SplitAttentionInput,
    ),
    Experiment(
        "the two halves of Wi as two products",
        "Left: saves the node that splits, adds a product and a second quantization of the activations.",
        "The graph",
        graph=graphs.SplitFeedForwardInput,
    ),
    Experiment(
        "Add and LayerNormalization fused (SkipLayerNormalization)",
        "Left: two nodes fewer per layer, but no faster, and slower in prefill.",
        "The graph",
        graph=graphs.FusedNorms,
    ),
    Experiment(
        "linear layers on packed tokens, gathered around each attention",
        "Left: it pays only where a call mixes chunks and decode rows, which the runtime calls apart.",
        "The graph",
        graph=graphs.PackedTokens,
    ),
)

PRODUCTS = (
    Experiment(
        "accuracy level 0",
        "Left: weights are unpacked to float32.",
        "The products",
        graph=graphs.AccuracyLevel0,
    ),
    Experiment(
        "accuracy level 1",
        "Left: as level 0.",
        "The products",
        graph=graphs.AccuracyLevel1,
    ),
    Experiment(
        "one scale per channel, DynamicQuantizeMatMul",
        "Left: one scale for all activations of a call, so that rows depend on their neighbours.",
        "The products",
        formats=_INT8,
        graph=graphs.PerChannel,
    ),
    Experiment(
        "one scale per channel, MatMulInteger",
        "Left: as DynamicQuantizeMatMul, in more nodes.",
        "The products",
        formats=_INT8,
        graph=graphs.PerChannelInteger,
    ),
    Experiment(
        "float32: MatMul on transposed matrices",
        "Left: needs a transposed copy of every matrix, the vocabulary's included.",
        "The products",
        formats=("float32",),
        graph=heads.TransposedFloat,
    ),
    Experiment(
        "embedding rows from a float32 table",
        "Left: four times the bytes of the matrix beside it, for one row per token.",
        "The products",
        formats=_INT8,
        graph=heads.FloatEmbedding,
    ),
    Experiment(
        "vocabulary matrix in two parts",
        "Left: the parts run one after the other and are copied together.",
        "The products",
        formats=_INT8,
        graph=heads.VocabularyInParts,
    ),
)

# Format, shipped block size, another one, and what follows.
_LAYER_BLOCKS = (
    *(("int8", 256, size, _MORE_SCALES) for size in (32, 64, 128)),
    *(("int4", 128, size, _MORE_SCALES) for size in (32, 64)),
    ("int4", 128, 256, "Left: it costs a third more perplexity in 4 bits."),
)
_VOCABULARY_BLOCKS = (
    *(("int8", 256, size, _MORE_SCALES) for size in (32, 64, 128)),
    ("int4", 64, 32, _MORE_SCALES),
    ("int4", 64, 128, "Left: 64 makes the 4.5 bits of Q4_0, which this format is compared with."),
    ("int4", 64, 256, "Left: as 128."),
)
BLOCKS = (
    *(
        Experiment(
            f"layers in blocks of {size}, instead of {shipped}",
            why,
            "Block sizes",
            formats=(fmt,),
            body_block=size,
        )
        for fmt, shipped, size, why in _LAYER_BLOCKS
    ),
    Experiment(
        "layers and vocabulary in blocks of 128, instead of 256",
        _MORE_SCALES,
        "Block sizes",
        formats=_INT8,
        body_block=128,
        vocabulary_block=128,
    ),
    *(
        Experiment(
            f"vocabulary in blocks of {size}, instead of {shipped}",
            why,
            "Block sizes",
            formats=(fmt,),
            vocabulary_block=size,
        )
        for fmt, shipped, size, why in _VOCABULARY_BLOCKS
    ),
)

SESSION = (
    *(
        Experiment(
            f"graph optimizations: {what}, instead of basic",
            why,
            "Session",
            formats=_INT8,
            settings={"optimization": f"ORT_{level}"},
        )
        for level, what, why in (
            ("DISABLE_ALL", "none", "Left: nothing to gain."),
            ("ENABLE_EXTENDED", "extended", "Left: it fuses the norms, see above."),
            ("ENABLE_ALL", "all", "Left: as extended."),
        )
    ),
    Experiment(
        "idle threads sleep at the end of a call",
        "Left: waking them costs the next step more than a millisecond of spinning costs others.",
        "Session",
        settings={"entries": (("session.force_spinning_stop", "1"),)},
    ),
    *(
        Experiment(
            f"idle threads spin for {microseconds:,} us",
            "Left: 1,000 us cover the sampling of most requests, and an idle model is soon quiet.",
            "Session",
            settings={"entries": ((SPINNING[0], str(microseconds)),)},
            settle_seconds=_SPINNING_SECONDS,
        )
        for microseconds in (300, 3000)
    ),
    Experiment(
        "idle threads spin for as long as ONNX Runtime lets them",
        "Left: a processor stays busy for some 40 ms after every call.",
        "Session",
        settings={"entries": ()},
        settle_seconds=_SPINNING_SECONDS,
    ),
    Experiment(
        "threads never spin",
        "Left: every node waits for a thread to wake.",
        "Session",
        settings={"entries": (("session.intra_op.allow_spinning", "0"),)},
    ),
    Experiment(
        "worker threads bound to processors",
        "Left: not for a library to decide: two processes would be bound to the same ones.",
        "Session",
        formats=_INT8,
        settings={"entries": pinned_entries()},
    ),
    Experiment(
        "worker threads and the calling thread bound to processors",
        "Left: as above, and the calling thread is the user's.",
        "Session",
        formats=_INT8,
        settings={"entries": pinned_entries()},
        pins_caller=True,
    ),
    Experiment(
        "one thread",
        "Left as the default; `threads=1` for those who want the other processors free.",
        "Session",
        settings={"threads": 1},
    ),
    Experiment(
        "no prepacking",
        "Left: kernels rearrange the weights at every call.",
        "Session",
        settings={
            "entries": (SPINNING, ("session.disable_prepacking", "1")),
        },
    ),
    Experiment(
        "no memory arena",
        "Left: every tensor between nodes is allocated anew.",
        "Session",
        formats=_INT8,
        settings={"has_arena": False},
    ),
    Experiment(
        "only_execute_path_to_fetches",
        "Left: every node of this graph leads to an output.",
        "Session",
        formats=_INT8,
        settings={"only_path_to_fetches": True},
    ),
    Experiment(
        "inputs and outputs bound anew for every call",
        "Left: bound calls are kept, one per number of decoding rows.",
        "Session",
        formats=_INT8,
        settings={"feeding": Feeding.REBOUND},
    ),
    Experiment(
        "session.run with arrays instead of bound buffers",
        f"Left: every call copies every cache, here of {1024:,} positions.",
        "Session",
        formats=_INT8,
        settings={"feeding": Feeding.ARRAYS},
    ),
)

READING = (
    Experiment(
        "greedy: ArgMax in the graph",
        "Left: logit bias, penalties and min_tokens need the logits, which numpy searches as fast.",
        "Reading the logits",
        formats=_INT8,
        graph=heads.GreedyInGraph,
        reader=greedy_in_graph,
    ),
    Experiment(
        "greedy: TopK of 1 in the graph",
        "Left: as ArgMax.",
        "Reading the logits",
        formats=_INT8,
        graph=heads.GreedyByTopK,
        reader=greedy_in_graph,
    ),
    Experiment(
        "top-k 64 with log-probabilities: TopK and ReduceLogSumExp in the graph",
        "Left: the selection in numpy looks only into the chunks that can matter.",
        "Reading the logits",
        formats=_INT8,
        graph=heads.CandidatesInGraph,
        reader=candidates_in_graph,
        shipped_reader=candidates,
    ),
    Experiment(
        "top-k 64 with log-probabilities: maximum and sum of exponentials in the graph",
        "Left: every request would pay for what few ask for, prompts included.",
        "Reading the logits",
        formats=_INT8,
        graph=heads.LogSumInGraph,
        reader=candidates_with_log_sum,
        shipped_reader=candidates,
    ),
)

EXPERIMENTS: tuple[Experiment, ...] = (*CONTROLS, *GRAPH, *PRODUCTS, *BLOCKS, *SESSION, *READING)
