"""LoRA adapters that PEFT writes: merged as PEFT merges them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CLS, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.cli import main
from modernbert_decoder.engine.adapters import merge_adapter, with_adapter
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.weights import quantize_checkpoint
from modernbert_decoder.errors import CheckpointError, ConfigurationError, InputError, ModelNotFoundError
from modernbert_decoder.quantization import QuantizationScheme
from modernbert_decoder.safetensors_files import SafetensorsFile, write_safetensors

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-5  # the products differ in the order of sums only
LINEAR = ["q_proj", "k_proj", "v_proj", "Wo", "Wi"]
PROMPT = [CLS, *b"Once upon a time there was"]
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's remarks on tied weights and unknown hosts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", tiny_architecture())


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied") / "model"
    return write_checkpoint(folder, tiny_architecture(tie_word_embeddings=False))


def adapted(base: Path, folder: Path, *, is_classifier: bool = False, **options: Any) -> Any:
    """A model with a random adapter, which is saved in `folder`."""
    from modernbert_decoder.pytorch import (
        ModernBertDecoderForCausalLM,
        ModernBertDecoderForSequenceClassification,
    )

    torch.manual_seed(0)
    if is_classifier:
        labels = {0: "no", 1: "yes", 2: "perhaps"}
        model = ModernBertDecoderForSequenceClassification.from_pretrained(
            base, id2label=labels, reuse_lm_head=True, dtype=torch.float32
        )
    else:
        model = ModernBertDecoderForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **options})
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: file.as_float32(name).copy() for name in file.tensors}
    change(tensors)
    del file
    write_safetensors(path, tensors, {"format": "pt"})


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "some layers' queries": {"target_modules": ["q_proj"]},
    "rank-stabilized": {"use_rslora": True},
    "ranks and alphas by pattern": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.Wi": 8},
        "alpha_pattern": {"^.*layers.2.attn.Wo": 3, "v_proj": 11},
    },
    "rank-stabilized by pattern": {"use_rslora": True, "rank_pattern": {"Wo": 1}},
    "DoRA": {"use_dora": True},
    "a pattern of targets": {"target_modules": r".*layers\.[02]\.attn\..*_proj"},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["decoder"]},
    "some layers": {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "fan in, fan out": {"fan_in_fan_out": True},
    "trained biases": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "a module saved whole": {"modules_to_save": ["lm_head"]},
    "the head's dense layer": {"target_modules": ["dense", "q_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_weights_are_those_that_peft_merges(base: Path, tmp_path: Path, variant: str) -> None:
    model = adapted(base, tmp_path, **VARIANTS[variant])
    merged = model.merge_and_unload().state_dict()
    checkpoint = Checkpoint.open(base)
    ours = with_adapter(checkpoint, tmp_path)
    changed = 0
    for name in ours.names():
        expected = merged[name].numpy()
        np.testing.assert_allclose(ours.tensor(name), expected, atol=TOLERANCE, rtol=0, err_msg=name)
        changed += not np.array_equal(ours.tensor(name), checkpoint.tensor(name))
    assert changed >= 2


@pytest.mark.parametrize("targets", [["tok_embeddings"], ["decoder", "q_proj"]])
def test_embedding_and_projection_of_an_untied_model_are_adapted(
    untied: Path, tmp_path: Path, targets: list[str]
) -> None:
    merged = adapted(untied, tmp_path, target_modules=targets).merge_and_unload().state_dict()
    ours = with_adapter(Checkpoint.open(untied), tmp_path)
    for name in ours.names():
        np.testing.assert_allclose(ours.tensor(name), merged[name].numpy(), atol=TOLERANCE, rtol=0)


def test_the_engine_computes_the_adapted_models_logits(base: Path, tmp_path: Path) -> None:
    model = adapted(base, tmp_path)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    expected = logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
    with LLM(base, adapter=tmp_path, dtype="float32") as llm:
        (score,) = llm.score([PROMPT])
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
    with LLM(base, dtype="float32") as llm:
        (plain,) = llm.score([PROMPT])
    assert np.abs(np.array(plain.logprobs) - expected).max() > 0.1


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_an_adapter_is_merged_before_weights_are_rounded(base: Path, tmp_path: Path, dtype: str) -> None:
    adapted(base, tmp_path / "adapter")
    merge_adapter(Checkpoint.open(base), tmp_path / "adapter", tmp_path / "merged")
    scores = []
    for model, adapter in ((base, tmp_path / "adapter"), (tmp_path / "merged", None), (base, None)):
        with LLM(model, adapter=adapter, dtype=dtype) as llm:
            scores.append(llm.score([PROMPT])[0].logprobs)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert np.abs(np.subtract(scores[0], scores[2])).max() > 0.1  # the cache told them apart


def test_a_changed_adapter_is_not_taken_from_the_cache(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path)
    with LLM(base, adapter=tmp_path, dtype="int8") as llm:
        before = llm.score([PROMPT])[0].logprobs
    change_config(tmp_path, lora_alpha=60)
    with LLM(base, adapter=tmp_path, dtype="int8") as llm:
        after = llm.score([PROMPT])[0].logprobs
    assert np.abs(np.subtract(before, after)).max() > 0.1


def test_a_merged_folder_is_a_model_to_transformers_too(base: Path, tmp_path: Path) -> None:
    from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM

    model = adapted(base, tmp_path / "adapter")
    merge_adapter(Checkpoint.open(base), tmp_path / "adapter", tmp_path / "merged")
    loaded, info = ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="not empty"):
        merge_adapter(Checkpoint.open(base), tmp_path / "adapter", tmp_path / "merged")


# Classifiers


def test_an_adapter_with_head_and_classifier_makes_a_language_model_a_classifier(
    base: Path, tmp_path: Path
) -> None:
    model = adapted(
        base, tmp_path, is_classifier=True, task_type="SEQ_CLS", modules_to_save=["head", "classifier"]
    )
    (tmp_path / "config.json").write_text(json.dumps(model.get_base_model().config.to_dict(), default=str))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0].numpy()
    with LLM(base, adapter=tmp_path, dtype="float32") as llm:
        (output,) = llm.classify([PROMPT])
    np.testing.assert_allclose(output.logits, logits, atol=1e-4)
    assert output.label == ["no", "yes", "perhaps"][int(logits.argmax())]
    with LLM(base, adapter=tmp_path, dtype="int8") as llm:
        assert llm.classify([PROMPT])[0].label == output.label


def test_labels_without_names_are_numbered(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path, is_classifier=True, task_type="SEQ_CLS", modules_to_save=["head", "classifier"])
    checkpoint = with_adapter(Checkpoint.open(base), tmp_path)
    assert checkpoint.architecture.head is Head.SEQUENCE_CLASSIFICATION
    assert list(checkpoint.architecture.id2label.values()) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_an_adapter_of_a_classifier_keeps_its_labels(tmp_path: Path) -> None:
    labels = {0: "cold", 1: "warm", 2: "hot"}
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION, id2label=labels)
    classifier = write_checkpoint(tmp_path / "classifier", architecture)
    model = adapted(
        classifier,
        tmp_path / "adapter",
        is_classifier=True,
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    ours = with_adapter(Checkpoint.open(classifier), tmp_path / "adapter")
    assert dict(ours.architecture.id2label) == labels
    merged = model.merge_and_unload().state_dict()
    for name in ours.names():
        np.testing.assert_allclose(ours.tensor(name), merged[name].numpy(), atol=TOLERANCE, rtol=0)
    merge_adapter(Checkpoint.open(classifier), tmp_path / "adapter", tmp_path / "merged")
    assert dict(Checkpoint.open(tmp_path / "merged").architecture.id2label) == labels


def test_a_classifier_whose_head_was_not_saved_is_refused(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path, is_classifier=True, task_type="SEQ_CLS", modules_to_save=["classifier"])
    with pytest.raises(CheckpointError, match=r"modules_to_save=\['head', 'classifier'\]"):
        with_adapter(Checkpoint.open(base), tmp_path)


# What is refused


def test_a_packed_base_is_refused_with_a_way_out(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "adapter")
    scheme = QuantizationScheme.named("int8")
    quantize_checkpoint(Checkpoint.open(base), scheme, tmp_path / "packed", threads=1)
    with pytest.raises(InputError, match=r"holds int8 weights.*Load the original.*mbd merge"):
        LLM(tmp_path / "packed", adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication = \[\[0, 2\]\]"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.Wi.weight"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"an_invention_of_tomorrow": 3}, "an_invention_of_tomorrow = 3"),
        ({"r": 0}, "r is 0, but must be a positive integer"),
        ({"alpha_pattern": {"(": 3}}, "which is no pattern"),
        ({"target_modules": 5}, "target_modules is 5"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapted(base, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=message):
        with_adapter(Checkpoint.open(base), tmp_path)


def _rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _without(part: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def _widened(tensors: dict[str, np.ndarray]) -> None:
    name = next(name for name in tensors if "layers.0.attn.q_proj.lora_A" in name)
    tensors[name] = np.pad(tensors[name], ((0, 0), (0, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename("layers.3.", "layers.4."), "layers.4.attn.q_proj, which this model does not have"),
        (_rename("q_proj", "query"), "adapts model.layers.0.attn.query"),
        (_without("layers.1.attn.q_proj.lora_B"), "one factor is missing"),
        (_without("layers.2.attn.q_proj"), "there is nothing for model.layers.2.attn.q_proj"),
        (_widened, r"have the shapes \(4, 65\), \(64, 4\), which do not give \(64, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    base: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    adapted(base, tmp_path, target_modules=["q_proj"])
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        with_adapter(Checkpoint.open(base), tmp_path)


def test_a_rank_that_the_configuration_contradicts_is_refused(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path)
    change_config(tmp_path, r=8)
    with pytest.raises(CheckpointError, match=r"has rank 4, but adapter_config.json says 8"):
        with_adapter(Checkpoint.open(base), tmp_path)


def test_an_unknown_target_is_refused(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, target_modules=["q_proj", "c_attn"])
    with pytest.raises(CheckpointError, match="target_modules names 'c_attn'"):
        with_adapter(Checkpoint.open(base), tmp_path)


@pytest.mark.parametrize("targets", [["tok_embeddings"], ["decoder"]])
def test_tied_matrices_are_not_adapted(base: Path, tmp_path: Path, targets: list[str]) -> None:
    adapted(base, tmp_path, target_modules=targets)
    with pytest.raises(CheckpointError, match="ties embedding and vocabulary projection"):
        with_adapter(Checkpoint.open(base), tmp_path)


def test_missing_and_pickled_adapters_are_explained(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(base)
    with pytest.raises(ModelNotFoundError, match=r"holds no adapter_config\.json"):
        with_adapter(checkpoint, tmp_path)
    adapted(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="as a pickle"):
        with_adapter(checkpoint, tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no adapter_model\.safetensors"):
        with_adapter(checkpoint, tmp_path)


# The command line


def test_commands_take_an_adapter(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapted(base, tmp_path / "adapter")
    generate = ("generate", "--temperature", "0", "--max-tokens", "8", "--dtype", "float32", "--json", "Once")
    assert main([*generate, "-m", str(base), "--adapter", str(tmp_path / "adapter")]) == 0
    answer = json.loads(capfd.readouterr().out)
    with LLM(base, adapter=tmp_path / "adapter", dtype="float32") as llm:
        (expected,) = llm.generate("Once", SamplingParams(temperature=0, max_tokens=8))
    assert tuple(answer["outputs"][0]["token_ids"]) == expected.outputs[0].token_ids
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert "of float32 weights" in capfd.readouterr().out
    score = ("score", "--format", "jsonl", "--dtype", "float32", "Once upon")
    assert main([*score, "-m", str(base), "--adapter", str(tmp_path / "adapter")]) == 0
    assert main([*score, "-m", str(tmp_path / "merged")]) == 0
    first, second = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert first["logprob"] == pytest.approx(second["logprob"], abs=1e-4)
