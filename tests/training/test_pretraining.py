"""Pretraining from end to end: what a run computes, leaves behind, and survives."""

from __future__ import annotations

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_weights, phase, tiny_recipe, weights, write_texts
from watched_runs import PHASES, StruckError, run, strike_at

from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM
from modernbert_decoder.training import pretraining
from modernbert_decoder.training.checkpoints import all_checkpoints, step_of
from modernbert_decoder.training.errors import RecipeError, TrainingError
from modernbert_decoder.training.pretraining import pretrain
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.recipe_files import read_recipe
from modernbert_decoder.training.trainer import PretrainingTrainer

# Sums of the same numbers in another order, over a few steps of training.
TOLERANCE = 1e-5

DROPOUT = {"model": {"attention_output_dropout": 0.1}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_a_run_leaves_a_model_that_the_engine_and_transformers_read(files: list[str], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    held_out = {"files": [files[0]], "window": 16, "every_steps": 6, "max_windows": 5}
    recipe = tiny_recipe(
        files,
        phases=PHASES,
        data={"exclude": [Path(files[0]).name]},
        evaluation=held_out,
        model={"saved_dtype": "float16"},
    )
    result = run(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "model"
    assert result.folder == folder
    assert read_recipe(folder / "recipe.yaml") == recipe
    assert {path.name for path in folder.iterdir()} >= {
        *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "recipe.yaml", "README.md", "curve.csv", "evaluation.json"),
    }
    assert (folder / "curve.png").is_file() == (find_spec("matplotlib") is not None)
    opened = Checkpoint.open(folder)
    assert opened.stored_dtype("model.embeddings.tok_embeddings.weight") == "F16"
    a = opened.architecture
    assert (a.window, a.max_position_embeddings, a.cls_token_id, a.sep_token_id) == (8, 64, 1, 2)
    assert {rotary.theta for rotary in a.rotary.values()} == {160_000.0}
    assert AutoConfig.from_pretrained(folder).sliding_window == 8
    assert AutoTokenizer.from_pretrained(folder).cls_token_id == 1
    assert [entry.dtype for entry in result.evaluations] == ["float32", "float16"]
    stored = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert stored[0]["bits_per_byte"] == result.evaluations[0].bits_per_byte
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{result.evaluations[1].bits_per_byte:.4f}" in card
    assert "| extend |" in card
    assert (tmp_path / "run" / "phases" / "1-pretrain" / "config.json").is_file()
    check_scores(folder, files[0], bits_per_byte=stored[1]["bits_per_byte"])


def check_scores(folder: Path, held_out: str, *, bits_per_byte: float) -> None:
    """transformers' own class, the engine and the card agree on the model."""
    from transformers.models.modernbert_decoder.modeling_modernbert_decoder import (
        ModernBertDecoderForCausalLM as Upstream,
    )

    from modernbert_decoder.engine.llm import LLM
    from modernbert_decoder.evaluation.perplexity import Measure, file_perplexities

    upstream, info = Upstream.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with LLM(str(folder), dtype="float32", threads=1, max_context=16) as llm:
        (score,) = llm.score(["the fox went over the old hills"])
        measure = Measure(stride=15, concatenate=True)
        (whole,) = file_perplexities(llm, [held_out], measure=measure)
    ids = torch.tensor([score.token_ids])
    with torch.no_grad():
        logprobs = upstream.eval()(ids).logits[0, :-1].log_softmax(-1)
    theirs = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert list(score.logprobs) == pytest.approx(theirs, abs=1e-4)
    assert whole.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-4)


def test_phases_hand_over_weights_and_optimizer_state_and_keep_the_window(
    files: list[str], tmp_path: Path
) -> None:
    recipe = tiny_recipe(files, phases=PHASES, run={"checkpoint_every_steps": 1, "keep_checkpoints": 1000})
    run(recipe, tmp_path / "run")
    checkpoints = all_checkpoints(tmp_path / "run")
    state = torch.load(checkpoints[-1] / "optimizer.pt", weights_only=True)
    assert {int(group["step"]) for group in state["param_groups"]} == {len(checkpoints)}
    first = tmp_path / "run" / "phases" / "1-pretrain"
    assert {r.theta for r in Checkpoint.open(first).architecture.rotary.values()} == {10_000.0}
    assert Checkpoint.open(first).architecture.window == 8
    before = Checkpoint.open(first).tensor("model.embeddings.tok_embeddings.weight")
    after = weights(checkpoints[step_of_phase_end(recipe)])["model.embeddings.tok_embeddings.weight"].numpy()
    # The first step of the second phase goes on from the first phase's weights: one small step away.
    assert 0 < abs(after - before).max() <= 1.5 * recipe.optimizer.learning_rate


def step_of_phase_end(recipe: Recipe) -> int:
    from modernbert_decoder.training.plan import Plan

    return Plan(recipe).first_step_of(1)


def test_a_run_stopped_behind_each_phase_equals_one_in_a_piece(files: list[str], tmp_path: Path) -> None:
    recipe = tiny_recipe(files, phases=PHASES, model={"attention_output_dropout": 0.1})
    run(recipe, tmp_path / "whole")
    for name in ("pretrain", "extend"):
        result = run(recipe, tmp_path / "parts", stop_after=name)
        assert result.folder.name.endswith(name)
    run(recipe, tmp_path / "parts")
    assert_same_weights(tmp_path / "whole" / "model", tmp_path / "parts" / "model")


@pytest.fixture(scope="module")
def whole(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, with dropout."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(tiny_recipe(files, **DROPOUT), out)
    return out


@pytest.mark.parametrize("step", [1, 7, 15])
def test_a_run_that_failed_at_a_step_ends_with_the_same_weights(
    files: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    recipe = tiny_recipe(files, **DROPOUT)
    with monkeypatch.context() as patch:
        strike_at(patch, step)
        with pytest.raises(StruckError):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run")
    assert_same_weights(whole / "model", tmp_path / "run" / "model")


def test_a_finished_run_writes_its_model_again_when_it_is_missing(files: list[str], tmp_path: Path) -> None:
    import shutil

    recipe = tiny_recipe(files)
    run(recipe, tmp_path / "run")
    shutil.move(tmp_path / "run" / "model", tmp_path / "first")
    result = run(recipe, tmp_path / "run")
    assert result.steps == 16
    assert_same_weights(tmp_path / "first", tmp_path / "run" / "model")


def test_rounds_of_a_step_equal_one_large_batch(files: list[str], tmp_path: Path) -> None:
    large, small = (
        tiny_recipe(files, run={"micro_batch_tokens": tokens, "log_every_steps": 1}) for tokens in (128, 32)
    )
    run(large, tmp_path / "large")
    run(small, tmp_path / "small")
    last = [all_checkpoints(tmp_path / name)[-1] for name in ("large", "small")]
    assert losses(last[0]) == pytest.approx(losses(last[1]), rel=TOLERANCE)
    a, b = (weights(folder) for folder in last)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-4), name


def test_packed_and_padded_documents_have_the_same_loss(files: list[str]) -> None:
    """The same documents in one row, and each in its own with padding."""
    import numpy as np

    from modernbert_decoder.pytorch import ModernBertDecoderConfig
    from modernbert_decoder.training.batches import Share
    from modernbert_decoder.training.sequences import TokenSequence

    torch.manual_seed(0)
    config = ModernBertDecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=16,
        pad_token_id=3,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )
    model = ModernBertDecoderForCausalLM(config).train()
    random = np.random.default_rng(0)
    documents = [random.integers(5, 64, size=n).astype(np.int32) for n in (40, 3, 25, 1, 60)]
    starts = tuple(np.cumsum([0, *map(len, documents)])[:-1].tolist())
    share = Share(micro_batch_tokens=1000, pad_token_id=3)
    row = TokenSequence(np.concatenate(documents), starts)
    (packed,) = share.micro_batches([row], length=len(row.ids), is_packed=True)
    (padded,) = share.micro_batches(
        [TokenSequence(ids, (0,)) for ids in documents], length=60, is_packed=False
    )
    results = []
    for batch in (packed, padded):
        model.zero_grad()
        loss = model(**batch, skip_logits=True, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((loss.item(), gradients))
    assert row.num_targets == sum(len(ids) - 1 for ids in documents)
    assert results[0][0] == pytest.approx(results[1][0], rel=TOLERANCE)
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], atol=1e-6), name


def test_an_overfitted_text_is_generated_exactly_by_the_engine(tmp_path: Path) -> None:
    from modernbert_decoder.engine.llm import LLM
    from modernbert_decoder.engine.sampling_params import SamplingParams

    text = "Once a fox met a hen who had read of foxes. 'Good day,' said the hen, and locked the door."
    other = "There was a moon over the hill, and nobody asked what it was made of, so it never said."
    for name, content in (("a", text), ("b", other)):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
    recipe = tiny_recipe(
        [str(tmp_path / "*.txt")],
        phases=[phase(tokens=128 * 2 * 80, sequence_length=128, batch_sequences=2, warmup_tokens=2560)],
        tokenizer={"train": {"vocab_size": 290}},
        data={"text_documents": "file", "form": "unpacked"},
        run={"checkpoint_every_steps": 1000, "micro_batch_tokens": 256},
    )
    run(recipe, tmp_path / "run")
    with LLM(str(tmp_path / "run" / "model"), threads=1) as llm:
        for whole in (text, other):
            prompt = " ".join(whole.split(" ")[:2])
            (result,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=120))
            output = result.outputs[0]
            assert prompt + output.text == whole
            assert output.finish_reason == "stop"


def test_checkpoints_are_kept_as_many_as_asked_for(files: list[str], tmp_path: Path) -> None:
    recipe = tiny_recipe(files, run={"checkpoint_every_steps": 2, "keep_checkpoints": 3})
    run(recipe, tmp_path / "run")
    assert [step_of(path) for path in all_checkpoints(tmp_path / "run")] == [12, 14, 16]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_loss_that_is_no_number_stops_the_run_before_its_step(
    files: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(files, **DROPOUT)
    original = PretrainingTrainer.training_step

    def poisoned(self: PretrainingTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        if self.state.global_step == 7:
            with torch.no_grad():
                self.decoder.lm_head.norm.weight.fill_(math.inf)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "training_step", poisoned)
        with pytest.raises(TrainingError, match="the loss is nan at step 8; the step was not taken"):
            run(recipe, tmp_path / "run")
    assert [step_of(path) for path in all_checkpoints(tmp_path / "run")] == [5]
    run(recipe, tmp_path / "run")
    assert_same_weights(whole / "model", tmp_path / "run" / "model")


def test_weights_that_are_no_longer_finite_are_not_written(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PretrainingTrainer.training_step

    def poisoned(self: PretrainingTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = original(self, *arguments, **options)
        if self.state.global_step == 9:
            next(iter(self.decoder.parameters())).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(PretrainingTrainer, "training_step", poisoned)
    with pytest.raises(TrainingError, match="no longer finite after step 10"):
        run(tiny_recipe(files), tmp_path / "run")
    assert [step_of(path) for path in all_checkpoints(tmp_path / "run")] == [5]


@pytest.mark.parametrize("place", ["any file", "weights", "optimizer", "cursor"])
def test_a_full_disk_stops_with_a_message_and_leaves_the_last_checkpoint(
    files: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    import errno

    from modernbert_decoder.training import checkpoints, run_folder

    resource = pytest.importorskip("resource")

    def full(*arguments: Any, **options: Any) -> None:
        if place == "optimizer":
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = tiny_recipe(files, **DROPOUT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = checkpoints.CheckpointWriter.on_step_end

    def watched(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        original(self, args, state, control, **options)
        if state.global_step == 10 and place == "any file":
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        elif state.global_step == 10:
            target = {
                "weights": (ModernBertDecoderForCausalLM, "save_pretrained"),
                "optimizer": (torch, "save"),
                "cursor": (run_folder.shutil, "copyfile"),
            }[place]
            patch.setattr(*target, full)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointWriter, "on_step_end", watched)
        try:
            with pytest.raises(TrainingError, match="the checkpoint of step 10") as caught:
                run(recipe, tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-00000005" in str(caught.value)
    assert [step_of(path) for path in all_checkpoints(tmp_path / "run")] == [5]
    run(recipe, tmp_path / "run")
    assert_same_weights(whole / "model", tmp_path / "run" / "model")


def test_another_recipe_in_the_same_folder_is_refused_by_key(files: list[str], tmp_path: Path) -> None:
    run(tiny_recipe(files, phases=PHASES), tmp_path / "run", stop_after="pretrain")
    with pytest.raises(TrainingError, match=r"optimizer\.learning_rate differ"):
        run(tiny_recipe(files, phases=PHASES, optimizer={"learning_rate": 2e-2}), tmp_path / "run")
    with pytest.raises(TrainingError, match=r"run\.seed differ"):
        run(tiny_recipe(files, phases=PHASES, run={"seed": 1}), tmp_path / "run")


def test_what_has_no_effect_yet_may_change(files: list[str], tmp_path: Path) -> None:
    run(tiny_recipe(files, phases=PHASES), tmp_path / "run", stop_after="pretrain")
    later = [PHASES[0], PHASES[1] | {"tokens": 256, "decay_tokens": 256}]
    result = run(tiny_recipe(files, phases=later, run={"keep_checkpoints": 1}), tmp_path / "run")
    assert result.folder.name == "model"
    assert len(all_checkpoints(tmp_path / "run")) == 1


def test_a_folder_that_is_not_of_a_run_is_left_alone(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"is not empty and holds no recipe\.yaml"):
        run(tiny_recipe(files), tmp_path)


def test_two_processes_do_not_train_in_one_folder(files: list[str], tmp_path: Path) -> None:
    from modernbert_decoder.training.run_folder import locked

    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is training"):
        run(tiny_recipe(files), tmp_path / "run")


def test_a_phase_to_stop_after_must_be_in_the_recipe(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no phase 'tail' to stop after; the recipe has pretrain"):
        run(tiny_recipe(files), tmp_path / "run", stop_after="tail")


def test_training_goes_on_from_a_checkpoint_of_ones_own(files: list[str], tmp_path: Path) -> None:
    run(tiny_recipe(files), tmp_path / "first")
    model = {"checkpoint": str(tmp_path / "first" / "model")}
    table = {"source": str(tmp_path / "first" / "model")}
    recipe = tiny_recipe(files, phases=[phase(tokens=128)])
    from dataclasses import replace

    from modernbert_decoder.training.recipe import ModelRecipe, TokenizerRecipe

    recipe = replace(
        recipe,
        model=ModelRecipe(**model),
        tokenizer=TokenizerRecipe(**table),
    )
    run(recipe, tmp_path / "second")
    before, after = (weights(tmp_path / name / "model") for name in ("first", "second"))
    steps = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < steps <= 1.5 * recipe.optimizer.learning_rate


def test_dropout_is_on_the_output_of_attention_alone_and_not_in_the_model(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    original = PretrainingTrainer.training_step

    def watch(self: PretrainingTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        attention = self.decoder.model.layers[1].attn
        seen.append((attention.out_drop.p, attention.dropout))
        return original(self, *arguments, **options)

    monkeypatch.setattr(PretrainingTrainer, "training_step", watch)
    run(tiny_recipe(files, model={"attention_output_dropout": 0.1}), tmp_path / "run")
    assert set(seen) == {(0.1, 0.0)}
    assert Checkpoint.open(tmp_path / "run" / "model").architecture.attention_dropout == 0.0


def test_tensorboard_gets_the_numbers(files: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tiny_recipe(files, run={"report_to": ["tensorboard"]}), tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/tokens", "train/mfu"} <= set(events.Tags()["scalars"])


def test_progress_says_loss_speed_end_and_utilisation(files: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    pretrain(tiny_recipe(files), tmp_path / "run", write=lines.append)
    line = next(line for line in lines if "step 12/16" in line)
    for part in ("pretrain", "M tokens", "loss", "tok/s", "MFU", "ends in 0:00"):
        assert part in line


@pytest.mark.parametrize("columns", [80, 200])
def test_a_bar_says_loss_speed_end_and_utilisation_on_narrow_terminals_too(
    files: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    lines: list[str] = []
    pretrain(tiny_recipe(files), tmp_path / "run", write=lines.append, shows_bar=True)
    assert not [line for line in lines if "step" in line]
    *_, last = capfd.readouterr().err.strip().split("\r")
    assert len(last) < columns
    assert last.startswith("pretrain: 100%|")
    for part in ("2.05k [00:", "<00:00, ", "loss=", "tok/s=", "MFU="):
        assert part in last
    assert ("rate=1.00e-02]" in last) == (columns == 200)


def test_as_many_processes_as_do_not_divide_a_batch_are_refused(files: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"sequence_multiple is 2, but there are 3 processes"):
        pretraining._check_processes(tiny_recipe(files), 3)
