"""The benchmark harness's pure parts: ratios, claims, tables, results as JSON, the peers' shapes."""

from __future__ import annotations

import dataclasses
import doctest
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from checkpoints import BUNDLED_ARCHITECTURE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    additions,
    contention,
    llama_gguf,
    machine,
    peers,
    quality,
    results,
    run,
    session,
    step_overhead,
    summary,
    tables,
    weight_bits,
)
from benchmarks.cache_bytes import cache_table  # noqa: E402
from benchmarks.claims import check_claims  # noqa: E402
from benchmarks.costs_of_peers import step_bytes  # noqa: E402
from benchmarks.coverage import missing_cases, wanted_cases  # noqa: E402
from benchmarks.engine_peer import EnginePeer  # noqa: E402
from benchmarks.machine import describe_machine, slug  # noqa: E402
from benchmarks.matrix import Round, quietest  # noqa: E402
from benchmarks.page import full_page  # noqa: E402
from benchmarks.plot import draw  # noqa: E402
from benchmarks.protocol import Worker, WorkerError  # noqa: E402
from benchmarks.quantizing import QuantizingTime, time_quantizing  # noqa: E402
from benchmarks.random_models import bpe_entries, ensure_checkpoint  # noqa: E402
from benchmarks.readme import readme_section  # noqa: E402
from benchmarks.shapes import SHAPES, VOCABULARY_SIZE, Shape  # noqa: E402
from benchmarks.start_up import StartUp, launch, start_up_table  # noqa: E402
from benchmarks.step_overhead import Overhead, share_outside  # noqa: E402
from benchmarks.summary import (  # noqa: E402
    ENGINE,
    LLAMA,
    TRANSFORMERS,
    Case,
    Comparison,
    Row,
    Samples,
    Spread,
    case_label,
    compare,
    geometric_mean,
    make_row,
    pairwise_ratio,
)
from benchmarks.weight_bits import WeightBits, bits_line, bits_sentence  # noqa: E402

from modernbert_decoder.architecture import RELEASED_SIZES, released_architecture  # noqa: E402
from modernbert_decoder.checkpoint import BUNDLED_MODEL, Checkpoint  # noqa: E402
from modernbert_decoder.cli.formats import bytes_per_weight  # noqa: E402
from modernbert_decoder.quantization import QuantizationScheme, fused_shapes  # noqa: E402

# Results of other benchmarks lie beside those of `make bench`, with their kind at the end of the name.
KINDS = ("evaluation", "pytorch", "serving", "speculation", "throughput", "training")
RESULTS = (ROOT / "benchmarks" / "results").glob("????-??-??-*.json")
PUBLISHED = max(path for path in RESULTS if not path.stem.endswith(KINDS))
# Such cases may be left out, if the notes say so: they take minutes.
LONGEST = [("68m", 8, 2048), ("150m", 8, 2048)]
# seconds per decode step in three rounds; the machine is half as fast in the second
STEPS = {
    (ENGINE, "float32"): [2.0, 4.0, 2.0],
    (ENGINE, "int8"): [1.0, 2.0, 1.0],
    (ENGINE, "int4"): [0.9, 1.8, 0.9],
    (ENGINE, "int4-pure"): [0.8, 1.6, 0.8],
    (LLAMA, "F32"): [2.2, 4.4, 2.2],
    (LLAMA, "Q8_0"): [1.5, 3.0, 1.5],
    (LLAMA, "Q4_0"): [0.6, 1.2, 0.6],
    (TRANSFORMERS, "float32"): [20.0, 40.0, 20.0],
}


def without_cases(made: results.Results, cases: list[tuple[str, int, int]]) -> results.Results:
    """The results of a run in which these cases were left out."""

    def is_kept(each: Row | Comparison) -> bool:
        return (each.size, each.sequences, each.prompt_tokens) not in cases

    return dataclasses.replace(
        made,
        rows=[row for row in made.rows if is_kept(row)],
        comparisons=[each for each in made.comparisons if is_kept(each)],
    )


def make_samples(size: str = "17m") -> list[Samples]:
    case = Case(size, sequences=1, prompt_tokens=128)
    every = []
    for (peer, variant), steps in STEPS.items():
        samples = Samples(peer, variant, case, new_tokens=4, step_bytes=100)
        for seconds in steps:
            answer = {
                "prefill_seconds": 3 * seconds,
                "step_seconds": [seconds] * 4,
                "peak_memory_bytes": 10**8,
            }
            samples.add(answer, bandwidth=200.0, others_share=0.01)
        every.append(samples)
    return every


def make_results() -> results.Results:
    samples = make_samples()
    return results.Results(
        format=results.FORMAT,
        date="2026-01-02",
        machine={
            "cpu": "Some CPU",
            "flags": ["avx2"],
            "logical_processors": 2,
            "memory_gib": 8.0,
            "system": "Linux x86_64",
        },
        threads=2,
        versions={"python": "3.11.0"},
        features={LLAMA: "AVX2 = 1"},
        bandwidth=Spread(2e10, 1e10, 3e10),
        others_share=Spread(0.01, 0.0, 0.2),
        is_quick=False,
        absent=[peers.Absent("other", "no module other", "pip install other")],
        rows=[make_row(each, threads=2) for each in samples],
        comparisons=compare(samples),
        start_up=[
            StartUp(ENGINE, "int8", "17m", "first token", Spread(0.5, 0.4, 0.6), 10**8),
            StartUp(TRANSFORMERS, "float32", "17m", "first token", Spread(6.0, 5.0, 7.0), 4 * 10**8),
        ],
        overhead=[Overhead("greedy", Spread(0.06, 0.05, 0.07), Spread(3e-5, 2e-5, 4e-5))],
        cache=cache_table(["17m"]),
        perplexity=quality.costs_of({"float32": (-200.0, 100), "int8": (-200.1, 100)}, num_bytes=300),
        parity=[quality.Parity("17m", 200, 1e-6, 0, 1)],
        notes=["A note."],
        weight_bits=[
            WeightBits("17m", "int8", 8.14, 8.125),
            WeightBits("17m", "int4-pure", 4.25, 4.5),
            WeightBits("32m", "int8", 8.3, 8.25),
            WeightBits("32m", "int4-pure", 4.3, 4.5),
        ],
    )


def make_complete_results() -> results.Results:
    """The same rows for every case that a published run must have."""
    made = make_results()
    rows = [
        dataclasses.replace(row, size=case.size, sequences=case.sequences, prompt_tokens=case.prompt_tokens)
        for case in wanted_cases()
        for row in made.rows
    ]
    return dataclasses.replace(made, rows=rows, absent=[])


def test_ratios_are_taken_within_each_round() -> None:
    # Ratios of medians would be 1: the machine slowed down between the rounds, and both with it.
    assert pairwise_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == Spread(2.0, 2.0, 2.0)
    assert pairwise_ratio([1.0, 20.0], [4.0, 10.0]).median == pytest.approx((0.25 + 2) / 2)


def test_samples_of_different_rounds_are_not_paired() -> None:
    with pytest.raises(ValueError, match="zip"):
        pairwise_ratio([1.0, 2.0], [1.0])


def test_the_mean_of_ratios_is_geometric() -> None:
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)


def test_a_row_states_rates_of_all_sequences_and_the_share_of_each_rounds_bandwidth() -> None:
    samples = Samples(ENGINE, "int8", Case("17m", 8, 100), new_tokens=2, step_bytes=100)
    for steps, peak, bandwidth in (([1.0, 3.0], 5, 50.0), ([4.0, 4.0], 7, 25.0)):
        answer = {"prefill_seconds": 4.0, "step_seconds": steps, "peak_memory_bytes": peak}
        samples.add(answer, bandwidth=bandwidth, others_share=None)
    row = make_row(samples, threads=2)
    assert row.step_seconds == Spread(3.0, 2.0, 4.0)
    assert row.decode_tokens_per_second == pytest.approx(8 / 3)
    assert row.prefill_tokens_per_second == pytest.approx(200)
    assert row.bandwidth_share == Spread(1.0, 1.0, 1.0)  # the machine was half as fast, memory included
    assert row.peak_memory_bytes == 7


def test_the_quietest_rounds_count_in_the_order_they_were_measured() -> None:
    rounds = [Round([], 1.0, share, 1.0) for share in (0.2, 0.0, 0.5, 0.01)]
    assert [each.others_share for each in quietest(rounds, 2)] == [0.0, 0.01]
    assert [each.others_share for each in quietest(rounds, 3)] == [0.2, 0.0, 0.01]
    assert not rounds[0].is_quiet
    assert Round([], 1.0, None, 1.0).is_quiet


def test_every_pair_at_equal_bits_is_compared() -> None:
    comparisons = compare(make_samples())
    decode = {
        (each.variant, each.peer): each.ratio.median for each in comparisons if each.measure == "decode"
    }
    assert decode[("float32", LLAMA)] == pytest.approx(1.1)
    assert decode[("int8", LLAMA)] == pytest.approx(1.5)
    assert decode[("int4-pure", LLAMA)] == pytest.approx(0.75)
    assert decode[("int8", TRANSFORMERS)] == pytest.approx(20)
    equal_bits = {each.variant for each in comparisons if each.peer == LLAMA and each.has_equal_bits}
    assert equal_bits == {"float32", "int8", "int4-pure"}  # an 8-bit vocabulary is not Q4_0


def test_a_peer_that_was_not_measured_is_not_compared() -> None:
    ours = [each for each in make_samples() if each.peer == ENGINE]
    assert compare(ours) == []


def test_claims_say_what_is_held_and_what_is_not() -> None:
    verdicts = {claim.what: claim.verdict for claim in check_claims(make_results())}
    assert verdicts["decode, one sequence, int8 against transformers (SDPA, float32), 17m"] == "held"
    assert verdicts["decode against llama.cpp at equal bits, every row"] == "**not held**"
    assert verdicts["decode against llama.cpp at equal bits, geometric mean"] == "**not held**"
    assert verdicts["everything but the network in a 17m int8 decode step, greedy"] == "**not held**"
    assert verdicts["start to first token, `mbd generate`, 17m shape, against transformers"] == "held"
    assert verdicts["perplexity cost of int8, bundled model"] == "held"
    assert verdicts["quantizing every matrix of 1b to int8"] == "not measured"
    unmeasured = "share of the memory-bandwidth limit in decode, int8, one sequence, 68m and larger"
    assert verdicts[unmeasured] == "not measured"


def test_claims_of_an_empty_run_are_not_measured() -> None:
    empty = {
        name: [] for name in ("rows", "comparisons", "start_up", "overhead", "perplexity", "parity", "cache")
    }
    claims = check_claims(dataclasses.replace(make_results(), **empty))
    assert {claim.verdict for claim in claims} == {"not measured"}


def test_results_survive_json(tmp_path: Path) -> None:
    written = make_results()
    results.save(written, tmp_path / "results.json")
    assert results.load(results.Results, tmp_path / "results.json", format=results.FORMAT) == written


def test_results_of_the_published_runs_can_be_read_and_rendered() -> None:
    read = results.load(results.Results, PUBLISHED, format=results.FORMAT)
    assert run.is_complete(read)
    assert full_page(read) == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert readme_section(read) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_with_missing_or_unknown_fields_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.save(make_results(), path)
    path.write_text(path.read_text().replace('"new_tokens"', '"fresh_tokens"', 1))
    with pytest.raises(ValueError, match=r"rows\[0\].*new_tokens.*fresh_tokens"):
        results.load(results.Results, path, format=results.FORMAT)
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        results.load(results.Results, path, format=results.FORMAT)


def test_tables_have_as_many_cells_as_columns() -> None:
    for text in (full_page(make_results()), readme_section(make_results())):
        width = None
        for line in text.splitlines():
            if not line.startswith("|"):
                width = None
                continue
            width = width or line.count("|")
            assert line.count("|") == width or "AVX2" in line, line


def test_the_page_shows_the_rows_in_which_we_lose() -> None:
    losses = full_page(make_results()).split("## Where we lose")[1].split("##")[0]
    assert "int4, 4-bit vocabulary | llama.cpp Q4_0 | 0.750" in losses
    assert "float32 | llama.cpp F32" not in losses


def test_absent_peers_are_named_with_the_way_to_install_them() -> None:
    for text in (full_page(make_results()), readme_section(make_results())):
        assert "other is absent (no module other); install it with: pip install other" in text


def test_an_interpreter_without_the_module_makes_a_peer_absent() -> None:
    assert peers.import_problem(sys.executable, ["json", "no_such_module"]) == "no module no_such_module"
    assert peers.import_problem(sys.executable, ["json"]) is None
    assert "cannot be started" in (peers.import_problem("/no/such/python", ["json"]) or "")


def test_the_readme_table_is_replaced_between_its_markers() -> None:
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    assert tables.replace_between(text, "new\n") == f"before\n{tables.BEGIN}\nnew\n{tables.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks"):
        tables.replace_between("no markers", "new")


def test_the_readme_has_the_markers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "new" in tables.replace_between(text, "new")


@pytest.mark.parametrize("part", ["start_up", "overhead", "perplexity", "parity"])
def test_a_run_that_lacks_a_part_is_not_complete(part: str) -> None:
    assert run.is_complete(make_complete_results())
    assert not run.is_complete(dataclasses.replace(make_complete_results(), **{part: []}))


def test_parity_is_not_asked_of_a_machine_without_transformers() -> None:
    made = make_complete_results()
    without = dataclasses.replace(
        made,
        rows=[row for row in made.rows if row.peer != TRANSFORMERS],
        absent=[peers.Absent(TRANSFORMERS, "no module torch", "pip install torch")],
        parity=[],
    )
    assert run.is_complete(without)
    assert not run.is_complete(dataclasses.replace(without, absent=[]))


def test_partial_runs_do_not_replace_the_published_tables() -> None:
    assert not run.is_complete(make_results())
    assert not run.is_complete(dataclasses.replace(make_complete_results(), is_quick=True))
    options = run.parse(["--quick"])
    assert run.make_request(options).is_quick


def test_a_run_without_a_case_is_published_only_if_its_notes_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[bool] = []
    monkeypatch.setattr(run, "publish", lambda _: published.append(True))
    path = tmp_path / "results.json"
    kept = without_cases(results.load(results.Results, PUBLISHED, format=results.FORMAT), LONGEST)
    results.save(dataclasses.replace(kept, notes=[]), path)
    assert run.main(["--render", str(path)]) == 2
    assert not published
    notes = [f"{case_label(Case(*case))}, was left out: it takes long." for case in LONGEST]
    results.save(dataclasses.replace(kept, notes=notes), path)
    assert run.main(["--render", str(path)]) == 0
    assert published


def test_cases_measured_later_take_their_place_in_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_complete_results()
    notes = [f"{case_label(Case(*case))}, was left out: it takes long." for case in LONGEST]
    earlier = dataclasses.replace(without_cases(whole, LONGEST), notes=[*notes, "Something else."])
    later = [make_samples(size) for size, _, _ in LONGEST]
    for samples, case in zip(later, LONGEST, strict=True):
        for each in samples:
            each.case = Case(*case)
    measured = ([each for samples in later for each in samples], [], [])
    published: list[results.Results] = []
    monkeypatch.setattr(run, "publish", published.append)
    monkeypatch.setattr(session, "find_peers", lambda *_: ({}, []))
    monkeypatch.setattr(session, "_matrix", lambda *_: measured)
    monkeypatch.setattr(session, "describe_machine", lambda: earlier.machine)
    path = tmp_path / "results.json"
    results.save(earlier, path)
    options = ["--add-to", str(path), "--sizes", "68m", "150m", "--threads", str(earlier.threads)]
    assert run.main(options) == 0
    found = results.load(results.Results, path, format=results.FORMAT)
    assert published == [found]
    assert missing_cases(found) == []
    assert {row.rounds for row in found.rows if (row.size, row.sequences, row.prompt_tokens) in LONGEST} == {
        3
    }
    places = [(each.size, each.prompt_tokens, each.sequences) for each in found.rows]
    assert places == sorted(places, key=lambda place: (list(SHAPES).index(place[0]), *place[1:]))
    assert found.notes[0] == "Something else."
    assert [note.partition(" on ")[0] for note in found.notes[1:]] == [
        f"{case_label(Case(*case))}, was measured by itself" for case in LONGEST
    ]
    assert all(note.endswith(": 3 rounds.") for note in found.notes[1:])
    # Again, they take the place of themselves.
    assert run.main(options) == 0
    again = results.load(results.Results, path, format=results.FORMAT)
    assert (again.rows, again.comparisons, again.notes) == (found.rows, found.comparisons, found.notes)


def test_nothing_is_added_to_the_results_of_another_machine() -> None:
    earlier = make_complete_results()
    with pytest.raises(ValueError, match="another machine: cpu differ"):
        additions.check_same_setting(
            earlier, machine={**earlier.machine, "cpu": "another"}, threads=earlier.threads
        )
    with pytest.raises(ValueError, match=f"had {earlier.threads} threads, this one has 64"):
        additions.check_same_setting(earlier, machine=earlier.machine, threads=64)
    with pytest.raises(SystemExit):
        run.parse(["--add-to", "results.json", "--quick"])


def test_the_claim_about_every_row_says_how_many_cases_are_missing() -> None:
    what = "decode against llama.cpp at equal bits, every row"

    def claim(made: results.Results) -> tuple[str, str]:
        (found,) = [each for each in check_claims(made) if each.what == what]
        return found.measured, found.verdict

    kept = without_cases(results.load(results.Results, PUBLISHED, format=results.FORMAT), LONGEST)
    missing = [(case.size, case.sequences, case.prompt_tokens) for case in missing_cases(kept)]
    assert missing == LONGEST
    measured, verdict = claim(kept)
    assert measured.endswith("2 of 16 cases were not measured (68m 8 x 2048, 150m 8 x 2048)")
    assert verdict == "**not held**"
    won = [each for each in make_results().comparisons if each.is_won]
    measured, verdict = claim(dataclasses.replace(make_results(), comparisons=won))
    assert (
        "15 of 16 cases were not measured (17m 8 x 128, 17m 1 x 2048, 17m 8 x 2048 and 12 more)" in measured
    )
    assert verdict == "reported"
    measured, verdict = claim(dataclasses.replace(make_complete_results(), comparisons=won))
    assert "not measured" not in measured
    assert verdict == "held"


def test_the_page_says_which_sizes_were_not_measured_and_why() -> None:
    kept = results.load(results.Results, PUBLISHED, format=results.FORMAT)
    kept = dataclasses.replace(kept, rows=[row for row in kept.rows if row.size not in ("400m", "1b")])
    assert "Sizes that were not measured: 400m, 1b. All runtimes" in full_page(kept)
    everything = [dataclasses.replace(kept.rows[0], size=size) for size in SHAPES]
    assert "Sizes that were not measured" not in full_page(dataclasses.replace(kept, rows=everything))


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    draw(make_results(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_bits_per_weight_are_told_over_all_sizes() -> None:
    bits = make_results().weight_bits
    assert "ours take 8.125 to 8.3 bits a weight where Q8_0 takes 8.5, and 4.25 to 4.3 (4.5" in bits_sentence(
        bits
    )
    assert "int8 8.14 to 8.3 / 8.125 to 8.25; int4, 4-bit vocabulary 4.25 to 4.3 / 4.5" in bits_line(bits)
    assert bits_line([]) == ""
    assert "8.125 to 8.3 bits" in " ".join(readme_section(make_results()).split())
    assert bits_line(bits) in full_page(make_results())


def test_quantizing_is_timed_over_every_matrix_and_published() -> None:
    architecture = BUNDLED_ARCHITECTURE
    entry = time_quantizing("storyteller", architecture, "int4", threads=1)
    shapes = [shape for shape in fused_shapes(architecture).values() if len(shape) == 2]
    assert (entry.num_matrices, entry.num_weights) == (len(shapes), sum(map(math.prod, shapes)))
    assert 0 < entry.seconds < 60
    times = [QuantizingTime("1b", dtype, 2, 113, 1_031_000_000, seconds) for dtype, seconds in QUANTIZED]
    made = dataclasses.replace(make_results(), quantizing=times)
    assert "| 1b | int8 | 113 | 1,031 | 2 | 5.0 |" in full_page(made)
    verdicts = {claim.what: claim.verdict for claim in check_claims(made)}
    assert verdicts["quantizing every matrix of 1b to int8"] == "held"
    assert verdicts["quantizing every matrix of 1b to int4"] == "**not held**"


QUANTIZED = (("int8", 5.0), ("int4", 61.0))


def test_starts_are_timed_for_every_size_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, ...]] = []

    def launch_nothing(arguments: tuple[str, ...]) -> tuple[float, int]:
        launched.append(tuple(arguments))
        return 0.5 if "int8" in arguments else 1.0, 10**8

    monkeypatch.setattr("benchmarks.start_up.launch", launch_nothing)
    monkeypatch.setattr("benchmarks.start_up.model_folder", lambda name: Path("models") / name)
    (engine,) = [peer for peer in peers.PEERS if peer.name == ENGINE]
    installed = {ENGINE: peers.Installed(engine, "python")}
    entries = start_up_table(installed, sizes=("17m", "150m"), rounds=2, report=lambda _: None)
    keys = [(each.model, each.variant) for each in entries if each.what == "first token"]
    models, formats = ("17m", BUNDLED_MODEL, "150m"), ("float32", "int8", "int4")
    assert keys == [(model, dtype) for model in models for dtype in formats]
    assert len(launched) == 3 * len(entries)  # the first round is dropped
    for model, dtype in keys:
        (command,) = {each for each in launched if str(Path("models") / model) in each and dtype in each}
        assert command[command.index("--dtype") + 1] == dtype
    made = dataclasses.replace(make_results(), start_up=entries)
    claims = {claim.what: claim for claim in check_claims(made)}
    assert claims["start to first token, `mbd generate`, 17m shape"].measured == "0.50 s"  # int8, the default
    starts = (
        "Process start to first token, 17m shape: modernbert-decoder float32 1.00 s; modernbert-decoder int8"
    )
    assert starts in readme_section(made)


def test_default_sizes_and_prompts_are_those_of_the_numbers_to_hold() -> None:
    request = run.make_request(run.parse([]))
    assert request.sizes == ("17m", "32m", "68m", "150m")
    assert request.prompts == (128, 2048)
    assert request.sequences == (1, 8)


def test_shapes_agree_with_the_released_architectures() -> None:
    for name, shape in SHAPES.items():
        architecture = released_architecture(name)
        assert shape.num_layers == architecture.num_hidden_layers
        assert shape.hidden_size == architecture.hidden_size
        assert shape.intermediate_size == architecture.intermediate_size
        assert shape.num_heads == architecture.num_attention_heads
        assert shape.head_dim == architecture.head_dim
        assert architecture.vocab_size == VOCABULARY_SIZE


@pytest.mark.parametrize("size", RELEASED_SIZES)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_step_bytes_of_ours_are_those_of_the_packed_file(size: str, dtype: str) -> None:
    """Blocks are fitted to each matrix's width, so nominal bits would be too few for most sizes."""
    architecture, scheme = released_architecture(size), QuantizationScheme.named(dtype)
    body, vocabulary = bytes_per_weight(architecture, scheme)
    loaded = {"body_bytes_per_weight": body, "vocabulary_bytes_per_weight": vocabulary}
    stored = sum(
        math.prod(shape) * (1 if name.endswith(".data") else 4)
        for name, shape in scheme.packed_shapes(architecture).items()
    )
    case = Case(size, 1, 128)
    embedding_row = math.ceil(architecture.hidden_size * vocabulary)
    expected = stored + embedding_row + architecture.kv_cache_bytes(128 + 32)
    assert step_bytes(ENGINE, case, loaded, new_tokens=64) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("size", SHAPES)
def test_the_llama_has_our_parameters_less_the_head(size: str) -> None:
    architecture = released_architecture(size)
    llama = sum(math.prod(shape) for shape in llama_gguf.tensor_shapes(SHAPES[size]).values())
    width = architecture.hidden_size
    head = width * width + width + VOCABULARY_SIZE  # dense, norm, bias of the vocabulary
    # As many norms: ours has one behind the embeddings, and none in front of layer 0's attention.
    assert llama == architecture.num_parameters() - head


def test_the_gguf_file_holds_the_shapes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    shape = Shape("tiny", num_layers=1, hidden_size=32, intermediate_size=64, num_heads=2)
    llama_gguf.write_float32(shape, tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    found = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    assert found == llama_gguf.tensor_shapes(shape)


def test_step_bytes_of_several_sequences_count_weights_once() -> None:
    loaded = {"file_bytes": 1_000, "body_bytes_per_weight": 1.0625, "vocabulary_bytes_per_weight": 1.0625}
    for peer in (ENGINE, LLAMA, TRANSFORMERS):
        one = step_bytes(peer, Case("17m", 1, 128), loaded, new_tokens=64)
        two = step_bytes(peer, Case("17m", 2, 128), loaded, new_tokens=64)
        eight = step_bytes(peer, Case("17m", 8, 128), loaded, new_tokens=64)
        assert eight - one == 7 * (two - one)
        assert two < 2 * one or peer == LLAMA


def test_random_checkpoints_open_like_real_ones(tmp_path: Path) -> None:
    folder = ensure_checkpoint("17m", tmp_path)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.architecture == released_architecture("17m")
    assert ensure_checkpoint("17m", tmp_path) == folder


def test_the_random_vocabulary_has_full_size_and_distinct_entries() -> None:
    vocabulary, merges = bpe_entries()
    assert len(vocabulary) == 50_280
    assert sorted(vocabulary.values()) == list(range(50_280))
    assert all(left in vocabulary and right in vocabulary for left, right in merges)


def test_windows_overlap_by_one_token_and_predict_every_token_once() -> None:
    ids = list(range(1_200))
    windows = quality.windows_of(ids, 512)
    assert [token for window in windows for token in window[1:]] == ids[1:]
    assert all(len(window) <= 512 for window in windows)


def test_perplexity_costs_are_relative_to_float32() -> None:
    table = {
        each.variant: each
        for each in quality.costs_of({"float32": (-100.0, 100), "int8": (-101.0, 100)}, num_bytes=50)
    }
    assert table["float32"].cost == 0
    assert table["int8"].cost == pytest.approx(math.exp(0.01) - 1)
    assert table["float32"].bits_per_byte == pytest.approx(100 / math.log(2) / 50)


def test_overhead_is_the_time_outside_the_network() -> None:
    assert share_outside([2.0, 2.0], [1.0, 2.0]) == pytest.approx(0.25)


def test_the_cache_table_counts_the_real_buffers() -> None:
    (entry,) = cache_table(["17m"])
    architecture = released_architecture("17m")
    assert entry.naive_bytes == architecture.naive_kv_cache_bytes(7_999)
    assert architecture.kv_cache_bytes(7_999) <= entry.buffer_bytes < entry.naive_bytes


@pytest.mark.parametrize(
    ("code", "reason"), [("raise SystemExit(3)", "status 3"), ("pass", "printed nothing")]
)
def test_a_start_that_fails_or_prints_nothing_is_not_timed(code: str, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        launch([sys.executable, "-c", code])


def test_a_failing_worker_says_why() -> None:
    script = "from benchmarks.protocol import serve; serve({'ok': dict, 'bad': lambda: 1 / 0})"
    with Worker([sys.executable, "-c", script]) as worker:
        assert worker.ask("ok", a=1)["a"] == 1
        with pytest.raises(WorkerError, match="division by zero"):
            worker.ask("bad")
        assert worker.ask("ok")["peak_memory_bytes"] > 0


def test_a_dead_worker_says_its_last_words() -> None:
    with (
        Worker([sys.executable, "-c", "import sys; sys.exit('no such thing')"]) as worker,
        pytest.raises(WorkerError, match="no such thing"),
    ):
        worker.ask("load")


def test_published_names_hold_no_host_and_no_path() -> None:
    assert slug("AMD EPYC 7763 64-Core Processor") == "amd-epyc-7763"
    text = full_page(dataclasses.replace(make_results(), machine=describe_machine()))
    assert str(ROOT) not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"


def test_the_engine_worker_measures_the_steps_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.engine_peer.PROMPT_ID_LIMIT", 4_000)  # the bundled model's vocabulary
    peer = EnginePeer()
    loaded = peer.load(model=BUNDLED_MODEL, variant="int8", threads=1)
    fitted = bytes_per_weight(peer.llm.architecture, peer.llm.scheme)
    assert (loaded["body_bytes_per_weight"], loaded["vocabulary_bytes_per_weight"]) == fitted
    assert 1 < fitted[0] < 1.2
    with peer.llm:
        answer = peer.decode(prompt=300, tokens=3, sequences=3)
        assert len(answer["step_seconds"]) == 3
        assert answer["prefill_seconds"] > 0
        assert peer.llm.cache.used_bytes() == 0  # nothing is left behind for the next case
        answer = peer.overhead(prompt=5, tokens=2, sampling={"temperature": 1.0, "top_k": 4, "logprobs": 2})
        assert all(0 < a <= b for a, b in zip(answer["network_seconds"], answer["step_seconds"], strict=True))


@pytest.mark.parametrize(
    "module", [contention, machine, quality, step_overhead, summary, tables, weight_bits]
)
def test_the_examples_in_docstrings_are_right(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0
