"""What each step of a pretraining run is taken with: rate, RoPE base, number format, count of tokens."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import WORDS, assert_same_weights, phase, tiny_recipe, weights, write_texts
from watched_runs import PHASES, SeenStep, StruckError, run, strike_at, watch_steps

from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.training import trainer
from modernbert_decoder.training.checkpoints import all_checkpoints
from modernbert_decoder.training.plan import Plan

# bfloat16 has 8 bits of precision, and these runs are short.
BFLOAT16_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


def history(checkpoint: Path) -> list[dict[str, Any]]:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def three_phases(
    files: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, list[SeenStep], list[SeenStep]]:
    """A plan of three phases, its steps up to a strike in the second phase, and those behind it."""
    out = tmp_path_factory.mktemp("three") / "run"
    recipe = tiny_recipe(files, phases=PHASES, run={"checkpoint_every_steps": 2})
    plan = Plan(recipe)
    with pytest.MonkeyPatch.context() as patch:
        strike_at(patch, plan.first_step_of(1) + 3)
        before = watch_steps(patch)
        with pytest.raises(StruckError):
            run(recipe, out)
    with pytest.MonkeyPatch.context() as patch:
        after = watch_steps(patch)
        run(recipe, out)
    assert [seen.index for seen in before] == list(range(plan.first_step_of(1) + 3))
    assert after[-1].index == plan.num_steps - 1
    assert plan.first_step_of(1) < after[0].index <= before[-1].index
    return plan, before, after


def test_optimizer_has_the_rate_of_the_plan_at_every_step_also_behind_a_restart(
    three_phases: tuple[Plan, list[SeenStep], list[SeenStep]],
) -> None:
    plan, before, after = three_phases
    for seen in (*before, *after):
        assert seen.rate == 1e-2 * plan.rate(seen.index)
    assert before[0].rate == 0.0
    assert max(seen.rate for seen in before) == 1e-2
    assert 0.02 * 1e-2 < after[-1].rate < 0.5 * 1e-2


def test_model_computes_with_the_rope_base_of_the_phase_also_behind_a_restart(
    three_phases: tuple[Plan, list[SeenStep], list[SeenStep]],
) -> None:
    plan, before, after = three_phases
    bases: list[set[int]] = [set(), set(), set()]
    for seen in (*before, *after):
        bases[plan.step(seen.index).phase] |= seen.bases
    assert bases == [{10_000}, {160_000}, {160_000}]


def test_first_step_behind_a_checkpoint_has_the_rate_of_the_plan_as_it_is_now(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = phase("second", tokens=512)
    run(tiny_recipe(files, phases=[phase("first", tokens=512), later]), tmp_path / "run", stop_after="first")
    seen = watch_steps(monkeypatch)
    warmed = tiny_recipe(files, phases=[phase("first", tokens=512), later | {"warmup_tokens": 256}])
    run(warmed, tmp_path / "run")
    assert [each.rate for each in seen] == [0.0, 0.5e-2, 1e-2, 1e-2]


@pytest.fixture(scope="module")
def in_bfloat16(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("bfloat16") / "run"
    run(tiny_recipe(files, run={"precision": "bfloat16"}), out)
    return all_checkpoints(out)[-1]


def test_training_in_bfloat16_learns_as_in_float32_and_keeps_its_state_in_float32(
    files: list[str], in_bfloat16: Path, tmp_path: Path
) -> None:
    run(tiny_recipe(files, run={"precision": "float32"}), tmp_path / "run")
    exact, rounded = (
        [entry["loss"] for entry in history(checkpoint)]
        for checkpoint in (all_checkpoints(tmp_path / "run")[-1], in_bfloat16)
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=BFLOAT16_TOLERANCE)
    assert exact[-1] < exact[0] * (1 - 2 * BFLOAT16_TOLERANCE)
    assert {tensor.dtype for tensor in weights(in_bfloat16).values()} == {torch.float32}
    optimizer = torch.load(in_bfloat16 / "optimizer.pt", weights_only=True)
    moments = [
        value
        for state in optimizer["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    ]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert len(moments) >= 2 * len(weights(in_bfloat16))


def test_a_run_in_bfloat16_that_failed_ends_with_the_same_weights(
    files: list[str], in_bfloat16: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(files, run={"precision": "bfloat16"})
    with pytest.MonkeyPatch.context() as patch:
        strike_at(patch, 7)
        with pytest.raises(StruckError):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run")
    assert_same_weights(all_checkpoints(tmp_path / "run")[-1], in_bfloat16)


@pytest.mark.parametrize("form", ["packed", "unpacked"])
def test_speed_and_utilisation_count_tokens_and_no_padding(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "same.txt").write_text("\n".join([" ".join(WORDS)] * 200), encoding="utf-8")
    recipe = tiny_recipe(
        [str(tmp_path / "same.txt")],
        phases=[phase(tokens=256 * 4 * 8, sequence_length=256)],
        tokenizer={"train": {"vocab_size": 280}},
        data={"form": form},
        run={"micro_batch_tokens": 1024},
    )
    ticks = count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    seen = watch_steps(monkeypatch)
    run(recipe, tmp_path / "run")
    (length,) = {tokens for step in seen for tokens in step.documents}
    assert (length == 256) if form == "packed" else (length < 100)
    checkpoint = all_checkpoints(tmp_path / "run")[-1]
    entries = history(checkpoint)
    assert [entry["tokens"] for entry in entries] == [4096, 8192]  # the schedules'
    architecture = Checkpoint.open(tmp_path / "run" / "model").architecture
    flops = 4 * 4 * length * 3 * architecture.flops_per_token((length + 1) // 2)
    for entry in entries:  # four steps of four sequences in a second of this clock
        assert entry["tokens_per_second"] == 4 * 4 * length
        assert entry["mfu"] == pytest.approx(flops / 1e9)
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["total_flos"] == pytest.approx(2 * flops)
