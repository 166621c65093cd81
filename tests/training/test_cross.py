"""Cross-objective training: exact conversions, the masked next-token objective, encoders for transformers."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_runs import assert_same_weights, recipe_table, tiny_recipe, weights, write_texts

from checkpoints import tiny_architecture, write_checkpoint
from encoder_checkpoints import write_encoder
from modernbert_decoder.architecture import DecoderArchitecture, LayerKind, RotaryParameters
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.cli import main
from modernbert_decoder.conversion.convert import convert_checkpoint
from modernbert_decoder.conversion.kinds import CheckpointKind
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.errors import InputError
from modernbert_decoder.training.cross import MaskedTrainer, cross
from modernbert_decoder.training.errors import RecipeError
from modernbert_decoder.training.masked_encoder import MaskedNextTokenEncoder
from modernbert_decoder.training.masking import Masking
from modernbert_decoder.training.recipe import rate_schedule
from modernbert_decoder.training.recipe_files import read_recipe
from modernbert_decoder.training.sequences import TokenSequence

pytestmark = pytest.mark.filterwarnings("ignore")
# One base for all layers: any release of transformers can express it.
ROTARY = dict.fromkeys(LayerKind, RotaryParameters(theta=10000.0))
CLS, SEP, PAD, MASK = 1, 2, 3, 4  # of tokenizers trained here


def silent(line: str) -> None:
    """Takes lines of progress."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def pretrained(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of a few steps with a tokenizer of its own, which has [MASK]."""
    from modernbert_decoder.training.pretraining import pretrain

    out = tmp_path_factory.mktemp("pretrained") / "run"
    return pretrain(tiny_recipe(files), out, write=silent).folder


@pytest.fixture
def recipe(files: list[str], tmp_path: Path) -> str:
    """A recipe file for 8 steps of 4 sequences of 32 tokens; `cross` replaces model and tokenizer."""
    table = recipe_table(
        files,
        phases=[
            {
                "name": "cross",
                "tokens": 1024,
                "sequence_length": 32,
                "batch_sequences": 4,
                "rope_base": None,
                "warmup_tokens": 256,
                "decay_tokens": 256,
                "final_rate": 0.02,
            }
        ],
    )
    table["model"] = {"checkpoint": "replaced"}
    table["tokenizer"] = {"source": "replaced"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(table))  # JSON is YAML
    return str(path)


def encoder_of(decoder: Path, folder: Path) -> Path:
    convert_checkpoint(decoder, folder, to=CheckpointKind.ENCODER)
    return folder


# The objective


def masking(share: float = 0.15, **changes: Any) -> Masking:
    values = {"mask_token_id": MASK, "num_ids": 100, "special_ids": (CLS, SEP, PAD, MASK), "seed": 0}
    return Masking(share=share, **{**values, **changes})


def long_sequence(length: int = 20_000) -> TokenSequence:
    ids = np.random.default_rng(0).integers(5, 100, length).astype(np.int32)
    ids[::100] = CLS
    return TokenSequence(ids, tuple(range(0, length, 100)))


def test_shares_of_hidden_tokens_are_those_of_the_recipe() -> None:
    sequence = long_sequence()
    masked = masking().apply(sequence, np.random.default_rng(1))
    chosen = masked.chosen
    assert chosen.mean() == pytest.approx(0.15 * 0.99, abs=0.01)
    assert not chosen[sequence.ids == CLS].any()
    assert (masked.ids[~chosen] == sequence.ids[~chosen]).all()
    became = masked.ids[chosen]
    assert (became == MASK).mean() == pytest.approx(0.8, abs=0.03)
    assert (became == sequence.ids[chosen]).mean() == pytest.approx(0.1 + 0.1 / 100, abs=0.03)


def test_targets_are_the_hidden_tokens_one_place_earlier() -> None:
    sequence = long_sequence(500)
    masked = masking(0.5).apply(sequence, np.random.default_rng(2))
    targets = masked.targets()
    for i in range(500):
        is_told = i + 1 < 500 and masked.chosen[i + 1]
        assert targets[i] == (sequence.ids[i + 1] if is_told else -100)
    assert masked.num_targets == masked.chosen.sum()


def test_the_first_token_of_a_document_is_never_hidden_and_some_token_always_is() -> None:
    sequence = TokenSequence(np.array([7, 8, 9, 7, 8], np.int32), (0, 3))
    for seed in range(200):
        chosen = masking(0.01).apply(sequence, np.random.default_rng(seed)).chosen
        assert not chosen[[0, 3]].any()
        assert chosen.sum() >= 1
    only_special = TokenSequence(np.array([CLS, SEP], np.int32), (0,))
    assert masking().apply(only_special, np.random.default_rng(0)).num_targets == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_that_hide_nothing_or_everything_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="share of masked tokens"):
        masking(share)


@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("num_items", [None, 7])
def test_the_objective_equals_a_naive_computation(
    tmp_path: Path, skip_logits: bool, num_items: int | None
) -> None:
    architecture = tiny_architecture(rotary=ROTARY)
    folder = write_encoder(tmp_path / "encoder", architecture)
    model = MaskedNextTokenEncoder.from_pretrained(folder, dtype=torch.float32).eval()
    plain = transformers.ModernBertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    lengths, width = (200, 150), 200
    ids, mask = np.full((2, width), 258), np.zeros((2, width), np.int64)
    targets = np.full((2, width), -100)
    expected, count = 0.0, 0
    for row, length in enumerate(lengths):
        original = random.integers(0, 250, length).astype(np.int32)
        hidden = masking(0.3, mask_token_id=319, special_ids=()).apply(TokenSequence(original, (0,)), random)
        ids[row, :length], mask[row, :length] = hidden.ids, 1
        targets[row, :length] = hidden.targets()
        with torch.no_grad():
            logits = plain(input_ids=torch.from_numpy(hidden.ids.astype(np.int64))[None]).logits[0]
        logprobs = logits.log_softmax(-1)
        for i in range(1, length):
            if hidden.chosen[i]:
                expected -= logprobs[i - 1, original[i]].item()  # told from the state before it
                count += 1
    with torch.no_grad():
        loss = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            shift_labels=torch.from_numpy(targets),
            num_items_in_batch=num_items,
            skip_logits=skip_logits,
        ).loss
    assert loss.item() == pytest.approx(expected / (num_items or count), rel=1e-4)


# To a decoder


def test_an_encoder_goes_on_as_a_decoder(pretrained: Path, recipe: str, tmp_path: Path) -> None:
    encoder = encoder_of(pretrained, tmp_path / "encoder")
    result = cross(encoder, tmp_path / "out", to="decoder", recipe=recipe, write=silent)
    assert (result.folder, result.steps) == (tmp_path / "out" / "model", 8)
    # The conversion began where the decoder was, bit for bit.
    assert_same_weights(tmp_path / "out" / ".start", pretrained)
    before, after = weights(pretrained), weights(result.folder)
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.1.mlp.Wi.weight"], after["model.layers.1.mlp.Wi.weight"])
    with LLM(result.folder, dtype="float32") as llm:
        assert llm.score("the fox went over old hills")[0].num_tokens > 3


def test_both_bases_of_an_encoder_are_kept(pretrained: Path, recipe: str, tmp_path: Path) -> None:
    encoder = encoder_of(pretrained, tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    config["global_rope_theta"], config["local_rope_theta"] = 160000.0, 500.0
    config.pop("rope_parameters", None)
    (encoder / "config.json").write_text(json.dumps(config))
    result = cross(encoder, tmp_path / "out", to="decoder", recipe=recipe, write=silent)
    rotary = Checkpoint.open(result.folder).architecture.rotary
    assert (rotary[LayerKind.FULL].theta, rotary[LayerKind.SLIDING].theta) == (160000.0, 500.0)


# To an encoder


def test_a_decoder_goes_on_as_an_encoder_that_transformers_loads(
    pretrained: Path, recipe: str, tmp_path: Path
) -> None:
    result = cross(pretrained, tmp_path / "out", to="encoder", recipe=recipe, write=silent)
    assert result.folder == tmp_path / "out" / "model"
    config = json.loads((result.folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("modernbert", ["ModernBertForMaskedLM"])
    model, info = transformers.ModernBertForMaskedLM.from_pretrained(result.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    saved = load_file(result.folder / "model.safetensors")
    state = model.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(state[name], tensor), name
    # The last checkpoint of the run holds the same bits.
    (checkpoint,) = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1:]
    kept = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    start = load_file(tmp_path / "out" / ".start" / "model.safetensors")
    assert start.keys() == saved.keys()
    assert not torch.equal(start["model.layers.1.attn.Wqkv.weight"], saved["model.layers.1.attn.Wqkv.weight"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer.mask_token == "[MASK]"


def test_the_folder_of_an_encoder_tells_where_it_comes_from(
    pretrained: Path, recipe: str, files: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder = cross(pretrained, tmp_path / "out", to="encoder", recipe=recipe, write=silent).folder
    with (folder / "curve.csv").open(newline="") as file:
        entries = list(csv.DictReader(file))
    assert [(int(entry["step"]), int(entry["tokens"])) for entry in entries] == [(4, 512), (8, 1024)]
    last = np.mean([float(entry["loss"]) for entry in entries])
    card = (folder / "README.md").read_text()
    for said in (
        "15% of the tokens are hidden",
        *(f"`{name}`" for name in files),
        "![Loss](curve.png)",
        f"over the last 2 entries of `curve.csv`: {last:.4f} nats per token",
    ):
        assert said in card
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert read_recipe(folder / "recipe.yaml").data.files == tuple(files)


def test_operations_follow_from_the_share_of_hidden_tokens(
    pretrained: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, float]] = []
    original = MaskedTrainer._training_flops

    def count(self: MaskedTrainer) -> float:
        counted.append((self._mean_length, original(self)))
        return counted[-1][1]

    monkeypatch.setattr(MaskedTrainer, "_training_flops", count)
    options: dict[str, Any] = {"to": "encoder", "recipe": recipe, "write": silent}
    options["changes"] = ["phases.0.tokens=512"]
    for share in (0.15, 0.5):
        cross(pretrained, tmp_path / f"{share}", mask_share=share, **options)
    half = len(counted) // 2
    architecture = Checkpoint.open(pretrained).architecture
    for (length, few), (same, many) in zip(counted[:half], counted[half:], strict=True):
        assert length == same > 1
        body = architecture.flops_per_token(length, with_head=False)
        head = architecture.flops_per_token(length) - body
        assert few == pytest.approx(3 * (body + 0.15 * head))
        assert many == pytest.approx(3 * (body + 0.5 * head))
    assert half >= 1


def test_the_start_is_the_decoder_bit_for_bit(pretrained: Path, recipe: str, tmp_path: Path) -> None:
    cross(pretrained, tmp_path / "out", to="encoder", recipe=recipe, write=silent)
    convert_checkpoint(tmp_path / "out" / ".start", tmp_path / "back", to=CheckpointKind.DECODER)
    assert_same_weights(tmp_path / "back", pretrained)


def test_an_encoder_learns_hidden_tokens(pretrained: Path, recipe: str, tmp_path: Path) -> None:
    changes = ["phases.0.tokens=20480", "phases.0.warmup_tokens=1024", "phases.0.decay_tokens=4096"]
    result = cross(pretrained, tmp_path / "out", to="encoder", recipe=recipe, changes=changes, write=silent)
    lines = (result.folder / "curve.csv").read_text().splitlines()
    losses = [float(line.split(",")[2]) for line in lines[1:] if line.split(",")[2]]
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.15


@pytest.mark.parametrize("to", ["decoder", "encoder"])
def test_an_interrupted_run_ends_with_the_same_weights(
    pretrained: Path, recipe: str, tmp_path: Path, to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modernbert_decoder.training.trainer import PretrainingTrainer

    source = pretrained if to == "encoder" else encoder_of(pretrained, tmp_path / "encoder")
    options: dict[str, Any] = {"to": to, "recipe": recipe, "write": silent}
    options["changes"] = ["run.checkpoint_every_steps=2", "model.attention_output_dropout=0.1"]
    cross(source, tmp_path / "whole", **options)
    step = PretrainingTrainer.training_step
    count = 0

    class Killed(BaseException):
        """Nothing that anybody catches."""

    def killed_at_five(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(PretrainingTrainer, "training_step", killed_at_five)
    with pytest.raises(Killed):
        cross(source, tmp_path / "killed", **options)
    monkeypatch.undo()
    cross(source, tmp_path / "killed", **options)
    assert_same_weights(tmp_path / "whole" / "model", tmp_path / "killed" / "model")


# Recipes and refusals


def test_the_ready_recipe_is_that_of_the_paper() -> None:
    recipe = read_recipe("cross")
    (phase,) = recipe.phases
    assert (phase.tokens, phase.warmup_tokens, phase.decay_tokens) == (50e9, 3e9, 10e9)
    assert recipe.optimizer.learning_rate == read_recipe("ettin-17m").optimizer.learning_rate / 2
    assert phase.rope_base is None


def test_the_rate_of_the_ready_recipe_is_a_trapezoid_that_ends_at_a_fiftieth() -> None:
    schedule = rate_schedule(read_recipe("cross"), 0)
    billion = 1_000_000_000
    rates = [schedule.at(n) for n in (0, 3 * billion // 2, 3 * billion, 40 * billion, 50 * billion)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.02])
    for seen in (41 * billion, 45 * billion, 49 * billion):
        rate = 0.02 + 0.98 * (1 - math.sqrt((seen - 40 * billion) / (10 * billion)))
        assert schedule.at(seen) == pytest.approx(rate)


@pytest.mark.parametrize(("layers", "width", "rate"), [(7, 256, 1.5e-3), (22, 768, 4e-4)])
def test_the_rate_is_half_of_the_released_models(
    tmp_path: Path, layers: int, width: int, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import modernbert_decoder.training.cross as module

    sizes = {256: (384, 4), 768: (1152, 12)}[width]
    architecture = DecoderArchitecture(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=sizes[0],
        num_attention_heads=sizes[1],
        layer_kinds=tiny_architecture(num_hidden_layers=layers).layer_kinds,
        rotary=ROTARY,
    )
    changes = module._own_changes("cross", tmp_path, architecture, [], to="decoder")
    recipe = read_recipe("cross", changes=changes)
    assert recipe.optimizer.learning_rate == pytest.approx(rate)
    assert recipe.phases[0].sequence_length == 7999


def test_a_model_of_no_released_size_needs_a_rate(pretrained: Path, files: list[str], tmp_path: Path) -> None:
    changes = [f"data.files={files!r}"]
    with pytest.raises(InputError, match=r"--set optimizer\.learning_rate"):
        cross(pretrained, tmp_path / "out", to="encoder", changes=changes, write=silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.form=packed"], r"data\.form: packed texts would see each other"),
        (["phases.0.rope_base=10000"], r"phases\[0\]\.rope_base: an encoder keeps its bases"),
        (["evaluation.files=[x.txt]"], "evaluation: bits per byte are those of next tokens"),
    ],
)
def test_what_means_nothing_to_an_encoder_is_refused(
    pretrained: Path, recipe: str, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        cross(pretrained, tmp_path / "out", to="encoder", recipe=recipe, changes=changes, write=silent)


def test_a_model_of_the_wanted_kind_is_refused(pretrained: Path, recipe: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is in decoder format already"):
        cross(pretrained, tmp_path / "out", to="decoder", recipe=recipe, write=silent)
    encoder = encoder_of(pretrained, tmp_path / "encoder")
    with pytest.raises(InputError, match="is in encoder format already"):
        cross(encoder, tmp_path / "out", to="encoder", recipe=recipe, write=silent)


def test_a_tokenizer_without_mask_is_refused(recipe: str, tmp_path: Path) -> None:
    decoder = write_checkpoint(tmp_path / "decoder", tiny_architecture(rotary=ROTARY))
    with pytest.raises(RecipeError, match=r"has no \[MASK\]"):
        cross(decoder, tmp_path / "out", to="encoder", recipe=recipe, write=silent)


def test_the_folder_of_another_run_is_refused(pretrained: Path, recipe: str, tmp_path: Path) -> None:
    cross(pretrained, tmp_path / "out", to="encoder", recipe=recipe, write=silent)
    with pytest.raises(InputError, match="differs in mask_share"):
        cross(pretrained, tmp_path / "out", to="encoder", recipe=recipe, mask_share=0.3, write=silent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        cross(pretrained, tmp_path / "other", to="encoder", recipe=recipe, write=silent)


def test_cross_from_the_command_line(
    pretrained: Path, recipe: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "cross", str(pretrained), "--to", "encoder", "--recipe", recipe]
    arguments += ["--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    report = json.loads(capfd.readouterr().out)
    assert report == {"model": str(tmp_path / "out" / "model"), "to": "encoder", "steps": 8, "tokens": 1024}
    assert main(["info", str(tmp_path / "out" / "model")]) == 2  # an encoder, which the engine does not run
    bad = ["train", "cross", str(pretrained), "--to", "decoder", "--mask-share", "0.2", "--out", "x"]
    assert main(bad) == 2
    assert "--mask-share goes with --to encoder" in capfd.readouterr().err
