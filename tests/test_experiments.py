"""The experiments on speed: altered graphs compute what the shipped one does, and the arithmetic is right."""

from __future__ import annotations

import dataclasses
import doctest
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from benchmarks.experiments import (  # noqa: E402
    __main__ as command,
)
from benchmarks.experiments import (  # noqa: E402
    block_quality,
    graphs,
    heads,
    measure,
    network,
    outside,
    page,
    profile,
    study,
)
from benchmarks.experiments.catalogue import EXPERIMENTS, FORMATS, SELF, SHIPPED  # noqa: E402
from benchmarks.experiments.measure import Pair, Plan, Ratio, Side, Times  # noqa: E402
from benchmarks.experiments.models import Model  # noqa: E402

from checkpoints import tiny_architecture  # noqa: E402
from modernbert_decoder.engine.graph import build_graph  # noqa: E402
from modernbert_decoder.quantization import QuantizationScheme, dequantize, quantize  # noqa: E402

PROMPT = tuple(range(10, 40))
NEXT = (7,)


@pytest.fixture(scope="module")
def tiny() -> Model:
    """Three layers of two heads: every block size up to 128 fits, the vocabulary is even."""
    changes = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    return Model.random(tiny_architecture(**changes), num_positions=network.CONTEXT, threads=1)


def answers(
    model: Model, kind: type[graphs.Shipped], fmt: str, reader: network.Reader = network.greedy
) -> list[dict[str, np.ndarray]]:
    """What a graph puts out for the prompt and for two tokens behind it."""
    experiment = dataclasses.replace(SHIPPED, graph=kind, reader=reader)
    scheme = QuantizationScheme.named(*FORMATS[fmt])
    loaded = study._network(experiment, model, scheme, network.Settings(1))
    assert isinstance(loaded, network.Network)
    loaded.prefill(PROMPT)
    found = [{name: array.copy() for name, array in loaded.outputs(len(PROMPT)).items()}]
    for _ in range(2):
        loaded.step(NEXT)
        found.append({name: array.copy() for name, array in loaded.outputs(1).items()})
    loaded.close()
    return found


def logits(found: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([each["logits"] for each in found])


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize(
    "kind", [graphs.SplitAttentionInput, graphs.SplitFeedForwardInput, graphs.PackedTokens]
)
def test_graphs_that_only_regroup_the_computation_put_out_the_same_logits(
    tiny: Model, kind: type[graphs.Shipped], fmt: str
) -> None:
    np.testing.assert_allclose(
        logits(answers(tiny, kind, fmt)), logits(answers(tiny, graphs.Shipped, fmt)), atol=1e-6
    )


@pytest.mark.parametrize("kind", [graphs.FusedNorms, heads.TransposedFloat, heads.FloatEmbedding])
def test_graphs_that_only_regroup_agree_in_float32(tiny: Model, kind: type[graphs.Shipped]) -> None:
    shipped = logits(answers(tiny, graphs.Shipped, "float32"))
    found = logits(answers(tiny, kind, "float32"))
    assert np.abs(found - shipped).max() < 1e-5 * np.abs(shipped).max()


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (graphs.FusedNorms, 0.03),
        (graphs.AccuracyLevel0, 0.03),
        (graphs.AccuracyLevel1, 0.03),
        (graphs.PerChannel, 0.05),
        (graphs.PerChannelInteger, 0.05),
        (heads.FloatEmbedding, 0.05),
        (heads.VocabularyInParts, 1e-6),
    ],
)
def test_graphs_that_round_otherwise_stay_close(
    tiny: Model, kind: type[graphs.Shipped], tolerance: float
) -> None:
    shipped = logits(answers(tiny, graphs.Shipped, "int8"))
    assert np.abs(logits(answers(tiny, kind, "int8")) - shipped).max() < tolerance * np.abs(shipped).max()


@pytest.mark.parametrize(
    ("kind", "node", "count"),
    [
        (graphs.SplitAttentionInput, "MatMulNBits", 3 * (3 + 3) + 2),
        (graphs.SplitFeedForwardInput, "Split", 0),
        (graphs.FusedNorms, "SkipLayerNormalization", 2 * 3 - 1),
        (graphs.PackedTokens, "Gather", 2 * 3 + 2 + 2),
        (graphs.PerChannel, "MatMulNBits", 0),
        (graphs.PerChannelInteger, "MatMulInteger", 3 * 4 + 2),
        (heads.GreedyInGraph, "ArgMax", 1),
        (heads.VocabularyInParts, "MatMulNBits", 3 * 4 + 1 + 2),
    ],
)
def test_a_changed_graph_has_the_nodes_it_is_named_after(
    tiny: Model, kind: type[graphs.Shipped], node: str, count: int
) -> None:
    graph, _ = study._built(kind, tiny, QuantizationScheme.named("int8"))
    found = [each.op_type for each in onnx.load_model_from_string(graph).graph.node]
    assert found.count(node) == count


def test_the_base_class_builds_the_packages_own_graph(tiny: Model) -> None:
    scheme = QuantizationScheme.named("int8")
    graph, _ = study._built(graphs.Shipped, tiny, scheme)
    assert graph == build_graph(tiny.architecture, scheme, num_positions=network.CONTEXT)


def test_tokens_and_candidates_chosen_in_the_graph_are_those_of_the_logits(tiny: Model) -> None:
    shipped = logits(answers(tiny, graphs.Shipped, "int8"))
    for kind in (heads.GreedyInGraph, heads.GreedyByTopK):
        found = answers(tiny, kind, "int8", network.greedy_in_graph)
        assert [int(each["token"].ravel()[0]) for each in found] == shipped.argmax(1).tolist()
    found = answers(tiny, heads.CandidatesInGraph, "int8", network.candidates_in_graph)
    log_sums = np.log(np.exp(shipped.astype(np.float64)).sum(1))
    for each, row, log_sum in zip(found, shipped, log_sums, strict=True):
        assert each["ids"][0].tolist() == np.argsort(-row, kind="stable")[: heads.NUM_CANDIDATES].tolist()
        assert each["log_sum"][0, 0] == pytest.approx(log_sum, abs=1e-5)
    found = answers(tiny, heads.LogSumInGraph, "int8", network.candidates_with_log_sum)
    assert [float(each["log_sum"][0, 0]) for each in found] == pytest.approx(log_sums, abs=1e-5)


def test_every_way_of_feeding_gives_the_tokens_of_the_packages_runtime(tiny: Model) -> None:
    scheme = QuantizationScheme.named("int8")
    package = dataclasses.replace(SHIPPED, is_package=True)
    experiments = [package, *(SHIPPED for _ in network.Feeding)]
    settings = [network.Settings(1)] + [network.Settings(1, feeding=each) for each in network.Feeding]
    tokens = []
    for experiment, each in zip(experiments, settings, strict=True):
        loaded = study._network(experiment, tiny, scheme, each)
        found = [loaded.prefill(PROMPT)]
        found += [loaded.step((found[-1],)) for _ in range(5)]
        assert loaded.prefill(PROMPT) == found[0]  # a new sequence starts from nothing
        tokens.append(found)
        loaded.close()
    assert all(each == tokens[0] for each in tokens)


def test_zero_points_come_back_within_half_a_step() -> None:
    weight = np.random.default_rng(0).uniform(-1, 3, (4, 64)).astype(np.float32)
    matrix = QuantizationScheme.named("int4", "int4").vocabulary
    packed = graphs.with_zero_points("w", weight, matrix)
    levels = np.stack([packed["w.data"] & 15, packed["w.data"] >> 4], -1).reshape(4, 64).astype(np.float32)
    zeros = (packed["w.zeros"] & 15).astype(np.float32)
    error = np.abs((levels - zeros) * packed["w.scales"] - weight)
    assert error.max() <= 0.51 * packed["w.scales"].max() + 0.5 * packed["w.scales"].max()
    symmetric = dequantize(quantize(weight, matrix))
    assert np.square(error).mean() < np.square(symmetric - weight).mean()


def test_per_channel_levels_come_back_within_half_a_step() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    levels, scales = graphs.per_channel(weight)
    assert (np.abs(levels * scales[:, None] - weight) <= 0.501 * scales[:, None]).all()


class Clockwork:
    """A network that only counts what it was asked for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def prefill(self, ids: tuple[int, ...]) -> int:
        self.log.append(self.name)
        return len(ids)

    def step(self, ids: tuple[int, ...]) -> int:
        return ids[0]


def test_both_sides_take_turns_in_alternating_order() -> None:
    log: list[str] = []
    sides = Side(Clockwork(log, "A")), Side(Clockwork(log, "B"))
    measure.measure_pair(*sides, Plan(1, turns=4, steps=1, prompt=PROMPT, settle_seconds=0))
    assert "".join(log) == "ABBAABBA"


def test_only_the_quietest_rounds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.5, 0.0, 0.01, 0.6])  # the first round warms up
    pair = Pair(Times(1, 1), Times(1, 1), 0.0)
    monkeypatch.setattr(
        measure, "measure_pair", lambda *_: dataclasses.replace(pair, others_share=next(shares))
    )
    sides = Side(Clockwork([], "A")), Side(Clockwork([], "B"))
    found = measure.compare(*sides, Plan(2, turns=1, steps=1, prompt=PROMPT))
    assert [each.others_share for each in found] == [0.0, 0.01]


def test_a_hopelessly_slow_change_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    slow = Pair(Times(1, 1), Times(1, measure.HOPELESS + 1), 0.9)
    monkeypatch.setattr(measure, "measure_pair", lambda *_: asked.append(1) or slow)
    sides = Side(Clockwork([], "A")), Side(Clockwork([], "B"))
    assert measure.compare(*sides, Plan(2, turns=1, steps=1, prompt=PROMPT)) == [slow]
    assert len(asked) == 1


def test_ratios_are_shipped_over_changed_time_within_each_round() -> None:
    pairs = [Pair(Times(4.0 * i, 2.0 * i), Times(2.0 * i, 4.0 * i), 0.0) for i in (1, 2, 3)]
    outcome = study.outcome_of("x", "17m", "int8", pairs, None)
    assert outcome.prefill == Ratio(2.0, 2.0, 2.0)
    assert outcome.decode == Ratio(0.5, 0.5, 0.5)
    assert outcome.rounds == 3


def outcome(experiment: str, decode: float) -> study.Outcome:
    ratio = Ratio(decode, decode, decode)
    return study.Outcome(
        experiment, "17m", "int8", ratio, Ratio(1.0, 1.0, 1.0), 1e-3, 1e-2, 0.0, 6, 0.01, failure=None
    )


def make_study(**changes: object) -> study.Study:
    kinds = [profile.Kind("Add", 2, 4e-4, 0.4), profile.Kind(profile.BETWEEN_NODES, 2, 6e-4, 0.6)]
    made = study.Study(
        format=study.FORMAT,
        date="2026-01-02",
        machine={"cpu": "CPU", "flags": [], "logical_processors": 2, "memory_gib": 8.0, "system": "Linux"},
        threads=2,
        versions={"python": "3.11.0"},
        prompt_tokens=128,
        outcomes=[
            outcome(f"{SELF}first time: the shipped configuration against itself", 1.02),
            outcome("the package's own runtime", 1.04),
            outcome("accuracy level 0", 0.5),
            outcome("q, k and v as three products", 1.03),
            outcome("the two halves of Wi as two products", 1.2),
            study.Outcome(
                "no prepacking", "17m", "int8", None, None, None, None, None, 0, None, failure="no kernel"
            ),
        ],
        profiles=[profile.Profile("17m", "int8", "decode", 1e-3, kinds)],
        outside=[outside.Outside("17m", "greedy", 1e-3, 9e-4, 1e-5, 2e-5, 3e-5, 4e-5)],
        qualities=[block_quality.BlockQuality("float32", 32.0, 34.5, 0.0)],
        notes=[],
    )
    return dataclasses.replace(made, **changes)


def test_a_study_survives_json(tmp_path: Path) -> None:
    results.save(make_study(), tmp_path / "study.json")
    assert results.load(study.Study, tmp_path / "study.json", format=study.FORMAT) == make_study()
    (tmp_path / "study.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        results.load(study.Study, tmp_path / "study.json", format=study.FORMAT)


def test_nothing_below_the_difference_of_equal_configurations_is_called_faster() -> None:
    findings = page.full_page(make_study()).split("## Findings")[1].split("## ")[0]
    assert "the two halves of Wi as two products | 17m int8 | 1.20" in findings
    assert "q, k and v" not in findings
    assert "accuracy level 0" not in findings
    assert "own runtime" not in findings


def test_what_the_runtime_refuses_is_said() -> None:
    assert "no prepacking | 17m int8 | refused: no kernel" in page.full_page(make_study())


def test_tables_have_as_many_cells_as_columns() -> None:
    width = None
    for line in page.full_page(make_study()).splitlines():
        width = line.count("|") if line.startswith("|") and width is None else width
        width = width if line.startswith("|") else None
        assert width is None or line.count("|") == width, line


def test_names_are_distinct_and_every_reason_is_given() -> None:
    keys = [(each.name, fmt) for each in EXPERIMENTS for fmt in each.formats]
    assert len(keys) == len(set(keys))
    assert all(each.why.endswith(".") for each in EXPERIMENTS)


def test_a_partial_run_does_not_replace_the_page() -> None:
    assert command.is_complete(command.make_request(command.parse([])))
    for arguments in (["--quick"], ["--only", "fused"], ["--sizes", "17m"]):
        assert not command.is_complete(command.make_request(command.parse(arguments)))


def test_the_profile_names_products_by_their_weight_and_attention_by_its_window(tiny: Model) -> None:
    found = profile.profile("tiny", "int8", tiny, threads=1, prompt=PROMPT)
    assert [each.what for each in found] == ["decode", f"prefill of {len(PROMPT)}"]
    for each in found:
        counts = {kind.name: kind.num_nodes for kind in each.kinds}
        assert counts["MatMulNBits vocabulary"] == counts["MatMulNBits lm_head.dense"] == 1
        assert counts["MatMulNBits attn.Wqkv"] == counts["MatMulNBits mlp.Wo"] == 3
        assert counts["GroupQueryAttention full"] == 1
        assert counts["GroupQueryAttention sliding"] == 2
        assert sum(kind.share for kind in each.kinds) == pytest.approx(1, abs=0.3)


def test_kernels_belong_to_the_call_they_ran_in() -> None:
    events = [
        {"name": "model_run", "ts": 100, "dur": 50},
        {"name": "model_run", "ts": 0, "dur": 90},
        {"name": "a_kernel_time", "cat": "Node", "ts": 10, "dur": 30},
        {"name": "a_kernel_time", "cat": "Node", "ts": 110, "dur": 20},
        {"name": "a_fence_before", "cat": "Node", "ts": 111, "dur": 20},
    ]
    calls = profile.calls_of(events)
    assert [seconds for seconds, _ in calls] == pytest.approx([90e-6, 50e-6])
    assert [found["a"] for _, found in calls] == pytest.approx([30e-6, 20e-6])


@pytest.mark.parametrize("module", [block_quality, graphs, measure, profile])
def test_the_examples_in_docstrings_are_right(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0
