"""A last layer for the tokens asked for alone gives what the whole layer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import open_runtime, random_ids, relative_error, tiny_architecture, write_checkpoint
from modernbert_decoder import LLM
from modernbert_decoder.architecture import Head, LayerKind
from modernbert_decoder.costs import EMBEDDING
from modernbert_decoder.engine.calls import Piece, SelectiveCall
from modernbert_decoder.engine.graph import build_graph
from modernbert_decoder.engine.reading_cache import ReadingCache
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.selective import Selection, is_worthwhile
from modernbert_decoder.engine.weights import load_weights
from modernbert_decoder.quantization import QuantizationScheme

CONTEXT = 200
WINDOW = 16
TOLERANCE = 5e-5  # float32 sums in another order; logits of near-opposite terms lose a digit


@pytest.fixture(scope="module", params=[Head.SEQUENCE_CLASSIFICATION, Head.NONE])
def runtimes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Runtime, Runtime]:
    """The whole graph and the selective one, on the same weights."""
    architecture = tiny_architecture(window=WINDOW, head=request.param)
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), architecture)
    whole, selective = (
        open_runtime(folder, context_length=CONTEXT, is_for_pieces=chosen, is_selective=chosen)
        for chosen in (False, True)
    )
    return whole, selective


def read(
    runtime: Runtime, lengths: list[int], width: int, wanted: list[set[int]], *, first_id: int = 0
) -> list[np.ndarray]:
    """Logits and states (n, V or C) of the wanted places of each text, fed in pieces of `width`."""
    texts = [
        [max(token_id, first_id) for token_id in random_ids(runtime.architecture, length, seed=i)]
        for i, length in enumerate(lengths)
    ]
    cache = ReadingCache(runtime.architecture, num_positions=CONTEXT * len(texts), max_rows=len(texts))
    layers = cache.layers(len(texts), max(lengths))
    found: list[np.ndarray] = []
    kept: dict[tuple[int, int], SelectiveCall] = {}
    for start in range(0, max(lengths), width):
        active = [i for i, length in enumerate(lengths) if length > start]
        assert active == list(range(len(active)))
        fed = [texts[i][start : start + width] for i in active]
        longest = max(map(len, fed))
        positions = [
            i * longest + place - start
            for i in active
            for place in sorted(wanted[i])
            if start <= place < start + len(fed[i])
        ]
        has_head = runtime.architecture.head is not Head.NONE
        cut = [(keys[: len(active)], values[: len(active)]) for keys, values in layers]
        piece = Piece(cut, fed, [start] * len(active), positions if has_head else (), positions, kept=kept)
        logits, states = runtime.read(piece)
        found += [np.array(logits), np.array(states)] if has_head else [np.array(states)]
    return found


@settings(max_examples=40, deadline=None)
@given(data=st.data(), width=st.integers(1, 140))
def test_any_tokens_of_any_pieces_have_the_logits_and_states_of_the_whole_layer(
    data: st.DataObject, width: int, runtimes: tuple[Runtime, Runtime]
) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(1, 190), min_size=1, max_size=4)), reverse=True)
    wanted = [data.draw(st.sets(st.integers(0, length - 1), max_size=5)) for length in lengths]
    whole, selective = (read(runtime, lengths, width, wanted) for runtime in runtimes)
    for expected, values in zip(whole, selective, strict=True):
        assert values.shape == expected.shape
        if expected.size:
            assert relative_error(values, expected) < TOLERANCE


def test_what_is_computed_of_padding_reaches_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be NaN: attention leaves its results for padding as memory was."""
    architecture = tiny_architecture(window=WINDOW, head=Head.SEQUENCE_CLASSIFICATION)
    folder = write_checkpoint(tmp_path, architecture)
    lengths, wanted = [160, 103, 41, 3], [{1, 30, 159}, {102}, {40}, {0, 2}]

    def poisoned(*args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        weights = load_weights(*args, **kwargs)
        embedding = weights[EMBEDDING].copy()
        embedding[0] = np.nan  # what padding is filled with
        return {**weights, EMBEDDING: embedding}

    monkeypatch.setattr("checkpoints.load_weights", poisoned)
    runtime = open_runtime(folder, context_length=CONTEXT, is_selective=True)
    # The last one finds what the others have left in memory.
    for width in (25, 160, 120, 25):
        found = read(runtime, lengths, width, wanted, first_id=1)
        assert all(np.isfinite(values).all() for values in found), width
    monkeypatch.undo()
    whole = open_runtime(folder, context_length=CONTEXT)
    for expected, values in zip(read(whole, lengths, 25, wanted, first_id=1), found, strict=True):
        if expected.size:
            assert relative_error(values, expected) < TOLERANCE


@given(data=st.data(), longest=st.integers(1, 9), num_rows=st.integers(1, 4))
def test_a_selection_finds_every_token_and_shows_it_what_precedes_it(
    data: st.DataObject, longest: int, num_rows: int
) -> None:
    wanted = data.draw(st.lists(st.integers(0, num_rows * longest - 1), unique=True, max_size=12))
    num_past = np.array(data.draw(st.lists(st.integers(0, 5), min_size=num_rows, max_size=num_rows)))
    selection = Selection(wanted, (num_rows, longest), num_past, num_positions=100)
    assert selection.selected.ravel()[selection.found].tolist() == wanted
    visible = selection.visible()
    for token, place in zip(wanted, selection.found, strict=True):
        row, column = divmod(int(place), selection.selected.shape[1])
        assert row == token // longest
        assert selection.selected_positions[row, column] == num_past[row] + token % longest
        past, new = np.split(visible[row, 0, column] == 0, [selection.num_past])
        assert past.tolist() == [i < num_past[row] for i in range(selection.num_past)]
        assert new.tolist() == [i <= token % longest for i in range(longest)]


def test_nothing_of_the_past_is_fetched_where_nothing_is_asked_for() -> None:
    selection = Selection([], (2, 8), np.array([64, 64]), num_positions=100)
    assert selection.num_past == 0
    assert selection.selected.shape == (2, 0)
    assert selection.visible().shape == (2, 1, 0, 8)


def test_padding_behind_the_rotary_tables_gets_their_last_place() -> None:
    selection = Selection([0], (2, 8), np.array([90, 96]), num_positions=100)
    assert selection.positions.max() == 99


def test_generating_models_and_those_that_end_in_a_sliding_layer_are_read_whole() -> None:
    sliding_last = {"layer_kinds": (LayerKind.FULL, LayerKind.SLIDING), "num_hidden_layers": 2}
    assert is_worthwhile(tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION))
    assert is_worthwhile(tiny_architecture(head=Head.NONE))
    assert not is_worthwhile(tiny_architecture(head=Head.CAUSAL_LM))
    assert not is_worthwhile(tiny_architecture(head=Head.NONE, **sliding_last))


@pytest.mark.parametrize(
    "layer_kinds",
    [
        (LayerKind.FULL, LayerKind.FULL),
        (LayerKind.SLIDING, LayerKind.FULL),
        (LayerKind.SLIDING, LayerKind.SLIDING, LayerKind.FULL),
        (LayerKind.FULL,),
    ],
    ids=lambda kinds: "-".join(kind.name.lower() for kind in kinds),
)
def test_models_of_any_layers_before_a_full_last_one_are_read(
    layer_kinds: tuple[LayerKind, ...], tmp_path: Path
) -> None:
    architecture = tiny_architecture(
        window=WINDOW,
        head=Head.SEQUENCE_CLASSIFICATION,
        layer_kinds=layer_kinds,
        num_hidden_layers=len(layer_kinds),
    )
    folder = write_checkpoint(tmp_path, architecture)
    lengths, wanted = [150, 97, 2], [{149}, {0, 96}, {1}]
    for width in (120, 2):
        whole, selective = (
            read(open_runtime(folder, context_length=CONTEXT, is_selective=each), lengths, width, wanted)
            for each in (False, True)
        )
        for expected, values in zip(whole, selective, strict=True):
            assert not expected.size or relative_error(values, expected) < TOLERANCE


@pytest.mark.parametrize("context", [2, 3, 257, 258, 513])
def test_a_text_may_fill_the_context_to_its_end(context: int, tmp_path: Path) -> None:
    """Also where its last piece is a single token, beside a shorter one."""
    architecture = tiny_architecture(window=WINDOW, head=Head.SEQUENCE_CLASSIFICATION)
    folder = write_checkpoint(tmp_path, architecture)
    texts = [[max(1, each) for each in random_ids(architecture, length)] for length in (context, context - 1)]
    exact, roomy = (LLM(folder, dtype="float32", max_context=context + more) for more in (0, 100))
    with exact, roomy:
        for ours, expected in zip(exact.classify(texts), roomy.classify(texts), strict=True):
            assert ours.probabilities == pytest.approx(expected.probabilities, abs=1e-6)


def test_the_last_layer_has_no_attention_over_all_tokens() -> None:
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION)
    scheme = QuantizationScheme.named("w8a8")
    counts = [
        sum(
            node.op_type == "GroupQueryAttention"
            for node in onnx.load_from_string(
                build_graph(architecture, scheme, num_positions=64, is_selective=chosen)
            ).graph.node
        )
        for chosen in (False, True)
    ]
    assert counts == [4, 3]


def test_pieces_that_ask_for_nothing_share_their_calls(runtimes: tuple[Runtime, Runtime]) -> None:
    """Filled anew, whatever was in them: 150 and 140 tokens in pieces of 20, of which the last differ."""
    _, runtime = runtimes
    cache = ReadingCache(runtime.architecture, num_positions=2 * CONTEXT, max_rows=2)
    layers = cache.layers(2, 150)
    texts = [random_ids(runtime.architecture, length, seed=length) for length in (150, 140)]
    shared: list[np.ndarray] = []
    for kept in ({}, None):
        calls: set[int] = set()
        for start in range(0, 140, 20):
            fed = [ids[start : start + 20] for ids in texts]
            piece = Piece(layers, fed, [start, start], kept={} if kept is None else kept)
            runtime.read(piece)
            calls |= {id(call) for call in piece.kept.values()}
        assert kept is None or len(calls) == 1
        piece = Piece([(k[:1], v[:1]) for k, v in layers], [texts[0][140:]], [140], state_positions=[9])
        _, states = runtime.read(piece)
        assert not piece.kept
        shared.append(states)
    assert np.array_equal(*shared)
    assert np.isfinite(shared[0]).all()
